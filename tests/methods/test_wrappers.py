"""What every recipe and wrapper is promised: a name of its own, one order, no answers for another class."""

from dataclasses import dataclass

import pytest
import torch

import peft
from minitransformer.attention import Attention
from minitransformer.fast.stand_in import says
from peft import LoRA, Method, Wrapper
from peft.method import linear_map
from peft.methods.lora import LoRALinear
from peft.methods.prefix import PrefixAttention


@pytest.fixture
def registry():
    """The known methods, as they were afterwards."""
    known = dict(Method.registry)
    yield Method.registry
    Method.registry.clear()
    Method.registry.update(known)


class Doubled(Wrapper):
    order = 0

    def forward(self, x):
        return 2 * self.base(x) if self.enabled else self.base(x)


def doubling(name, module="a notebook"):
    """A new class of a method that doubles what every query map gives."""

    def sites(self, modules):
        return [name for name in modules if name.endswith("attention.query")]

    def wrap(self, name, module, model, generator):
        return Doubled(module)

    body = {"sites": sites, "wrap": wrap, "expected_parameters": lambda self, config: 0, "__module__": module}
    return dataclass(frozen=True)(type(name, (Method,), body))


def test_a_method_is_not_replaced_by_another_of_its_name(registry):
    before = registry["LoRA"]
    with pytest.raises(ValueError, match="a method LoRA already, in peft"):
        doubling("LoRA")
    assert registry["LoRA"] is before


def test_a_cell_that_runs_again_is_no_other_method(registry):
    doubling("Doubling")
    again = doubling("Doubling")
    assert Method.from_dict(again().as_dict()) == again()


@pytest.mark.parametrize("lora_first", [True, False])
def test_two_wrappers_of_one_order_are_refused_whichever_comes_first(registry, decoder, lora_first):
    model, recipes = decoder(), [LoRA(rank=2), doubling("Doubling")()]
    first, second = recipes if lora_first else reversed(recipes)
    before = list(peft.attach(model, first).modules())
    with pytest.raises(ValueError, match="have order 0"):
        peft.attach(model, second)
    assert list(model.modules()) == before and len(peft.attached(model)) == 1


def test_the_wrappers_of_the_two_orders_are_the_same_model(registry, decoder):
    outer = doubling("Doubling")()
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Doubled, "order", 1)
        for recipes in ([LoRA(rank=2), outer], [outer, LoRA(rank=2)]):
            model = decoder()
            for recipe in recipes:
                peft.attach(model, recipe)
            models.append(model)
    kinds = [[type(w).__name__ for w in peft.sites.sites_of(m)["blocks.0.attention.query"].wrappers] for m in models]
    assert kinds == [["Doubled", "LoRALinear"]] * 2
    tokens = torch.tensor([[3, 1, 4]])
    assert torch.equal(models[0](tokens), models[1](tokens))


class Squared(LoRALinear):
    def forward(self, x):
        return super().forward(x) ** 2


class SquaredAndSaysSo(Squared):
    def changed_weight(self):
        return self.base.weight


class Renamed(LoRALinear):
    """Computes what its parent computes."""


def test_a_class_answers_for_its_own_forward_only():
    base, recipe = torch.nn.Linear(4, 4), LoRA(rank=2)
    answers = [
        linear_map(kind(base, recipe, torch.Generator().manual_seed(0))) is not None
        for kind in (LoRALinear, Renamed, Squared, SquaredAndSaysSo)
    ]
    assert answers == [True, True, False, True]


def test_an_attention_wrapper_with_its_own_forward_does_not_inherit_answers(decoder):
    class Other(PrefixAttention):
        def forward(self, x, mask=None, context=None):
            return self.base(x, mask, context)

    attention = decoder().blocks[0].attention
    assert isinstance(attention, Attention)
    wrapper = Other(attention, peft.PrefixTuning(length=2), {"key": torch.zeros(2, 16), "value": torch.zeros(2, 16)})
    assert wrapper.as_attention() is None and not says(wrapper, "position_wise")


def test_names_of_the_readers_own_that_ours_also_use_mean_nothing(decoder):
    model = decoder()
    model.base = torch.nn.Linear(16, 16)
    model.blocks_of_mine = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(16, 16)])})
    names = set(dict(model.named_parameters()))
    peft.attach(model, LoRA(rank=2, layers=(1,)))
    tensors = peft.sites.named_tensors(model)
    assert names <= set(tensors) and "base.weight" in tensors
    assert all(name.startswith("blocks.1.") for name in peft.trainable_parameters(model))


class TwoStacks(torch.nn.Module):
    def __init__(self, left, right):
        super().__init__()
        self.left, self.right = left, right


@pytest.mark.parametrize("kind", [LoRA, peft.IA3, peft.BitFit, peft.BottleneckAdapter, peft.VeRA, peft.PrefixTuning])
def test_the_blocks_of_every_stack_are_counted_from_zero(decoder, kind):
    options = {"init": "normal"} if kind is peft.PrefixTuning else {}
    model = peft.attach(TwoStacks(decoder(), decoder(seed=1)), kind(layers=(1,), **options))
    blocks = {".".join(name.split(".")[:3]) for name in peft.trainable_parameters(model)}
    assert blocks == {"left.blocks.1", "right.blocks.1"}
    with pytest.raises(ValueError, match="names block 2; there are 0, 1"):
        peft.attach(TwoStacks(decoder(), decoder()), kind(layers=(2,), **options))


def test_detaching_finds_a_tensor_that_was_replaced(decoder):
    model = decoder()
    model.embedding.position.weight.requires_grad_(False)
    peft.attach(model, LoRA(rank=2))
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    peft.detach(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["embedding.position.weight"]


@pytest.mark.parametrize("recipe", [LoRA(rank=2), peft.DoRA(rank=2), peft.VeRA(rank=4), peft.BitFit()], ids=str)
@pytest.mark.parametrize("prefix_first", [True, False])
def test_a_prefix_of_hidden_states_beside_another_method_on_a_model_in_half_precision(decoder, recipe, prefix_first):
    recipes = [peft.PrefixTuning(length=2, at="hidden"), recipe]
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        model = decoder().bfloat16().to(dtype)
        for number, method in enumerate(recipes if prefix_first else reversed(recipes)):
            peft.attach(model, method, seed=number)
        outputs.append(model(torch.tensor([[3, 1, 4]])).float())
    torch.testing.assert_close(*outputs, rtol=0.1, atol=0.02)


def test_a_factor_that_the_recipe_freezes_stays_frozen_in_a_block_that_is_trained_whole(decoder):
    model = peft.attach(decoder(), LoRA(rank=2, train=("B",)), train_also=("blocks.1",))
    assert not model.blocks[1].attention.query.A.requires_grad
    assert model.blocks[1].attention.query.B.requires_grad and model.blocks[1].norm_attention.weight.requires_grad
