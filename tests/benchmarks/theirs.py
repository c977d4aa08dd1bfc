"""Hugging Face's side of the benchmark: transformers' OPT and their peft, in an environment of its own.

Started and asked by `against_huggingface.py`; it imports nothing of this repository but `jobs.py`.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import transformers
from jobs import (
    ALPHA,
    BATCH,
    BEGINNING,
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

NAMES = {
    "embedding.token": "model.decoder.embed_tokens",
    "embedding.position": "model.decoder.embed_positions",
    "blocks.": "model.decoder.layers.",
    "norm_attention": "self_attn_layer_norm",
    "norm_feedforward": "final_layer_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "feedforward.up": "fc1",
    "feedforward.down": "fc2",
}
LORA = {"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
METHODS = {
    "full fine-tuning": None,
    "LoRA q,v": partial(peft.LoraConfig, target_modules=["q_proj", "v_proj"], **LORA),
    "LoRA all": partial(
        peft.LoraConfig, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], **LORA
    ),
    "prefix": partial(peft.PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=N),
    "prompt": partial(peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=N),
}


def their_name(name: str) -> str:
    """The name of one of our tensors in OPT."""
    if name in ("norm.weight", "norm.bias"):
        return f"model.decoder.final_layer_norm.{name.split('.')[1]}"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def base() -> transformers.OPTForCausalLM:
    """OPT with the weights that both sides share; its position table has two rows in front that are never used."""
    config = transformers.OPTConfig(
        vocab_size=SIZES["vocab_size"], hidden_size=SIZES["d_model"], word_embed_proj_dim=SIZES["d_model"],
        num_hidden_layers=SIZES["n_layers"], num_attention_heads=SIZES["n_heads"], ffn_dim=SIZES["d_ff"],
        max_position_embeddings=MAX_LEN, dropout=0.0, activation_function="relu", do_layer_norm_before=True,
        pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config)
    weights = {their_name(name): tensor for name, tensor in load_file(sys.argv[2]).items()}
    positions = "model.decoder.embed_positions.weight"
    weights[positions] = torch.cat([torch.zeros(2, SIZES["d_model"]), weights[positions]])
    left_out = model.load_state_dict(weights, strict=False)
    assert not left_out.unexpected_keys and set(left_out.missing_keys) <= {"lm_head.weight"}, left_out
    return model


def with_method(name: str):
    """The model ready for training."""
    model, config = base(), METHODS[name]
    model.config.use_cache = False  # as their Trainer does
    return (model if config is None else peft.get_peft_model(model, config())).train()


def full_batch() -> dict[str, Tensor]:
    """Every word of a full batch is asked for."""
    return {"input_ids": tokens(), "labels": tokens()}


def answer_batch() -> dict[str, Tensor]:
    """Rows of mixed lengths, padded on the left, with one answer each."""
    mask = mixed_lengths()
    text = torch.cat([torch.where(mask, tokens(), 1)[:, 1:], tokens(BATCH, 1, seed=1)], dim=1)
    seen = torch.cat([mask[:, 1:], torch.ones(BATCH, 1, dtype=torch.bool)], dim=1).long()
    labels = torch.full_like(text, -100)
    labels[:, -1] = text[:, -1]
    return {"input_ids": text, "attention_mask": seen, "labels": labels}


def plain_step(name: str) -> Job:
    """A training step with logits and PyTorch's cross-entropy."""
    model, batch = with_method(name), tokens()
    return plain_loop(model, lambda: next_word_loss(model(input_ids=batch).logits, batch))


def own_loss_step(name: str) -> Job:
    """The same step with the model's own loss."""
    model, batch = with_method(name), full_batch()
    return plain_loop(model, lambda: model(**batch).loss)


def trainer_step(name: str, build: Callable[[], dict[str, Tensor]] = full_batch) -> Job:
    """A training step as `transformers.Trainer` does it with its default settings, without its logging."""
    model, batch = with_method(name), build()
    optimizer = torch.optim.AdamW(trained(model), lr=RATE, weight_decay=0.0, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 10**6)

    def step() -> None:
        model.train()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.zero_grad()

    return step


def forward(name: str = "full fine-tuning", merged: bool = False, rows: int = BATCH, length: int = 128) -> Job:
    """A forward pass alone."""
    model, batch = with_method(name).eval(), tokens(rows, length)
    if merged:
        model = model.merge_and_unload()
    return without_gradient(lambda: model(input_ids=batch, use_cache=False))


def generation(rows: int) -> Job:
    """Greedy generation with the KV cache."""
    model, batch = base().eval(), tokens(rows, BEGINNING)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return without_gradient(lambda: model.generate(batch, attention_mask=torch.ones_like(batch), **options))


def many(rows: int, length: int) -> Job:
    """One batch, a LoRA of its own for each row."""
    model = peft.get_peft_model(base(), METHODS["LoRA q,v"](), adapter_name="task 0")
    for i in range(1, rows):
        model.add_adapter(f"task {i}", METHODS["LoRA q,v"]())
    names, batch = [f"task {i}" for i in range(rows)], tokens(rows, length)
    model.eval()
    return without_gradient(lambda: model(input_ids=batch, adapter_names=names, use_cache=False))


def attaching() -> Job:
    """Attach LoRA to query and value, and take it out again."""
    model = base()

    def attach() -> None:
        peft.get_peft_model(model, METHODS["LoRA q,v"]()).unload()

    return attach


JOBS = {
    **{f"plain loop: {name}": partial(plain_step, name) for name in METHODS},
    **{f"model.loss: {name}": partial(own_loss_step, name) for name in METHODS},
    **{f"fit: {name}": partial(trainer_step, name) for name in METHODS},
    "fit: LoRA q,v, one answer a row": partial(trainer_step, "LoRA q,v", answer_batch),
    "forward": forward,
    "forward: LoRA q,v": partial(forward, "LoRA q,v"),
    "forward: LoRA q,v, merged": partial(forward, "LoRA q,v", merged=True),
    "forward: one LoRA, 64 rows of 16": partial(forward, "LoRA q,v", rows=64, length=16),
    "forward: 16 LoRAs, 16 rows": partial(many, 16, 128),
    "forward: 64 LoRAs, 64 rows of 16": partial(many, 64, 16),
    "generate: 16 rows": partial(generation, 16),
    "generate: 1 row": partial(generation, 1),
    "attach LoRA q,v": attaching,
}

if __name__ == "__main__":
    serve(JOBS, int(sys.argv[1]), f"peft {peft.__version__}, transformers {transformers.__version__}")
