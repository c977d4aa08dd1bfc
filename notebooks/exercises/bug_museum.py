"""Checkers of notebook 11."""

import functools

import torch
from torch import nn

from exercises.verdict import called, checker, require, same


@checker
def check_repaired_merge(merged_weight) -> str:
    """merged_weight(W0 [d_out, d_in], A [r, d_in], B [d_out, r], alpha) -> W [d_out, d_in]; W0 stays as it is."""
    generator = torch.Generator().manual_seed(0)
    W0, A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, 6), (3, 6), (7, 3)))
    kept, alpha, r = W0.clone(), 2.5, 3
    got = called(merged_weight, W0, A, B, alpha)
    require(
        torch.equal(W0, kept), "W0 itself has changed: nobody can unmerge after that; return a new tensor and leave W0"
    )
    elsewhere = "alpha is divided by something else than r, the number of rows of A: here it was"
    hints = {
        "the scale alpha / r is missing, which shows wherever alpha is not r": W0 + B @ A,
        "alpha is there, but it is not divided by r": W0 + alpha * B @ A,
        "the division by r is there, but alpha is missing": W0 + B @ A / r,
        "that is the update alone; the weight it is added to is missing": alpha / r * B @ A,
        "the scale also changes W0": alpha / r * (W0 + B @ A),
        f"{elsewhere} d_in": W0 + alpha / 6 * B @ A,
        f"{elsewhere} d_out": W0 + alpha / 7 * B @ A,
    }
    same(got, W0 + alpha / r * B @ A, hints, "the merged weight")
    return "merged and apart agree for any alpha and r, and W0 is still there for unmerging."


@checker
def check_repaired_freeze_check(moved_although_frozen) -> str:
    """moved_although_frozen(model, train, trained): call train(model) -> names outside of `trained` that changed."""
    check = functools.partial(_check_one_run, moved_although_frozen)

    check(lambda model: _move(model, "A", "B"), set(), "nothing but A and B moved")

    def moves_what_was_left_trainable(model: nn.Module) -> None:
        model.norm.requires_grad_(True)
        _move(model, "A", "B", "norm")

    copies = (
        "; look at the numbers before and after, and at no flag. Is the old value a copy? p.detach() shares its memory "
        "with p, p.detach().clone() does not"
    )
    check(moves_what_was_left_trainable, {"norm"}, "a tensor that was left trainable moved", copies)

    def writes_into_a_frozen_one(model: nn.Module) -> None:
        _move(model, "A", "B", "norm")

    promise = "; `requires_grad` is a promise, look at the numbers"
    check(writes_into_a_frozen_one, {"norm"}, "a tensor with requires_grad=False was written to", promise)

    def thaws_for_a_while(model: nn.Module) -> None:
        model.weight.requires_grad_(True)
        _move(model, "A", "weight")
        model.weight.requires_grad_(False)

    check(thaws_for_a_while, {"weight"}, "a tensor was thawed, moved, and was frozen again", promise)

    def creeps(model: nn.Module) -> None:
        model.weight.data[0, 0] += 1e-6

    check(creeps, {"weight"}, "one number moved by 0.000001", "; compare with torch.equal, not with a tolerance")

    def leaves_it_trainable(model: nn.Module) -> None:
        model.norm.requires_grad_(True)
        _move(model, "A")

    check(leaves_it_trainable, set(), "a tensor requires a gradient, but nothing moved it")
    return "it looks at what the tensors are, not at what they promise."


class _Small(nn.Module):
    """Four tensors, two of them frozen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"weight": (3, 4), "norm": (4,), "A": (2, 4), "B": (3, 2)}.items():
            values = torch.rand(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(values, requires_grad=name in ("A", "B")))


def _move(model: nn.Module, *names: str) -> None:
    """Change the named tensors, as a step of an optimizer does."""
    with torch.no_grad():
        for name in names:
            getattr(model, name).add_(0.1)


def _check_one_run(answer, train, expected: set[str], told: str, advice: str = "") -> None:
    """Ask the answer about one run, and compare with what really moved."""
    model, trained, runs = _Small(), {"A", "B"}, []

    def train_and_count(given_model: nn.Module) -> None:
        runs.append(given_model)
        train(given_model)

    got = called(answer, model, train_and_count, set(trained))
    require(not isinstance(got, bool), "return the names, as a set: a bare yes or no does not say where to look")
    require(isinstance(got, set | frozenset | list | tuple), f"return a set of names, not {got!r}")
    require(len(runs) == 1, f"train(model) has to be called once, it was called {len(runs)} times")
    require(runs[0] is model, "train has to be given the model itself, not a copy of it")
    got = set(got)
    own = ", ".join(sorted(got & trained))
    require(not own, f"{own} may move: what stands in `trained` is no finding")
    missed, invented = expected - got, got - expected
    require(not missed, f"{told}, and it was not noticed ({', '.join(sorted(missed))}){advice}")
    require(not invented, f"{told}, but {', '.join(map(str, invented))} was reported: what has moved is the question")


@checker
def check_repaired_dropout(update) -> str:
    """update(x [N, d_in], A [r, d_in], B [d_out, r], scale, p, training) -> [N, d_out]: scale * B A dropout(x)."""
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 8), (3, 8), (6, 3)))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for p, training, when in ((0.5, False, "in evaluation"), (0.0, True, "with p = 0")):
            got = called(update, x, A, B, 2.0, p, training)
            hints = {"the scale is missing": x @ A.T @ B.T}
            same(got, 2.0 * x @ A.T @ B.T, hints, f"the update {when}, where nothing may be dropped,")
        _dropped_numbers(update)
    return "each number of each row has its own luck, in training only, and the mean is kept."


def _dropped_numbers(update) -> None:
    """Ones through a sum of 64: each output says how many of its row's inputs were kept."""
    n, d, p = 400, 64, 0.25
    x, A, B = torch.ones(n, d), torch.ones(1, d), torch.ones(2, 1)
    out = called(update, x, A, B, 1.0, p, True).detach()
    require(tuple(out.shape) == (n, 2), f"the update has shape {list(out.shape)}, it should be [N, d_out] = [{n}, 2]")
    require(not bool((out == d).all()), "p = 0.25 in training changes nothing: the dropout is never applied")
    require(
        not bool((out == out[0]).all()),
        "every row lost the same inputs: one mask for the whole batch, as when A is dropped instead of x",
    )
    require(
        torch.equal(out[:, 0], out[:, 1]),
        "two equal rows of B gave different outputs: the dropout falls on the output (or on B), it belongs on x",
    )
    kinds = len(out.unique())
    require(kinds > 3, f"only {kinds} different outputs in {n} rows: whole rows are dropped, or what A gives; not x")
    mean = out.mean().item() / d
    advice = ": what is kept must be divided by 1 - p" if abs(mean - (1 - p)) < 0.03 else ""
    require(abs(mean - 1) < 0.03, f"on average the update is {mean:.2f} of what it is in evaluation{advice}")
    kept = out[:, 0] * (1 - p)  # how many of the 64
    one_by_one = torch.allclose(kept, kept.round(), atol=1e-3) and abs(kept.var().item() / (d * p * (1 - p)) - 1) < 0.4
    require(one_by_one, "the numbers of a row are not dropped one by one, each with probability p")
    again = called(update, x, A, B, 1.0, p, True).detach()
    require(not torch.equal(out, again), "the second call dropped the very same inputs: draw them anew in each call")
