"""Generation's fast form against the plain one; and where it must not be used."""

import copy

import pytest
import torch
from reference.random_weights import randomize
from reference.tiny_models import LLAMA
from torch import nn

from minitransformer import Transformer, TransformerConfig, generation
from minitransformer.cache import KVCache
from minitransformer.fast.generation import COPIED, FEW, fast_steps, joined

CONFIG = {"vocab_size": 23, "max_len": 40, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24}
TOKENS = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9], [0, 0, 0, 2]])
REAL = torch.arange(4) >= torch.tensor([0, 2, 3])[:, None]
WORDS = torch.randint(23, (5, 3, 1), generator=torch.Generator().manual_seed(0))


def decoder(**changes):
    return randomize(Transformer(TransformerConfig(**(CONFIG | changes))), std=0.5).double().eval()


def steps(model, tokens=TOKENS, real=None, more=5):
    """The fast form behind `tokens`, or None; and a cache that has read the same, for the plain form."""
    caches = [KVCache(model.config.n_layers) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model.hidden(tokens, real, cache=cache)
        return fast_steps(model, caches[0], more), caches[1]


@torch.no_grad()
def plainly(model, words, cache, real):
    newest = None if real is None else torch.ones_like(words, dtype=torch.bool)
    return model.lm_head(model.hidden(words, newest, cache=cache)[:, -1])


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left padding"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "post"},
        {"activation": "relu"},
        {"activation": "gelu_tanh", "logit_scale": 0.3},
        {"n_segments": 2, "embedding_norm": True},
        {"lm_head": "bert"},
        {"n_kv_heads": 2, "bias": "query+key+value"},
        {"head_dim": 6},
        {"position": "rotary", "rope_theta": 100.0},
        {"norm_type": "rms"},
        {"gated": True, "bias": "gate+up+down"},
        LLAMA,
        LLAMA | {"lm_head": "untied"},
    ],
    ids=str,
)
def test_each_step_gives_the_plain_forms_logits(changes, real):
    model = decoder(**changes)
    fast, cache = steps(model, real=real)
    for words in WORDS:
        torch.testing.assert_close(fast(words), plainly(model, words, cache, real), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, LLAMA, LLAMA | {"bias": "query+key+value+output"}], ids=str)
@pytest.mark.parametrize("copied", [0, COPIED], ids=["each weight where it lies", "joined"])
def test_many_rows_give_the_same_and_the_few_that_go_on(monkeypatch, changes, copied):
    monkeypatch.setattr("minitransformer.fast.generation.COPIED", copied)
    model = decoder(**changes)
    words = torch.randint(23, (6, FEW + 1, 1), generator=torch.Generator().manual_seed(1))
    fast, cache = steps(model, tokens=words[:4, :, 0].T)
    on = torch.tensor([0, 5])
    for rows in (slice(None), on):
        if rows is on:
            for part in (fast.cache, fast, cache):
                part.keep(on)
        for newest in words[4:, rows]:
            torch.testing.assert_close(fast(newest), plainly(model, newest, cache, None), rtol=1e-11, atol=1e-11)


def test_large_weights_are_not_copied(monkeypatch):
    monkeypatch.setattr("minitransformer.fast.generation.COPIED", 0)
    model = decoder()
    fast, cache = steps(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0.9 if "norm" not in name else 1.0)  # what is no copy follows
    torch.testing.assert_close(fast(WORDS[0]), plainly(model, WORDS[0], cache, None), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 3}], ids=str)
@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left padding"])
def test_generation_is_fast_and_finds_the_same_words(monkeypatch, options, real):
    model = decoder()
    expected = model.generate(TOKENS, 20, padding_mask=real, use_cache=False, **options)
    taken = []
    monkeypatch.setattr(generation, "fast_steps", lambda *a: taken.append(fast_steps(*a)) or taken[-1])
    assert torch.equal(model.generate(TOKENS, 20, padding_mask=real, **options), expected)
    assert len(taken) == 1 and taken[0] is not None
    assert len(set(expected[0].tolist())) > 2


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}], ids=str)
def test_the_words_can_be_trained_on_afterwards(options):
    """The steps run in inference mode, whose tensors autograd refuses: none of them comes out."""
    model = decoder()
    assert steps(model, more=7)[0] is not None
    tokens = model.generate(TOKENS, 8, **options)
    assert not tokens.is_inference()
    model(tokens).sum().backward()


def hooked(model):
    model.blocks[0].norm_attention.register_forward_hook(lambda *_: None)


def hooked_before(model):
    model.blocks[1].feedforward.register_forward_pre_hook(lambda *_: None)


def hooked_behind(model):
    model.head.register_full_backward_hook(lambda *_: None)


def written_out(model):
    for block in model.blocks:
        block.attention.implementation = "written_out"
    model.config = TransformerConfig(**CONFIG, attention="written_out")


class Louder(Transformer):
    def lm_head(self, hidden):
        return super().lm_head(hidden).roll(1, dims=-1)


class Skipped(nn.Module):
    def forward(self, x, *_):
        return x


class Doubled(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *arguments):
        return 2 * self.base(*arguments)


def doubled(*path):
    def change(model):
        *parents, last = path
        owner = model.blocks[1]
        for name in parents:
            owner = getattr(owner, name)
        setattr(owner, last, Doubled(getattr(owner, last)))

    return change


