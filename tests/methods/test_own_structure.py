"""Methods go by what a module is, not by what it is called, call what they wrap, and hold plain Python values."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from reference.method_cases import RECIPES, batch, each_of, outputs, train_a_little
from torch import nn

import peft
from minitransformer import Transformer
from minitransformer.attention import Attention
from minitransformer.block import Block
from minitransformer.embedding import Embedding
from minitransformer.heads import SequenceClassifier
from peft import IA3, BitFit, BottleneckAdapter, LNTuning, LoRA, Method, PrefixTuning, PromptTuning, VeRA, Wrapper

every_recipe = each_of("recipe", RECIPES)
NAMES_OF_OURS = ("query", "key", "up", "down", "norm", "embedding", "blocks", "attention", "base", "enabled_", "token")


class Around(nn.Module):
    """A reader's model, which uses our names for parts of its own; none of them takes part in the pass."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        for name in NAMES_OF_OURS:
            setattr(self, name, nn.LayerNorm(16))

    def hidden(self, tokens, mask=None):
        return self.transformer.hidden(tokens, mask)


@every_recipe
def test_parts_of_the_readers_own_with_names_of_ours_are_left_alone(decoder, recipe):
    alone, around = peft.attach(decoder(), recipe), peft.attach(Around(decoder()), recipe)
    names = {f"transformer.{name}" for name in peft.trainable_parameters(alone)}
    assert set(peft.trainable_parameters(around)) == names
    assert torch.equal(outputs(alone), outputs(around))


@every_recipe
def test_parts_of_the_readers_own_inside_a_layer_are_left_alone(decoder, recipe):
    """`query` in a feed-forward network, `up` in an attention layer."""
    alone, model = peft.attach(decoder(), recipe), decoder()
    for block in model.blocks:
        block.feedforward.query = block.attention.up = nn.Identity()
        block.feedforward.hidden = block.attention.room = nn.Identity()
    peft.attach(model, recipe)
    assert set(peft.trainable_parameters(model)) == set(peft.trainable_parameters(alone))
    assert torch.equal(outputs(alone), outputs(model))


def test_a_norm_beside_an_embedding_of_the_readers_own_is_no_norm_of_the_transformer(decoder):
    model = Around(decoder())
    model.my_embedding, model.my_norm = Embedding(decoder().config), nn.LayerNorm(16)
    model.beside = nn.ModuleDict({"embedding": Embedding(decoder().config), "norm": nn.LayerNorm(16)})
    found = peft.state_dict(peft.attach(peft.attach(model, BitFit()), LNTuning()))
    assert all(name.startswith("transformer.") for name in found)


def test_the_norms_outside_of_the_blocks_are_found_whatever_the_model_is_called(decoder):
    for build in (lambda t: SequenceClassifier(t, 2), nn.Sequential, lambda t: nn.ModuleDict({"embedding": t})):
        model = build(decoder())
        found = peft.state_dict(peft.attach(peft.attach(model, BitFit()), LNTuning()))
        for tensor in ("delta_bias", "delta_gain"):
            assert len([name for name in found if name.endswith(f"norm.{tensor}")]) == 1


@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_norm_of_the_readers_own_has_its_gain_tuned_if_it_has_one(decoder, eps):
    model = decoder()
    model.blocks[0].norm_attention = nn.RMSNorm(16, eps=eps)
    model.blocks[0].norm_feedforward = nn.LayerNorm(16, elementwise_affine=False)
    model.blocks[1].norm_attention = nn.Identity()
    peft.attach(model, LNTuning())
    assert {*peft.state_dict(model)} == {
        f"{name}.delta_gain" for name in ("blocks.0.norm_attention", "blocks.1.norm_feedforward", "norm")
    }
    with torch.no_grad():
        model.blocks[0].norm_attention.delta_gain.fill_(1.5)
    x = torch.randn(2, 3, 16)
    expected = 2.5 * nn.RMSNorm(16, eps=eps)(x)
    torch.testing.assert_close(model.blocks[0].norm_attention(x), expected, rtol=1e-5, atol=1e-6)


def test_a_key_of_the_readers_own_in_a_block_has_a_bias_that_learns(decoder):
    """Only the key layer of an attention layer has a bias without gradient."""
    model = decoder()
    model.blocks[0].other = nn.ModuleDict({"attention": nn.ModuleDict({"key": nn.Linear(16, 16)})})
    found = peft.state_dict(peft.attach(model, BitFit()))
    assert "blocks.0.other.attention.key.delta_bias" in found and "blocks.0.attention.key.delta_bias" not in found


def test_an_adapter_round_a_layer_of_unknown_width_is_refused(decoder):
    model = decoder()
    model.blocks[0].feedforward = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="feedforward is a Sequential"):
        peft.attach(model, BottleneckAdapter())


@pytest.mark.parametrize("recipe", [IA3(), BottleneckAdapter(placement="inside_ffn")], ids=str)
def test_a_block_without_the_layers_that_a_method_enters_is_refused_by_name(decoder, recipe):
    model = decoder()
    model.blocks[1].feedforward = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"there is no blocks\.1\.feedforward\.down .*layers="):
        peft.attach(model, recipe)
    peft.attach(model, dataclasses.replace(recipe, layers=(0,)))  # the cure
    assert {name.split(".")[1] for name in peft.trainable_parameters(model)} == {"0"}


