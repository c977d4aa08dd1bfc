"""Our side of the benchmark: `ours.py THREADS WEIGHTS`, started and asked by `against_huggingface.py`.

PYTHONPATH says which checkout is measured. Only names that every layout of the repository has are imported.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

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
    RATE,
    SIZES,
    Job,
    N,
    mixed_lengths,
    next_word_loss,
    plain_loop,
    serve,
    tokens,
    trained,
    without_gradient,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.tasks import Dataset
from minitransformer.training import answer_loss, next_token_loss, training_step

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
OWN_LOSS = [name for name in ("full fine-tuning", "LoRA q,v", "LoRA all") if hasattr(Transformer, "loss")]
PASSES = [BEGINNING] + [1] * (NEW_TOKENS - 1)  # of generation: the beginning, then word by word


def base() -> Transformer:
    """The model with the weights that both sides share."""
    model = Transformer(CONFIG)
    model.load_state_dict(load_file(sys.argv[2]))
    return model


def with_method(method: peft.Method | None) -> Transformer:
    """The model ready for training."""
    return base().train() if method is None else peft.attach(base(), method).train()


def full_batch() -> Dataset:
    """Every word of a full batch is asked for."""
    return Dataset(tokens(), torch.ones(BATCH, LENGTH, dtype=torch.bool), tokens()[:, -1])


def answer_batch() -> Dataset:
    """Rows of mixed lengths, padded on the left, with one answer each."""
    return Dataset(tokens(), mixed_lengths(), tokens(BATCH, 1, seed=1)[:, 0])


def plain_step(method: peft.Method | None) -> Job:
    """A training step with logits and PyTorch's cross-entropy."""
    model, batch = with_method(method), tokens()
    return plain_loop(model, lambda: next_word_loss(model(batch), batch))


def own_loss_step(method: peft.Method | None) -> Job:
    """The same step with the model's own loss."""
    model, batch = with_method(method), tokens()
    targets = F.pad(batch[:, 1:], (0, 1), value=-100)
    return plain_loop(model, lambda: model.loss(batch, targets))


def fit_step(method: peft.Method | None, build: Callable[[], Dataset] = full_batch, objective=next_token_loss) -> Job:
    """A training step as `fit` does it with its default settings, without its record and its bar."""
    model, batch = with_method(method), build()
    trainable = trained(model)
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)

    def step() -> None:
        model.train()
        training_step(model, batch, objective, optimizer, trainable, 1.0, 0)

    return step


def limit() -> Job:
    """What any method must pay: the frozen forward pass, and a backward pass that only goes through activations."""
    model, batch = base().requires_grad_(False), full_batch()
    entering = model.embedding(batch.tokens).requires_grad_()
    model.embedding.register_forward_hook(lambda *_: entering)
    return plain_loop(model, lambda: next_token_loss(model, batch).loss)


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


def linear(*layers: nn.Linear, relaid: bool) -> Callable[[Tensor], Tensor]:
    """The layers of one input as one product; `relaid` stores their weights as [d_in, d_out]."""
    weight, bias = torch.cat([layer.weight for layer in layers]).T, torch.cat([layer.bias for layer in layers])
    return partial(torch.addmm, bias, mat2=weight.contiguous() if relaid else weight)


def least(rows: int, lengths: Sequence[int], last_only: bool = False) -> Job:
    """What no implementation can leave out of passes over so many new tokens each: norms, the product with every
    weight, and attention, each after the one that it waits for. Nothing lies between them: no embedding, no activation,
    no sum, no cache that is written. The weights are laid out beforehand as is best for so many rows: up to eight read
    a weight equally well either way, and a dozen passes pay for a new layout."""
    model, n_heads, d_model = base(), SIZES["n_heads"], SIZES["d_model"]
    relaid = rows > 8 and len(lengths) >= 16
    parts = [(b.attention, b.feedforward) for b in model.blocks]
    groups = [((a.query, a.key, a.value), (a.output,), (f.up,), (f.down,)) for a, f in parts]
    layers = [[linear(*group, relaid=relaid) for group in layer] for layer in groups]
    norm = partial(torch.layer_norm, normalized_shape=(d_model,), weight=model.norm.weight, bias=model.norm.bias)
    head = model.embedding.token.weight.T.contiguous() if relaid else model.embedding.token.weight.T
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
            norm(inputs[1, d_model] if last_only else x) @ head

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


JOBS = {
    **{f"plain loop: {name}": partial(plain_step, method) for name, method in METHODS.items()},
    **{f"model.loss: {name}": partial(own_loss_step, METHODS[name]) for name in OWN_LOSS},
    **{f"fit: {name}": partial(fit_step, method) for name, method in METHODS.items()},
    "fit: LoRA q,v, one answer a row": partial(fit_step, LORA, answer_batch, answer_loss),
    "step: limit": limit,
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
    assert Path(peft.__file__).is_relative_to(os.environ["PYTHONPATH"]), f"another peft is installed: {peft.__file__}"
    serve(JOBS, int(sys.argv[1]), "this repository")