UNKNOWN = {
    "a hook": hooked,
    "a hook in front": hooked_before,
    "a hook for the gradient": hooked_behind,
    "a subclass": lambda model: setattr(model, "__class__", Louder),
    "a block that is left out": lambda model: model.blocks.__setitem__(0, Skipped()),
    "written-out attention": written_out,
    "another attention": doubled("attention"),
    "another feed-forward network": doubled("feedforward"),
    "another query map": doubled("attention", "query"),
    "another output map": doubled("attention", "output"),
    "another map of the FFN": doubled("feedforward", "down"),
    "another block": lambda model: model.blocks.__setitem__(0, Doubled(model.blocks[0])),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_it_does_not_know_is_left_to_the_plain_form(case):
    model = decoder()
    UNKNOWN[case](model)
    assert steps(model)[0] is None and len(steps(model)[1].layers) == CONFIG["n_layers"]
    expected = model.generate(TOKENS, 5, use_cache=False)
    assert torch.equal(model.generate(TOKENS, 5), expected)


def test_words_of_a_head_that_is_not_the_vocabularys_own_are_checked():
    unknown = torch.full((3, 1), CONFIG["vocab_size"])
    with pytest.raises(IndexError):
        steps(decoder())[0](unknown)
    with pytest.raises(ValueError, match="the vocabulary has 23 words"):
        steps(decoder(lm_head="bert"))[0](unknown)


def test_a_few_words_are_not_worth_a_new_layout():
    assert steps(decoder(), more=3)[0] is None and steps(decoder(), more=4)[0] is not None


def test_a_hook_for_all_modules_is_not_bypassed():
    model = decoder()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert steps(model)[0] is None
    finally:
        handle.remove()
    assert steps(model)[0] is not None


def test_the_cache_is_taken_over_and_not_kept_beside():
    model, cache = decoder(), KVCache(CONFIG["n_layers"])
    with torch.no_grad():
        model.hidden(TOKENS, cache=cache)
        fast = fast_steps(model, cache, 5)
    assert not cache.layers and cache.n_keys == cache.n_tokens == 4
    fast(WORDS[0])
    assert cache.n_keys == cache.n_tokens == 5


class RowByRow(Doubled):
    """A norm that tells rows and positions apart."""

    def forward(self, x):
        B, _, _ = x.shape
        return torch.arange(1, B + 1)[:, None, None] * self.base(x)


def test_a_norm_that_is_wrapped_is_called():
    model = decoder()
    model.blocks[0].norm_attention = RowByRow(model.blocks[0].norm_attention)
    model.blocks[1].norm_feedforward = RowByRow(model.blocks[1].norm_feedforward)
    model.norm = RowByRow(model.norm)
    fast, cache = steps(model)
    torch.testing.assert_close(fast(WORDS[0]), plainly(model, WORDS[0], cache, None))


def test_the_plain_form_is_used_under_autocast():
    model = decoder().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert steps(model)[0] is None


@pytest.mark.parametrize("n_rows", [FEW, FEW + 1])
def test_layers_without_a_bias_stand_beside_layers_with_one(n_rows):
    torch.manual_seed(0)
    one, other, x = nn.Linear(3, 4), nn.Linear(3, 2, bias=False), torch.randn(n_rows, 3)
    both = joined((one.weight, one.bias), (other.weight, None), more=9)
    torch.testing.assert_close(both(x), torch.cat([one(x), other(x)], dim=1))


def test_large_weights_are_read_where_they_lie_unless_enough_steps_pay_for_a_copy(monkeypatch):
    monkeypatch.setattr("minitransformer.fast.generation.COPIED", 2)
    torch.manual_seed(0)
    one, other, x = nn.Linear(3, 4), nn.Linear(3, 2), torch.randn(5, 3)
    for more, is_copied in ((8, False), (9, True)):  # 18 numbers, which one product less pays for in nine steps
        both = joined((one.weight, one.bias), (other.weight, other.bias), more=more)
        before = both(x)
        torch.testing.assert_close(before, torch.cat([one(x), other(x)], dim=1))
        with torch.no_grad():
            other.weight.add_(1.0)
        assert torch.equal(both(x), before) == is_copied


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left padding"])
def test_rows_that_go_on_keep_their_own_positions(real):
    model = decoder(**LLAMA)
    fast, cache = steps(model, real=real)
    on = torch.tensor([0, 2])
    for words in WORDS[:2]:
        fast(words), plainly(model, words, cache, real)
    for part in (fast.cache, fast, cache):
        part.keep(on)
    for words in WORDS[2:, on]:
        expected = plainly(model, words, cache, None if real is None else real[on])
        torch.testing.assert_close(fast(words), expected, rtol=1e-11, atol=1e-11)


def test_in_16_bits_it_is_as_near_to_the_exact_scores_as_the_plain_form():
    short = decoder(**LLAMA).bfloat16()
    exact = copy.deepcopy(short).double()
    (fast, cache), (_, exact_cache) = steps(short), steps(exact)
    errors = []
    for words in WORDS:
        expected = plainly(exact, words, exact_cache, None)
        errors.append([(s.double() - expected).norm() for s in (fast(words), plainly(short, words, cache, None))])
    own, plain = torch.tensor(errors).mean(dim=0)
    assert own < 1.25 * plain