# Hooks


def watched(model):
    """The classes of the frozen modules that a pass calls."""
    seen, hooks = {}, []
    for name, site in peft.sites.sites_of(model).items():
        if not isinstance(site.module, nn.ModuleList | nn.Identity | Transformer):
            note = seen.setdefault(name, [])
            hooks.append(site.module.register_forward_hook(lambda _, x, y, note=note: note.append(y.shape)))
    model(*batch())
    for hook in hooks:
        hook.remove()
    return {name: shapes for name, shapes in seen.items() if shapes}


@every_recipe
def test_a_pass_calls_every_frozen_module_so_that_its_hooks_run(tiny, recipe):
    plain, found = watched(tiny()), watched(peft.attach(tiny(), recipe))
    for name, shapes in plain.items():
        assert shapes[0][0] == 3 and found[name], name
        assert all(len(shape) == len(shapes[0]) for shape in found[name] if name != "embedding.position"), name


@every_recipe
def test_what_a_hook_changes_reaches_the_output(decoder, recipe):
    model = train_a_little(peft.attach(decoder(), recipe))
    before = outputs(model)
    for name, site in peft.sites.sites_of(model).items():
        if not name or name == "head" or isinstance(site.module, nn.ModuleList | nn.Identity):
            continue
        hook = site.module.register_forward_hook(lambda _, x, y: y * torch.linspace(0.5, 1.5, y.shape[-1]))
        changed = not torch.equal(outputs(model), before)
        hook.remove()
        assert changed, name
    assert torch.equal(outputs(model), before)


def test_a_hook_on_the_key_layer_sees_a_prefix_of_hidden_states_as_it_sees_the_input(decoder):
    """The prefix joins what W_k reads, so whoever changes what W_k gives changes the prefix's keys as well."""
    model = peft.attach(decoder(), PrefixTuning(length=3, at="hidden"))
    layer, (tokens, _) = model.blocks[0].attention, batch()
    by_hand = peft.attach(decoder(), PrefixTuning(length=3, at="hidden"))
    with torch.no_grad():
        by_hand.blocks[0].attention.base.key.weight.mul_(2)
        by_hand.blocks[0].attention.base.key.bias.mul_(2)
    layer.base.key.register_forward_hook(lambda _, inputs, out: 2 * out)
    torch.testing.assert_close(outputs(model, tokens), outputs(by_hand, tokens), rtol=1e-5, atol=1e-5)


class Louder(Wrapper):
    """A reader's wrapper round any module; it stands outside of all of ours or inside, as `order` says."""

    def __init__(self, base, order):
        super().__init__(base)
        self.order = order
        self.gain = nn.Parameter(torch.ones(()))

    token = property(lambda self: self.base.token)  # what a Transformer reads of its embedding
    room = property(lambda self: self.base.room)

    def forward(self, *inputs):
        y = self.base(*inputs)
        return (self.gain * y).to(y.dtype) if self.enabled else y


@dataclass(frozen=True)
class Loud(Method):
    where: str = "embedding"
    order: float = 5

    def sites(self, modules):
        kind = {"embedding": Embedding, "attention": Attention, "block": Block}[self.where]
        return [name for name, module in modules.items() if isinstance(module, kind)]

    def wrap(self, name, module, model, generator):
        return Louder(module, self.order)

    def expected_parameters(self, config):
        return 1 if self.where == "embedding" else config.n_layers


@pytest.mark.slow
@every_recipe
@pytest.mark.parametrize(
    "where, order",
    [("embedding", -1), ("attention", 5)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("embedding", 5), ("attention", -1), ("block", 5))],
)
def test_a_wrapper_of_the_readers_own_beside_every_recipe_in_both_orders(decoder, recipe, where, order):
    own, models = Loud(where, order), []
    for recipes in ([recipe, own], [own, recipe]):
        model = decoder().bfloat16()
        for method in recipes:
            peft.attach(model, method, seed=4)
        with torch.no_grad():
            for _, p in sorted(peft.trainable_parameters(model).items()):
                p.add_(0.25)
        models.append(model)
    first, second = (peft.state_dict(model) for model in models)
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    tokens, mask = batch()
    for model in models:
        model(tokens, mask)[mask].float().logsumexp(-1).sum().backward()
    assert torch.equal(outputs(models[0]), outputs(models[1]))
    for name, p in peft.trainable_parameters(models[0]).items():
        assert torch.equal(p.grad, peft.trainable_parameters(models[1])[name].grad)
    with peft.disabled(models[0]):
        assert torch.equal(outputs(models[0]), outputs(decoder().bfloat16()))


# Starting from real words


