"""Do all of a method's tensors learn, in every layer, and does everything else stay frozen? One line a claim.

    pytest tests/test_gradient_flow.py -v

The loop is plain PyTorch, and looks at gradients and bits by itself: `peft.gradient_audit` has no part in it. The
optimizer is told of every tensor of the model, so that what stays frozen does not rest on a list of parameters.
"""

import functools
import inspect
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from reference.random_weights import randomize
from reference.tiny_models import LLAMA

import peft
from minitransformer import Transformer, TransformerConfig
from peft import IA3, BitFit, BottleneckAdapter, DoRA, LNTuning, LoRA, PrefixTuning, PromptTuning, VeRA

N_LAYERS = 2
KINDS = {"causal": {}, "bidirectional": {"causal": False}, "Llama": LLAMA}
LOW_RANK = ("attention.query.A", "attention.query.B", "attention.value.A", "attention.value.B")
MLP = ("source", "hidden_weight", "hidden_bias", "key_weight", "key_bias", "value_weight", "value_bias")
BOTTLENECK = ("down_weight", "down_bias", "up_weight", "up_bias")
MAPS = ("attention.query", "attention.value", "attention.output", "feedforward.up", "feedforward.down")
BIASES = (*MAPS, "norm_attention", "norm_feedforward")


@dataclass(frozen=True)
class Case:
    """A recipe, and which tensors it must train."""

    recipe: peft.Method
    promise: str
    in_each_block: tuple[str, ...] | None = None  # their names; None: whatever the method added, some in every block
    elsewhere: tuple[str, ...] = ()
    of_llama: tuple[str, ...] | None = None  # in each block of the Llama family, where they are others
    waits_for: str = ""  # the tensor that starts at zero ...
    waiting: tuple[str, ...] = ()  # ... and those that learn only once it has moved


def adapter(placement: str, *sites: str) -> Case:
    names = tuple(f"{site}.{name}" for site in sites for name in BOTTLENECK)
    recipe = BottleneckAdapter(bottleneck=5, placement=placement)
    return Case(
        recipe, "down and up learn in every layer", names, waits_for="up_weight", waiting=("down_weight", "down_bias")
    )


CASES = {
    "LoRA": Case(LoRA(rank=2), "A and B learn in every layer", LOW_RANK, waits_for="B", waiting=("A",)),
    "LoRA, B only": Case(LoRA(rank=2, train=("B",)), "B learns in every layer", LOW_RANK[1::2]),
    "LoRA, A only": Case(LoRA(rank=2, train=("A",)), "A learns in every layer", LOW_RANK[::2]),
    "DoRA": Case(
        DoRA(rank=2),
        "A, B and the magnitude learn in every layer",
        (*LOW_RANK, "attention.query.magnitude", "attention.value.magnitude"),
        waits_for="B",
        waiting=("A",),
    ),
    "VeRA": Case(
        VeRA(rank=6),
        "d and b learn in every layer, A and B are shared and frozen",
        tuple(f"attention.{site}.{name}" for site in ("query", "value") for name in "db"),
        waits_for="b",
        waiting=("d",),
    ),
    "prefix of keys and values": Case(
        PrefixTuning(length=3), "P_k and P_v learn in every layer", ("attention.key", "attention.value")
    ),
    "prefix of hidden states": Case(
        PrefixTuning(length=3, at="hidden"), "P learns in every layer", ("attention.hidden",)
    ),
    "gated prefix": Case(
        PrefixTuning(length=3, gated=True),
        "P_k, P_v and the gate learn in every layer",
        ("attention.key", "attention.value", "attention.gate"),
        waits_for="gate",
        waiting=("key", "value"),
    ),
    "prefix by an MLP": Case(
        PrefixTuning(length=3, reparameterize=5),
        "the MLP and what it reads learn in every layer",
        tuple(f"attention.{name}" for name in MLP),
    ),
    "prompt": Case(PromptTuning(length=3), "the prompt learns through all layers", (), ("embedding.prompt",)),
    "adapter, Houlsby": adapter("houlsby", "attention", "feedforward"),
    "adapter, Pfeiffer": adapter("pfeiffer", "feedforward"),
    "adapter, parallel": adapter("parallel", "feedforward"),
    "adapter, inside the feed-forward": adapter("inside_ffn", "feedforward.down"),
    "BitFit": Case(
        BitFit(),
        "every bias learns in every layer, but that of keys where it changes nothing",
        tuple(f"{site}.delta_bias" for site in BIASES),
        ("norm.delta_bias",),
        tuple(f"attention.{site}.delta_bias" for site in ("query", "key", "value")),
    ),
    "IA3": Case(
        IA3(),
        "the scales learn in every layer",
        ("attention.key.scale", "attention.value.scale", "feedforward.down.scale"),
    ),
    "LN-tuning": Case(
        LNTuning(),
        "the gain of every norm learns in every layer",
        ("norm_attention.delta_gain", "norm_feedforward.delta_gain"),
        ("norm.delta_gain",),
    ),
}

