"""Merged is unmerged, whatever was done to the layer: each way a layer can be watched, changed or moved, by kind."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import peft
from peft import DoRA, LoRA, VeRA

RECIPES = {
    "lora": LoRA(rank=2, alpha=3.0, targets=("map",)),
    "dora": DoRA(rank=2, alpha=3.0, targets=("map",)),
    "vera": VeRA(rank=4, targets=("map",)),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
ROWS = {"few rows": 2, "many rows": 24}


class Net(nn.Module):
    """A layer that a method enters, and one behind it that may share its weight."""

    def __init__(self):
        super().__init__()
        self.map, self.behind = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.behind(torch.tanh(self.map(x)))


def net(recipe, before=lambda base: None):
    """A model with an update that counts; `before` is done to its layer before the method is attached."""
    torch.manual_seed(0)
    model = Net().eval()
    before(model.map)
    peft.attach(model, recipe)
    with torch.no_grad():
        for tensor in peft.trainable_parameters(model).values():
            tensor.add_(torch.randn(tensor.shape))
    return model


def x(n_rows=24, dtype=torch.float32):
    return torch.randn(n_rows, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_forward(base):
    base.forward = lambda x: 3 * F.linear(x, base.weight, base.bias)


CHANGES = {
    "nothing": lambda base: None,
    "a hook": lambda base: base.register_forward_hook(lambda module, inputs, y: 2 * y),
    "a hook before": lambda base: base.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "pruned": lambda base: prune.random_unstructured(base, "weight", 0.5),
    "parametrised": lambda base: parametrize.register_parametrization(base, "weight", Halved()),
    "weight norm": lambda base: nn.utils.parametrizations.weight_norm(base),
    "a forward set on it": own_forward,
    "a subclass": lambda base: setattr(base, "__class__", OwnLinear),
}


@every_recipe
@pytest.mark.parametrize("n_rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["before attaching", "before merging", "after merging"])
def test_the_outputs_stay_whatever_watches_or_changes_the_layer(recipe, change, when, n_rows):
    model, plain = (net(recipe, change if when == "before attaching" else CHANGES["nothing"]) for _ in range(2))
    for changed in (model, plain):
        if changed is model and when == "after merging":
            peft.merge(model)
        if when != "before attaching":
            torch.manual_seed(3)
            change(changed.map.base)
    if when != "after merging":
        peft.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x(n_rows)), plain(x(n_rows)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x(n_rows)), model(x(n_rows)), rtol=0, atol=0)
        with peft.disabled(model), peft.disabled(plain):
            assert torch.equal(model(x(n_rows)), plain(x(n_rows)))
    assert torch.equal(peft.unmerge(model)(x(n_rows)), plain(x(n_rows)))


@every_recipe
def test_a_hook_for_all_modules_is_called_as_often_as_unmerged(recipe):
    model, called = net(recipe), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        model(x())
        unmerged = list(called)
        called.clear()
        peft.merge(model)(x())
    finally:
        handle.remove()
    assert called == unmerged and model.map.base in called


@every_recipe
def test_a_weight_that_another_module_shares_stays_there_as_it_is(recipe):
    model = net(recipe)
    model.behind.weight = model.map.base.weight
    frozen, before = model.behind.weight.detach().clone(), model(x())
    torch.testing.assert_close(peft.merge(model)(x()), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.behind.weight, frozen)
    with pytest.raises(ValueError, match=r"the weight of map cannot be written to: it is tied"):
        peft.merged_copy(model)


@every_recipe
def test_a_layer_that_stands_in_two_places_computes_in_each_what_it_did(recipe):
    torch.manual_seed(0)
    model = Net()
    model.behind = nn.ModuleDict({"map": model.map})
    peft.attach(model, recipe)
    with torch.no_grad():
        for tensor in peft.trainable_parameters(model).values():
            tensor.add_(torch.randn(tensor.shape))
    layers = model.map, model.behind["map"]
    before = [layer(x()) for layer in layers]
    peft.merge(model)
    for layer, expected in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x()), expected, rtol=1e-5, atol=1e-5)
    plain = peft.merged_copy(model)
    for layer, expected in zip((plain.map, plain.behind["map"]), before, strict=True):
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer(x()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "nothing"])
def test_a_plain_copy_of_what_is_not_plain_is_refused(change):
    model = net(RECIPES["lora"], CHANGES[change])
    with pytest.raises(ValueError, match="the weight of map cannot be written to"):
        peft.merged_copy(model)
    assert not model.map.merged


@every_recipe
@pytest.mark.parametrize("merged_in", [False, True], ids=["merged outside", "merged inside"])
def test_autocast_rounds_neither_the_update_nor_more_than_unmerged(recipe, merged_in):
    model, autocast = net(recipe), lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    plain, exact = model(x()), model.map.changed_weight().detach()
    with autocast():
        in_autocast, told = model(x()), model.map.as_linear()[0]
    with autocast() if merged_in else nullcontext():
        peft.merge(model)
    assert torch.equal(model.map.merged_weight, exact) and torch.equal(told, exact)
    torch.testing.assert_close(model(x()), plain, rtol=1e-5, atol=1e-5)
    with autocast():
        assert torch.equal(model(x()), in_autocast)


@every_recipe
@pytest.mark.parametrize("move", [nn.Module.double, lambda m: m.bfloat16().float(), lambda m: m.to(torch.float64)])
def test_what_is_merged_is_computed_anew_where_it_is_moved_to_and_so_is_what_is_off(recipe, move):
    model = net(recipe)
    apart = move(copy.deepcopy(model))
    dtype = next(apart.parameters()).dtype
    move(peft.merge(model))
    with torch.no_grad():
        torch.testing.assert_close(model(x(dtype=dtype)), apart(x(dtype=dtype)), rtol=1e-5, atol=1e-5)
        with peft.disabled(model), peft.disabled(apart):
            assert torch.equal(model(x(dtype=dtype)), apart(x(dtype=dtype)))
        merged, given = model.map.merged_weight, x(dtype=dtype)
        assert torch.equal(merged, peft.merge(copy.deepcopy(apart)).map.merged_weight)
        assert torch.equal(model.map(given), F.linear(given, merged, model.map.base.bias))
    assert torch.equal(peft.unmerge(model)(given), apart(given))


def as_pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_recipe
@pytest.mark.parametrize("copied", [copy.deepcopy, as_pickled], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_merged_model_is_merged_and_independent(recipe, copied):
    model = peft.merge(net(recipe))
    expected, twin = model(x()), copied(model)
    assert twin.map.merged
    torch.testing.assert_close(twin(x()), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        unmerged = peft.unmerge(twin)(x())
        twin.map.base.weight.zero_()
    assert torch.equal(model(x()), expected) and torch.equal(unmerged, peft.unmerge(model)(x()))


def by_an_optimizer(model):
    for parameter in model.map.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.map.parameters(), lr=0.1).step()


EDITS = {
    "in place": lambda model: [tensor.add_(0.3) for tensor in model.map.parameters()],
    "another parameter": lambda model: setattr(model.map.base, "weight", nn.Parameter(torch.ones(6, 6))),
    "an optimizer with gradients of before": by_an_optimizer,
}


@every_recipe
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_tensor_that_is_changed_while_it_is_merged_counts_at_once(recipe, edit):
    model = peft.merge(net(recipe))
    with torch.no_grad():
        edit(model)
        changed, told, twin = model(x()), model.map.as_linear()[0], peft.merged_copy(model)
        assert torch.equal(told, model.map.changed_weight())
        torch.testing.assert_close(twin(x()), changed, rtol=1e-5, atol=1e-5)
        assert torch.equal(peft.unmerge(model)(x()), changed)


@every_recipe
def test_what_is_merged_in_inference_mode_works_outside_of_it(recipe):
    model, given = net(recipe), x().requires_grad_()
    expected = torch.autograd.grad(model(given).sum(), given)[0]
    with torch.inference_mode():
        peft.merge(model)
    torch.testing.assert_close(torch.autograd.grad(model(given).sum(), given)[0], expected, rtol=1e-4, atol=1e-5)


@every_recipe
def test_the_modules_own_state_dict_is_that_of_the_unmerged_model(recipe):
    model = net(recipe)
    state, outputs = copy.deepcopy(model.state_dict()), model(x())
    merged = peft.merge(model).state_dict()
    assert merged.keys() == state.keys() and all(torch.equal(merged[name], state[name]) for name in state)
    twin = peft.attach(Net().eval(), recipe, seed=5)
    twin.load_state_dict(merged)
    assert torch.equal(twin(x()), outputs)


@every_recipe
@pytest.mark.parametrize("assign", [False, True])
def test_what_is_loaded_into_a_merged_model_counts_at_once(recipe, assign):
    other = net(recipe)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.add_(torch.randn(tensor.shape))
    model = peft.merge(net(recipe))
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert model.map.merged
    torch.testing.assert_close(model(x()), other(x()), rtol=1e-5, atol=1e-5)
    assert torch.equal(peft.unmerge(model)(x()), other(x()))
    peft.merge(model)
    model.map.load_state_dict(net(recipe).map.state_dict())  # and into a part of it
    torch.testing.assert_close(model.map(x()), net(recipe).map(x()), rtol=1e-5, atol=1e-5)


@every_recipe
def test_the_methods_own_load_into_a_merged_model_is_refused(recipe):
    model = peft.merge(net(recipe))
    with pytest.raises(ValueError, match=r"unmerge\(model\) first"):
        peft.load_state_dict(model, peft.state_dict(model))


@every_recipe
@pytest.mark.parametrize("where", ["plain", "hooked", "autocast"])
@pytest.mark.parametrize("learns", ["the update", "W0"])
def test_a_gradient_of_what_is_merged_is_refused_and_one_of_the_input_is_right(recipe, where, learns):
    model = net(recipe, CHANGES["a hook"] if where == "hooked" else CHANGES["nothing"])
    if learns == "W0":
        model.requires_grad_(False).map.base.weight.requires_grad_()
    context = torch.autocast("cpu", dtype=torch.bfloat16) if where == "autocast" else nullcontext()
    given = x().requires_grad_()
    with context:
        expected = torch.autograd.grad(model(given).float().square().sum(), given)[0]
        out = peft.merge(model)(given).float().square().sum()
    torch.testing.assert_close(torch.autograd.grad(out, given, retain_graph=True)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"unmerge\(model\) first, or train merged_copy"):
        out.backward()


def test_frozen_factors_let_something_beside_them_be_trained_while_merged():
    model = peft.merge(net(RECIPES["lora"]))
    model.map.requires_grad_(False)
    model.behind.requires_grad_()
    model(x()).sum().backward()
    assert model.behind.weight.grad.norm() > 0


@every_recipe
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_torch_func_differentiates_by_the_tensors_that_it_hands_in(recipe, merged):
    """Per example, and in forward mode: as reverse mode of a model that holds them."""
    model, other = net(recipe), net(recipe)
    if merged:
        peft.merge(model)
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.mul_(1.5)
    handed = {name: tensor.detach() for name, tensor in other.named_parameters()}

    def loss(tensors, rows):
        return torch.func.functional_call(model, tensors, (rows,)).square().sum()

    def by_hand(row):
        names, tensors = zip(*((name, p) for name, p in other.named_parameters() if p.requires_grad), strict=True)
        return dict(zip(names, torch.autograd.grad(other(row).square().sum(), tensors), strict=True))

    torch.testing.assert_close(torch.func.functional_call(model, handed, (x(),)), other(x()))
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(handed, x()[:, None])
    for number, row in enumerate(x()[:, None]):
        for name, expected in by_hand(row).items():
            torch.testing.assert_close(found[name][number], expected, rtol=1e-4, atol=1e-5)
    tangents = {name: tensor.cos() for name, tensor in handed.items()}
    for many in (x()[:2], x()):
        moved = torch.func.jvp(lambda tensors, many=many: loss(tensors, many), (handed,), (tangents,))[1]
        by_reverse = torch.func.grad(loss)(handed, many)
        expected = sum((by_reverse[name] * tangents[name]).sum() for name in handed)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-3)


class Doubled(torch.Tensor):
    """A weight that only `linear` knows, as a quantised one."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            args = [2 * a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("operation", [peft.merge, peft.merged_copy])
