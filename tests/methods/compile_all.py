"""Compile a model under every set of methods, export one, compare with the same model; run by a test, without checks.

torch.compile traces the code, and the run-time shape checks of the tests are nothing that it could trace. The backend
"aot_eager" traces forward and backward like the default one, and needs no C++ compiler.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference.method_cases import SETS, batch, loss_of, train_a_little  # noqa: E402

import peft  # noqa: E402
from minitransformer import Transformer, TransformerConfig  # noqa: E402

CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)


def compare_exported(model: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """The graph that torch.export makes gives what the model gives."""
    exported = torch.export.export(model, inputs).module()
    torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def main() -> None:
    tokens, mask = batch()
    for inputs in ((tokens,), (tokens, mask)):
        compare_exported(peft.attach(Transformer(CONFIG, seed=0).eval(), peft.LoRA(rank=2)), *inputs)
    for name in sys.argv[1:] or SETS:
        model = Transformer(CONFIG, seed=0).eval()
        for number, recipe in enumerate(SETS[name]):
            peft.attach(model, recipe, seed=number)
        train_a_little(model)
        trained = list(peft.trainable_parameters(model).values())
        plain = model(tokens, mask)
        gradients = torch.autograd.grad(loss_of(model), trained)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens, mask)[mask], plain[mask], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss_of(compiled), trained), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
        with peft.disabled(model):  # the flag is seen, not baked in
            torch.testing.assert_close(
                compiled(tokens, mask)[mask], Transformer(CONFIG, seed=0)(tokens, mask)[mask], rtol=1e-5, atol=1e-5
            )
        print(name, flush=True)


if __name__ == "__main__":
    main()
