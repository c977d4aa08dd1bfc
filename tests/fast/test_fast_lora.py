"""LoRA's fast form against the plain one and the NumPy twin, value and gradient; and where it must not be used."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import numpy_peft
from torch import nn

import minitransformer
import peft
from peft import LoRA
from peft.fast.lora import fast_lora
from peft.functional import lora_update
from peft.method import switched_off
from peft.methods import lora as lora_module
from peft.methods.lora import LoRALinear

D_IN, D_OUT, R, SCALE = 5, 7, 3, 1.5
OURS = tuple(str(Path(package.__file__).parent) for package in (peft, minitransformer))


def tensors(*rows, dtype=torch.float64):
    """x, W0, b, A, B; only W0 and b are frozen, as they mostly are."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, D_IN), (D_OUT, D_IN), (D_OUT,), (R, D_IN), (D_OUT, R))
    drawn = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [t.requires_grad_(i in (0, 3, 4)) for i, t in enumerate(drawn)]


def plain(x, weight, bias, A, B):
    return F.linear(x, weight, bias) + lora_update(x, A, B, SCALE)


@pytest.mark.parametrize("rows", [(1,), (4,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_it_equals_the_plain_form_in_value_and_gradient(rows, biased):
    x, weight, bias, A, B = tensors(*rows)
    bias = bias if biased else None
    g = torch.randn(*rows, D_OUT, dtype=torch.float64)
    results = []
    for form in (plain(x, weight, bias, A, B), fast_lora(x, weight, bias, A, B, SCALE)):
        results.append((form, *torch.autograd.grad(form, (x, A, B), g)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_it_equals_the_numpy_twin_in_value_and_gradient():
    x, weight, bias, A, B = tensors(2, 4)
    g = torch.randn(2, 4, D_OUT, dtype=torch.float64)
    out = fast_lora(x, weight, bias, A, B, SCALE)
    gradients = torch.autograd.grad(out, (x, A, B), g)
    xn, Wn, bn, An, Bn, gn = (t.detach().numpy() for t in (x, weight, bias, A, B, g))
    np.testing.assert_allclose(out.detach().numpy(), xn @ Wn.T + bn + numpy_peft.lora_update(xn, An, Bn, SCALE))
    dx, dA, dB = numpy_peft.lora_update_backward(gn, xn, An, Bn, SCALE)
    for got, expected in zip(gradients, (dx + gn @ Wn, dA, dB), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])
def test_first_and_second_derivatives_by_finite_differences(biased):
    """Also for many directions at once; and W0 and b may learn as well."""
    given = [t.detach().requires_grad_() for t in tensors(2, 2)]
    if not biased:
        del given[2]

    def function(x, weight, *rest):
        return fast_lora(x, weight, rest[0] if biased else None, *rest[-2:], SCALE)

    assert torch.autograd.gradcheck(function, given, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, given)


def layer_form():
    """The arithmetic as a LoRA layer does it, at a number of rows at which it takes the fast form if it may."""
    lora = layer(LoRA(rank=R, alpha=SCALE * R), dtype=torch.float64)
    assert takes_the_fast_form(lora, torch.ones(4, D_IN, dtype=torch.float64))

    def form(x, weight, bias, A, B):
        return torch.func.functional_call(lora, {"base.weight": weight, "base.bias": bias, "A": A, "B": B}, (x,))

    return form


FUNC = {
    "grad": lambda f: torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2, 3, 4)),
    "jvp": lambda f: lambda *t: torch.func.jvp(f, t, tuple(map(torch.cos, t))),
    "jvp of A alone": lambda f: lambda x, W, b, A, B: torch.func.jvp(lambda A: f(x, W, b, A, B), (A,), (A.cos(),)),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=3),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=4),
    "hessian": lambda f: torch.func.hessian(lambda *t: f(*t).square().sum(), argnums=3),
    "gradient of a gradient, for W0": lambda f: torch.func.grad(
        lambda *t: torch.func.grad(lambda *s: f(*s).square().sum(), argnums=3)(*t).sum(), argnums=1
    ),
    "gradient of each row": lambda f: torch.func.vmap(
        torch.func.grad(lambda x, *t: f(x[None], *t).square().sum(), argnums=(3, 4)), (0, None, None, None, None)
    ),
}