# A method of the package that stands in no case above is tried in the default form of its recipe.
COVERED = {type(case.recipe) for case in CASES.values()}
WITHOUT_RECIPE = []
for name, method in peft.Method.registry.items():
    if method.__module__.startswith("peft.") and not inspect.isabstract(method) and method not in COVERED:
        try:
            CASES[name] = Case(method(), "its tensors learn in every layer")
        except TypeError:  # some field has no default
            WITHOUT_RECIPE.append(name)


def second_method(first: peft.Method) -> Case:
    """One that can stand beside the first."""
    if not isinstance(first, BottleneckAdapter):
        return adapter("parallel", "feedforward")
    return Case(LoRA(rank=2), "A and B learn in every layer", LOW_RANK)


@dataclass(frozen=True)
class Run:
    """What three steps left behind, by the name of the tensor, wrappers left out of it."""

    base: set[str]  # the tensors of the model before anything was attached
    trained: set[str]  # required a gradient once the methods were attached
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    gradients: list[dict[str, torch.Tensor | None]]  # of each step


def named(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {".".join(part for part in name.split(".") if part != "base"): p for name, p in model.named_parameters()}


@functools.cache
def run(name: str, kind: str, evaluate: bool = False, checkpointing: bool = False, beside: str = "") -> Run:
    """Attach, and make three steps of SGD. `beside`: where in the order a second method is attached."""
    config = TransformerConfig(23, 12, 16, 2, N_LAYERS, 24, gradient_checkpointing=checkpointing, **KINDS[kind])
    model = randomize(Transformer(config, seed=0)).train()
    base = set(named(model))
    recipe = CASES[name].recipe
    second = [second_method(recipe).recipe] if beside else []
    for seed, method in enumerate([*second, recipe] if beside == "first" else [recipe, *second]):
        peft.attach(model, method, seed=seed)
    parameters = named(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(23, (2, 3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [5], [4]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for _ in range(3):
        if evaluate:
            with torch.no_grad():
                model.eval()(tokens, mask)
            model.train()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(tokens, mask)[mask], targets[mask]).backward()
        gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    trained = {name for name, p in parameters.items() if p.requires_grad}
    return Run(base, trained, before, {name: p.detach().clone() for name, p in named(model).items()}, gradients)


def expected(case: Case, done: Run) -> set[str]:
    """The names of the tensors that must learn."""
    if case.in_each_block is None:
        return done.trained - done.base
    if case.of_llama and "embedding.position.weight" not in done.base:
        return {f"blocks.{i}.{name}" for i in range(N_LAYERS) for name in case.of_llama}
    return {f"blocks.{i}.{name}" for i in range(N_LAYERS) for name in case.in_each_block} | {*case.elsewhere}


def assert_learns(done: Run, *cases: Case) -> None:
    """Each tensor of the cases got a nonzero gradient, and moved."""
    for case in cases:
        names = sorted(expected(case, done))
        for i in range(N_LAYERS if case.in_each_block is None else 0):
            assert any(name.startswith(f"blocks.{i}.") for name in names), f"nothing in blocks.{i} is trained"
        for name in names:
            assert name in done.before, f"{name} is not there"
            assert name in done.trained, f"{name} requires no gradient"
            gradient = done.gradients[-1][name]
            assert gradient is not None, f"{name} got no gradient"
            assert bool(gradient.isfinite().all()), f"{name} got a gradient that is not finite"
            assert bool(gradient.any()), f"{name} got a gradient of zeros"
            assert not torch.equal(done.before[name], done.after[name]), f"{name} did not move"


def assert_frozen(done: Run, *cases: Case) -> None:
    """Every other tensor requires no gradient, got none, and has its bits."""
    assert done.before.keys() == done.after.keys()
    for name in sorted(done.before.keys() - set().union(*(expected(case, done) for case in cases))):
        assert name not in done.trained, f"{name} belongs to no method, and requires a gradient"
        assert all(gradients[name] is None for gradients in done.gradients), f"{name} is frozen, and got a gradient"
        assert torch.equal(done.before[name], done.after[name]), f"{name} is frozen, and moved"


def learns(name: str, kind: str) -> None:
    assert_learns(run(name, kind), CASES[name])


def waits(name: str, kind: str) -> None:
    case, done = CASES[name], run(name, kind)
    first = done.gradients[0]
    zero = sorted(tensor for tensor in done.trained if tensor.endswith(f".{case.waits_for}"))
    waiting = sorted(tensor for tensor in done.trained if tensor.rpartition(".")[2] in case.waiting)
    assert zero and waiting, f"no tensor is called {case.waits_for}, or none {' or '.join(case.waiting)}"
    for tensor in zero:
        assert not bool(done.before[tensor].any()), f"{tensor} does not start at zero"
        assert first[tensor] is not None and bool(first[tensor].any()), f"{tensor} got no gradient at the first step"
    for tensor in waiting:
        assert first[tensor] is not None, f"{tensor} got no gradient, not even zeros"
        assert not bool(first[tensor].any()), f"{tensor} got a gradient at the first step, when it can have none"


def frozen(name: str, kind: str) -> None:
    assert_frozen(run(name, kind), CASES[name])


def after_evaluation(name: str, kind: str) -> None:
    done = run(name, kind, evaluate=True)
    assert_learns(done, CASES[name])
    assert_frozen(done, CASES[name])


def with_checkpointing(name: str, kind: str) -> None:
    done, plain = run(name, kind, checkpointing=True), run(name, kind)
    assert_learns(done, CASES[name])
    assert_frozen(done, CASES[name])
    for tensor in sorted(done.trained):
        close = torch.allclose(done.gradients[-1][tensor], plain.gradients[-1][tensor], rtol=1e-4, atol=1e-6)
        assert close, f"{tensor} got another gradient than without checkpointing"


def beside_a_second(name: str, kind: str) -> None:
    second = second_method(CASES[name].recipe)
    for order in ("first", "last"):
        done = run(name, kind, beside=order)
        assert_learns(done, CASES[name], second)
        assert_frozen(done, CASES[name], second)


def claims() -> list:
    """One for every method, kind of model and claim, with the sentence that `pytest -v` shows."""
    found = []
    for name, case in CASES.items():
        sentences = {case.promise: learns}
        if case.waits_for:
            words = " and ".join(case.waiting)
            sentences[f"at the first step the gradient of {words} is exactly zero, as {case.waits_for} is"] = waits
        sentences |= {
            "every frozen tensor keeps its bits and gets no gradient": frozen,
            "both hold after an evaluation pass": after_evaluation,
            "both hold with gradient checkpointing": with_checkpointing,
            "both hold beside a second method": beside_a_second,
        }
        for kind in KINDS:
            for sentence, claim in sentences.items():
                found.append(pytest.param(claim, name, kind, id=f"{name} - {kind}: {sentence}"))
    return found


@pytest.mark.parametrize(("claim", "name", "kind"), claims())
def test_claim(claim, name, kind):
    claim(name, kind)


def test_every_method_of_the_package_is_tried():
    assert not WITHOUT_RECIPE, (
        f"{', '.join(WITHOUT_RECIPE)} cannot be made without arguments, so nothing shows that it learns; "
        "add a recipe and the names of its tensors to CASES in tests/test_gradient_flow.py"
    )
