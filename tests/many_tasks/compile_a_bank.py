"""Compile a bank, and its model, to one graph and compare; run by a test, without the shape checks (see
`methods/compile_all.py`)."""

import copy
import sys
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounterWithBackend

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference.bank_cases import alone, loss_of_rows, rows_of  # noqa: E402
from reference.method_cases import RECIPES  # noqa: E402

from minitransformer import Transformer, TransformerConfig  # noqa: E402
from peft import LoRA, PrefixTuning, TaskBank  # noqa: E402

CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)
TASKS = {
    "lora": [RECIPES["lora all"]],
    "mam": [RECIPES["prefix kv"], RECIPES["parallel"]],
    "hidden": [PrefixTuning(length=2, at="hidden"), LoRA(rank=2, targets=("key", "value"))],
}


def gradients(bank: TaskBank, logits: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss_of_rows(logits, real), [p for p in bank.parameters() if p.requires_grad])


def main() -> None:
    model = Transformer(CONFIG, seed=0).eval()
    models = {name: alone(model, seed, recipes) for seed, (name, recipes) in enumerate(TASKS.items())}
    bank = TaskBank(copy.deepcopy(model), models, trainable=True)
    tokens, real = rows_of(4)
    counted = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(bank, backend="aot_eager", fullgraph=True)
    inner = torch.compile(bank.model, backend=counted, fullgraph=True)
    for tasks in (["lora", "mam", "hidden", None], ["lora"] * 4, [None, "lora", None, "mam"]):
        plain = bank(tokens, real, tasks=tasks)
        with bank.using(tasks):
            inside = inner(tokens, real)
        for logits in (inside, whole(tokens, real, tasks=tasks)):
            torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
            expected = gradients(bank, bank(tokens, real, tasks=tasks), real)
            torch.testing.assert_close(gradients(bank, logits, real), expected, rtol=1e-3, atol=1e-4)
    with bank.using([None] * 4):
        torch.testing.assert_close(inner(tokens, real), model(tokens, real), rtol=1e-4, atol=1e-5)
    assert counted.frame_count == 1, f"{counted.frame_count} graphs"
    wet = TaskBank(copy.deepcopy(model), {"wet": alone(model, 1, [LoRA(rank=2, dropout=0.5)])}).train()
    assert torch.compile(wet, backend="aot_eager", fullgraph=True)(tokens, tasks=["wet"] * 4).isfinite().all()


if __name__ == "__main__":
    main()