@pytest.mark.parametrize("transform", FUNC)
def test_the_transforms_of_torch_func_give_the_same_by_a_layer(transform):
    given = [t.detach() for t in tensors(4)]
    found = [FUNC[transform](form)(*given) for form in (plain, layer_form())]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_forward_mode_without_torch_func_takes_the_plain_form():
    (x, weight, bias, A, B), form = (t.detach() for t in tensors(4)), layer_form()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        moved = torch.autograd.forward_ad.unpack_dual(form(dual, weight, bias, A, B)).tangent
    torch.testing.assert_close(moved, plain(x.cos(), weight, None, A, B), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learning", [(0,), (3,), (4,), (0, 3), (3, 4), (1,), (2,), (1, 2, 3)])
def test_only_what_asks_for_a_gradient_gets_one(learning):
    given = [t.detach().requires_grad_(i in learning) for i, t in enumerate(tensors(4))]
    fast_lora(*given, SCALE).square().sum().backward()
    assert [i for i, t in enumerate(given) if t.grad is not None] == list(learning)


@pytest.mark.parametrize("learning, kept", [((0, 3, 4), True), ((0,), False)])
def test_the_tokens_are_kept_only_for_factors_that_learn(learning, kept):
    """And neither W nor anything else as large as the weight is kept, except W0, which is there anyway."""
    given = [t.detach().requires_grad_(i in learning) for i, t in enumerate(tensors(40))]
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        fast_lora(*given, SCALE)
    own = {t.data_ptr() for i, t in enumerate(given) if i != 2 and (i != 0 or kept)}
    assert set(seen) == own


def test_no_gradient_as_large_as_the_weight_is_formed():
    """By hand the backward pass multiplies thin matrices; autograd's, given W0 + s B A, would make dW first."""
    x, weight, bias, A, B = tensors(40)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                made.append(tuple(out.shape))
            return out

    made = []
    out = fast_lora(x, weight, bias, A, B, SCALE).sum()
    with Sizes():
        out.backward()
    assert sorted(made) == sorted([(40, D_IN), (40, R), (R, D_IN), (40, R), (D_OUT, R)])
    made.clear()
    out = F.linear(x, weight + SCALE * (B @ A), bias).sum()
    with Sizes():
        out.backward()
    assert (D_OUT, D_IN) in made or (D_IN, D_OUT) in made


def layer(recipe=None, dtype=torch.float32, **linear):
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT, **linear).to(dtype).requires_grad_(False)
    lora = LoRALinear(base, recipe or LoRA(rank=2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        lora.B.normal_()
    return lora


def takes_the_fast_form(lora, x):
    """Whether a pass through the layer takes the fast form."""
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_module, "fast_lora", lambda *a: called.append(1) or fast_lora(*a))
        lora(x)
    return bool(called)


def test_it_pays_from_the_rows_on_at_which_the_thin_products_cost_more():
    """5 * 7 / (5 + 7) = 2.9 rows."""
    rows = [n for n in range(5) if takes_the_fast_form(layer(), torch.ones(n, D_IN))]
    assert rows == [3, 4]
    assert takes_the_fast_form(layer(bias=False), torch.ones(2, 2, D_IN))
    assert not takes_the_fast_form(layer(), torch.ones(1, 2, D_IN))


def changed(change):
    lora = layer()
    change(lora)
    return lora


X = torch.ones(9, D_IN)
PLAIN = {
    "merged": changed(lambda lora: lora.merge(lora.weight_to_merge())),
    "dropout in training": layer(LoRA(rank=2, dropout=0.5)).train(),
    "half precision below": layer(dtype=torch.bfloat16),
    "a hook on the map": changed(lambda lora: lora.base.register_forward_hook(lambda *_: None)),
    "a subclass": changed(lambda lora: setattr(lora, "__class__", type("Other", (LoRALinear,), {}))),
    "something round the map": changed(lambda lora: setattr(lora, "base", nn.Sequential(lora.base))),
}


@pytest.mark.parametrize("case", PLAIN)
def test_the_plain_form_is_used_where_the_fast_one_would_be_wrong(case):
    assert not takes_the_fast_form(PLAIN[case], X.to(next(PLAIN[case].base.parameters()).dtype))


def test_the_plain_form_is_used_where_the_method_is_off():
    lora = layer()
    with switched_off(lora):
        assert not takes_the_fast_form(lora, X)


def test_dropout_is_off_in_evaluation_so_the_fast_form_is_used():
    assert takes_the_fast_form(layer(LoRA(rank=2, dropout=0.5)).eval(), X)


def test_the_plain_form_is_used_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes_the_fast_form(layer(), X)
        assert layer()(X).dtype == torch.bfloat16


def test_a_layer_gives_the_same_by_either_form():
    lora = layer()
    with torch.no_grad():
        rows = torch.randn(9, D_IN)
        torch.testing.assert_close(lora(rows), torch.cat([lora(row[None]) for row in rows]))


def test_dora_does_not_take_the_fast_form_of_lora():
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    dora = peft.DoRA(rank=2).wrap("map", base, base, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dora.B.normal_()
        dora.magnitude.mul_(2.0)
    torch.testing.assert_close(dora(X), F.linear(X, dora.changed_weight(), base.bias))


def test_a_layer_vectorises_over_adapters():
    """torch.func sees through it: many adapters at once, each as alone."""
    (x, weight, bias, A, B), form = (t.detach() for t in tensors(4)), layer_form()
    many_A, many_B = torch.stack([A, 2 * A]), torch.stack([B, -B])
    together = torch.func.vmap(lambda A, B: form(x, weight, bias, A, B))(many_A, many_B)
    for i in range(2):
        torch.testing.assert_close(together[i], fast_lora(x, weight, bias, many_A[i], many_B[i], SCALE))


def calls_of(run):
    """The functions that a run calls, as (file, name)."""
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code) if event == "call" else None)
    try:
        run()
    finally:
        sys.setprofile(None)
    return [(code.co_filename, code.co_name) for code in calls]


@pytest.mark.parametrize("kind, at_most", [("plain", 22), ("lora", 35), ("merged", 40)])
def test_a_block_takes_few_calls(decoder, kind, at_most):
    """Counted, since times are noise: calls of our own functions in one block more, with LoRA on query and value."""
    ours, tokens = [], torch.randint(23, (4, 12))
    for n_layers in (1, 2):
        model = decoder(n_layers=n_layers)
        if kind != "plain":
            peft.attach(model, LoRA(rank=2))
        if kind == "merged":
            peft.merge(model)
        model(tokens)
        calls = calls_of(lambda model=model: model(tokens))
        ours.append(sum(file.startswith(OURS) for file, _ in calls))
        assert "bind_default_args" not in {name for _, name in calls}  # PyTorch's, longer than all the rest
        assert kind != "lora" or (peft.fast.lora.__file__, "forward") in calls
    assert 10 < ours[1] - ours[0] <= at_most
