"""One asked position a row: state and gradients are those when every position is computed, for every method."""

import pytest
import torch
from reference.method_cases import SETS, batch, each_of, train_a_little

import peft
from minitransformer.attention import Attention, recorded
from minitransformer.cache import KVCache
from minitransformer.feedforward import FeedForward


def asked_positions(mask):
    """The last real token of each row."""
    return (mask * torch.arange(mask.shape[1])).argmax(dim=1)


def hidden_and_gradients(model, tokens, mask, whole):
    asked = asked_positions(torch.ones_like(tokens) if mask is None else mask)
    if whole:
        hidden = model.hidden(tokens, mask)[torch.arange(len(tokens)), asked]
    else:
        (hidden,) = model.hidden(tokens, mask, asked=asked).unbind(dim=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    return hidden, torch.autograd.grad(hidden.square().sum(), trained, allow_unused=True)


def check(model, tokens, mask):
    (expected, theirs), (got, ours) = (hidden_and_gradients(model, tokens, mask, whole) for whole in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@each_of("name", {name: name for name in SETS})
@pytest.mark.parametrize("padded", [True, False])
def test_every_method_gives_the_same_at_the_asked_position(decoder, name, padded):
    model = decoder().double()
    for number, recipe in enumerate(SETS[name]):
        peft.attach(model, recipe, seed=number)
    tokens, mask = batch()
    check(train_a_little(model), tokens, mask if padded else None)


@pytest.mark.parametrize(
    "changes", [{"norm": "post"}, {"causal": False}, {"gradient_checkpointing": True}, {"n_layers": 1}]
)
def test_every_shape_of_model_gives_the_same(decoder, changes):
    check(decoder(**changes).double().train(), *batch())


@pytest.mark.parametrize("implementation", ["fused", "written_out"])
def test_weights_for_a_picture_are_those_of_all_positions(decoder, implementation):
    """Recording takes the plain form, so the pictures are those of a whole pass."""
    model, (tokens, mask) = decoder(attention=implementation), batch()
    with recorded(model) as weights:
        model.hidden(tokens, mask, asked=asked_positions(mask))
    assert all(torch.equal(*pair) for pair in zip(weights, model.attention_weights(tokens, mask), strict=True))


def test_where_it_may_the_last_block_computes_one_position_only(decoder):
    model, (tokens, mask), shapes = decoder(), batch(), []
    forward = FeedForward.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeedForward, "forward", lambda own, x: shapes.append(x.shape[1]) or forward(own, x))
        model.hidden(tokens, mask, asked=asked_positions(mask))
    assert shapes == [tokens.shape[1], 1]


class Steered(peft.Wrapper):
    """Works on what a block gives, all positions of it."""

    def forward(self, x, *rest):
        return self.base(x, *rest).cumsum(dim=1)


def test_what_wraps_a_whole_block_sees_every_position(decoder):
    model, (tokens, mask) = decoder().double(), batch()
    model.blocks[-1] = Steered(model.blocks[-1])
    check(model, tokens, mask)


class Shifted(Attention):
    def forward(self, x, *rest):
        return super().forward(x, *rest) + x.cumsum(dim=1)


@pytest.mark.parametrize("recipe", [None, peft.PrefixTuning(length=3), peft.BottleneckAdapter(bottleneck=2)], ids=str)
def test_attention_of_another_class_sees_every_position(decoder, recipe):
    model = decoder().double()
    for block in model.blocks:
        block.attention.__class__ = Shifted
    if recipe is not None:
        train_a_little(peft.attach(model, recipe))
    check(model, *batch())


def test_behind_a_cache_too(decoder):
    model, (tokens, _) = decoder().double(), batch()
    cache = KVCache(2)
    with torch.no_grad():
        model.hidden(tokens[:, :3], cache=cache)
        asked = torch.full((len(tokens),), tokens.shape[1] - 4)
        got = model.hidden(tokens[:, 3:], cache=cache, asked=asked)
        torch.testing.assert_close(got[:, 0], model.hidden(tokens)[:, -1])
