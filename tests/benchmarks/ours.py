"""Our side of the benchmark: `python tests/benchmarks/ours.py THREADS WEIGHTS`, asked by `against_huggingface.py`."""

import sys
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from jobs import (
    ALPHA,
    BATCH,
    BEGINNING,
    LENGTH,
    MAX_LEN,
    NEW_TOKENS,
    RANK,
    SIZES,
    Job,
    N,
    mixed_lengths,
    serve,
    stepper,
    tokens,
    without_gradient,
)
from safetensors.torch import load_file

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.fast.generation import ThinLinear, for_rows, linear_map, relaying_pays
from minitransformer.tasks.dataset import Dataset
from minitransformer.training.objectives import answer_loss, word_score

CONFIG = TransformerConfig(**SIZES, max_len=MAX_LEN, activation="relu")
LORA = peft.LoRA(rank=RANK, alpha=ALPHA)
LORA_ALL = peft.LoRA(rank=RANK, alpha=ALPHA, targets=peft.ALL_LINEARS)
METHODS = {
    "full fine-tuning": None,
    "LoRA q,v": LORA,
    "LoRA all": LORA_ALL,
    "prefix": peft.PrefixTuning(length=N, init="normal"),
    "prompt": peft.PromptTuning(length=N),
    "Pfeiffer adapter": peft.BottleneckAdapter(bottleneck=16, placement="pfeiffer"),
}


PASSES = [BEGINNING] + [1] * (NEW_TOKENS - 1)  # of generation: the beginning, then word by word


def base() -> Transformer:
    """The model with the weights that both sides share."""
    model = Transformer(CONFIG)
    model.load_state_dict(load_file(sys.argv[2]))
    return model


def with_method(method: peft.Method | None) -> Transformer:
    """The model ready for training."""
    return base().train() if method is None else peft.attach(base(), method).train()


def next_word_loss(model: Transformer, batch: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every next word in nats."""
    return word_score(model, model.hidden(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).loss


def training(method: peft.Method | None) -> Job:
    """A training step on a full batch."""
    model, batch = with_method(method), tokens()
    trained = [p for p in model.parameters() if p.requires_grad]
    return stepper(lambda: next_word_loss(model, batch), trained)


def limit() -> Job:
    """What any method must pay: the frozen forward pass, and a backward pass that only goes through activations."""
    model, batch = base().requires_grad_(False), tokens()
    entering = model.embedding.look_up(batch).detach().requires_grad_()
    model.embedding.look_up = lambda _: entering
    return stepper(lambda: next_word_loss(model, batch), [])


def answer_step() -> Job:
    """A training step with the loss on one answer of each row, rows of mixed lengths."""
    model = with_method(LORA)
    batch = Dataset(tokens(), mixed_lengths(), tokens(BATCH, 1, seed=1)[:, 0])
    return stepper(lambda: answer_loss(model, batch).loss, list(peft.trainable_parameters(model).values()))


def forward(method: peft.Method | None = None, merged: bool = False, rows: int = BATCH, length: int = LENGTH) -> Job:
    """A forward pass alone."""
    model, batch = with_method(method).eval(), tokens(rows, length)
    if merged:
        peft.merge(model)
    return without_gradient(lambda: model(batch))


def generation(rows: int) -> Job:
    """Greedy generation with the KV cache."""
    model, batch = base().eval(), tokens(rows, BEGINNING)
    return without_gradient(lambda: model.generate(batch, NEW_TOKENS))


def least(rows: int, lengths: Sequence[int], last_only: bool = False) -> Job:
    """What no implementation can leave out of passes over so many new tokens each: norms, the product with every
    weight, and attention, each after the one that it waits for. Nothing lies between them: no embedding, no activation,
    no sum, no cache that is written. The weights are laid out beforehand as is best for so many rows."""
    model, n_heads, d_model = base(), SIZES["n_heads"], SIZES["d_model"]
    lay_out = partial(ThinLinear, relaid=relaying_pays(rows, len(lengths)))
    parts = [(b.attention, b.feedforward) for b in model.blocks]
    groups = [((a.query, a.key, a.value), (a.output,), (f.up,), (f.down,)) for a, f in parts]
    layers = [[lay_out(*map(linear_map, group)) for group in layer] for layer in groups]
    norm, head = for_rows(model.norm), lay_out((model.embedding.token.weight, None))
    inputs = {(n, d): torch.randn(rows * n, d) for n in {1, *lengths} for d in (d_model, SIZES["d_ff"])}
    room = [torch.randn(2, rows, n_heads, sum(lengths), d_model // n_heads) for _ in layers]

    def run() -> None:
        for new, seen in zip(lengths, accumulate(lengths), strict=True):
            x, hidden = inputs[new, d_model], inputs[new, SIZES["d_ff"]]
            for (read, output, up, down), keys_and_values in zip(layers, room, strict=True):
                read(norm(x))
                k, v = keys_and_values[..., :seen, :]
                F.scaled_dot_product_attention(k[..., seen - new :, :], k, v, is_causal=new > 1)
                output(x)
                up(norm(x))
                down(hidden)
            head(norm(inputs[1, d_model] if last_only else x))

    return without_gradient(run)


def many(rows: int, length: int) -> Job:
    """One batch, a LoRA of its own for each row."""
    lora = peft.attach(base(), LORA)
    sources = {f"task {i}": [(LORA, peft.state_dict(lora))] for i in range(rows)}
    bank, batch = peft.TaskBank(base(), sources).eval(), tokens(rows, length)
    return without_gradient(lambda: bank(batch, tasks=list(sources)))


def attaching() -> Job:
    """Attach LoRA to query and value, and take it out again."""
    model = base()
    return lambda: peft.detach(peft.attach(model, LORA))


JOBS = {f"step: {name}": partial(training, method) for name, method in METHODS.items()} | {
    "step: limit": limit,
    "step: LoRA q,v, one answer a row": answer_step,
    "forward: limit": partial(least, BATCH, [LENGTH]),
    "forward": forward,
    "forward: LoRA q,v": partial(forward, LORA),
    "forward: LoRA q,v, merged": partial(forward, LORA, merged=True),
    "forward: one LoRA, 64 rows of 16": partial(forward, LORA, rows=64, length=16),
    "forward: 16 LoRAs, 16 rows": partial(many, 16, 128),
    "forward: 64 LoRAs, 64 rows of 16": partial(many, 64, 16),
    "generate: 16 rows, limit": partial(least, 16, PASSES, last_only=True),
    "generate: 16 rows": partial(generation, 16),
    "generate: 1 row, limit": partial(least, 1, PASSES, last_only=True),
    "generate: 1 row": partial(generation, 1),
    "attach LoRA q,v": attaching,
}

if __name__ == "__main__":
    serve(JOBS, int(sys.argv[1]), "this repository")