def test_a_weight_of_a_foreign_type_is_refused(operation):
    def doubled(base):
        base.weight = nn.Parameter(base.weight.detach().as_subclass(Doubled), requires_grad=False)

    model = net(RECIPES["lora"], doubled)
    before = model(x())
    with pytest.raises(ValueError, match="weight of map"):
        operation(model)
    assert not model.map.merged and torch.equal(model(x()), before)


class Squared(peft.methods.lora.LoRALinear):
    def adapted(self, x):
        return super().adapted(x) ** 2


@pytest.mark.parametrize("operation", [peft.merge, peft.merged_copy])
def test_a_class_that_computes_something_of_its_own_is_not_merged_by_its_parents_weight(operation):
    model = net(RECIPES["lora"])
    model.map.__class__ = Squared
    with pytest.raises(ValueError, match="a Squared has no changed_weight"):
        operation(model)
    assert model.map.as_linear() is None and not model.map.merged


def test_a_merged_copy_has_no_wrapper_left_that_was_put_in_by_hand_either():
    model = net(RECIPES["lora"])
    by_hand = Net().eval()
    by_hand.load_state_dict(peft.detach(copy.deepcopy(model)).state_dict())
    by_hand.map = copy.deepcopy(model.map)
    del vars(by_hand.map)["peft_record"]
    plain = peft.merged_copy(by_hand)
    assert type(plain.map) is nn.Linear
    torch.testing.assert_close(plain(x()), model(x()))