@pytest.mark.parametrize("first", [0, 1])
def test_two_prefixes_in_different_layers_start_alike_in_both_orders(decoder, first):
    recipes = [PrefixTuning(length=2, layers=(layer,)) for layer in (0, 1)]
    both = [decoder(), decoder()]
    for model, order in zip(both, (recipes, recipes[::-1]), strict=True):
        for recipe in order:
            peft.attach(model, recipe, seed=first)
    starts = [peft.state_dict(model) for model in both]
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_what_is_attached_already_and_trained_does_not_move_the_start(decoder):
    for name in ("lora all", "houlsby", "prompt", "bitfit"):
        model = train_a_little(peft.attach(decoder().train(), RECIPES[name]))
        peft.attach(model, PrefixTuning(length=3, at="kv"), seed=1)
        alone = peft.state_dict(peft.attach(decoder(), PrefixTuning(length=3, at="kv"), seed=1))
        assert all(torch.equal(t, alone[name]) for name, t in peft.state_dict(model).items() if name in alone)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("recipe", [PrefixTuning(length=3), PromptTuning(length=3)], ids=["prefix", "prompt"])
def test_a_start_that_fails_leaves_the_model_as_it_was(decoder, recipe):
    model = decoder().train()
    model.blocks[0].eval()

    def fail(*_):
        raise RuntimeError("stop")

    broken = [
        model.blocks[1].norm_attention.register_forward_hook(fail),
        model.embedding.token.register_forward_hook(fail),
    ]
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"):
        peft.attach(model, recipe)
    assert not peft.attached(model) and all(p.requires_grad for p in model.parameters())
    assert hooks == {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()
    }
    for hook in broken:
        hook.remove()


def test_a_vocabulary_smaller_than_the_prefix_gives_words_twice(decoder):
    for recipe in (PrefixTuning(length=9), PromptTuning(length=9)):
        model = peft.attach(decoder(vocab_size=3), recipe)
        assert all(len(tensor) == 9 and torch.isfinite(tensor).all() for tensor in peft.state_dict(model).values())


@every_recipe
def test_a_seed_gives_the_same_start_whatever_the_default_precision_is(decoder, recipe):
    model, expected = decoder(), peft.state_dict(peft.attach(decoder(), recipe, seed=2))
    try:
        torch.set_default_dtype(torch.float64)
        peft.attach(model, recipe, seed=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in peft.state_dict(model).items())


# Plain values


@pytest.mark.parametrize(
    "given, plain",
    [
        (lambda: LoRA(rank=np.int64(4), alpha=np.float64(16.0), layers=np.array([0, 1])), LoRA(4, 16.0, layers=(0, 1))),
        (lambda: LoRA(rank=torch.tensor(4), alpha=torch.tensor(2.0)), LoRA(rank=4, alpha=2.0)),
        (lambda: PrefixTuning(length=np.int32(2), gated=np.bool_(True), init_tokens=np.arange(2)),
         PrefixTuning(length=2, gated=True, init_tokens=(0, 1))),
        (lambda: PromptTuning(length=2, init_tokens=torch.arange(2)), PromptTuning(length=2, init_tokens=(0, 1))),
        (lambda: BottleneckAdapter(bottleneck=np.int8(3), scale=np.float32(0.5)), BottleneckAdapter(3, scale=0.5)),
        (lambda: IA3(layers=range(2)), IA3(layers=(0, 1))),
        (lambda: VeRA(rank=np.int64(3)), VeRA(rank=3)),
    ],
)  # fmt: skip
def test_numpy_and_torch_numbers_in_a_recipe_become_plain_ones(unchecked, decoder, tmp_path, given, plain):
    recipe = given()
    assert repr(recipe) == repr(plain) and str(recipe) == str(plain) and hash(recipe) == hash(plain)
    model = peft.attach(decoder(), recipe)
    peft.save(model, tmp_path / "file")
    assert peft.attached(peft.load(decoder(), tmp_path / "file"))[0].method == recipe


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (LoRA, {"rank": 2.5}, "rank must be int"),
        (LoRA, {"rank": True}, "rank must be int"),
        (LoRA, {"alpha": float("inf")}, "alpha must be .* finite"),
        (PrefixTuning, {"gated": "no"}, "gated must be bool"),
        (PrefixTuning, {"length": "8"}, "length must be int"),
        (PrefixTuning, {"length": 1, "init_tokens": (1.5,)}, "init_tokens must be tuple"),
        (PrefixTuning, {"init": "normal", "init_std": float("inf")}, "init_std must be .* finite"),
        (PrefixTuning, {"init_std": 0.5}, "init_std would be ignored"),
        (PromptTuning, {"init_std": 0.5}, "init_std would be ignored"),
        (PrefixTuning, {"reparameterize": 4, "init": "normal"}, "init.* would be ignored"),
        (PrefixTuning, {"reparameterize": 4, "init_std": 0.1}, "init.* would be ignored"),
        (PrefixTuning, {"reparameterize": 4, "length": 1, "init_tokens": (1,)}, "init.* would be ignored"),
        (BitFit, {"layers": "01"}, "layers must be tuple"),
        (BottleneckAdapter, {"bottleneck": np.float64(4.0)}, "bottleneck must be int"),
        (BottleneckAdapter, {"scale": None}, "scale must be"),
    ],
)
def test_what_a_recipe_cannot_use_is_refused(unchecked, kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
