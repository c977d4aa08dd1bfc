import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from reference.random_weights import randomize

from minitransformer import Transformer, TransformerConfig
from minitransformer.generation import next_word
from minitransformer.modes import evaluation_mode, modes_restored

CONFIG = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
TOKENS = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9], [0, 0, 0, 2]])
REAL = torch.arange(4) >= torch.tensor([0, 2, 3])[:, None]


@pytest.fixture(params=["pre", "post"])
def decoder(request):
    return randomize(Transformer(TransformerConfig(**CONFIG, norm=request.param)), std=0.5)


OPTIONS = [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_k": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_and_uncached_generation_give_the_same_words(decoder, options):
    cached = decoder.generate(TOKENS, 8, padding_mask=REAL, **options)
    assert cached.shape == (3, 12)  # up to max_len
    assert torch.equal(cached[:, :4], TOKENS)
    assert torch.equal(cached, decoder.generate(TOKENS, 8, padding_mask=REAL, use_cache=False, **options))


def test_greedy_words_are_the_best_of_the_whole_forward_pass(decoder):
    tokens = decoder.generate(TOKENS[:1], 5)
    assert torch.equal(decoder(tokens)[:, 3:-1].argmax(dim=-1), tokens[:, 4:])
    assert len(set(tokens[0].tolist())) > 2  # not one word over and over, which would agree by accident


def test_a_left_padded_row_continues_as_it_does_alone(decoder):
    together = decoder.generate(TOKENS, 6, padding_mask=REAL)
    for row in range(3):
        alone = decoder.generate(TOKENS[row, REAL[row]][None], 6)
        assert torch.equal(together[row, 4:], alone[0, -6:])


def test_the_seed_fixes_the_sample(decoder):
    def sample(seed):
        return decoder.generate(TOKENS, 8, padding_mask=REAL, temperature=2.0, seed=seed)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_sampling_leaves_the_callers_random_state_alone(decoder):
    before = torch.get_rng_state()
    decoder.generate(TOKENS, 3, padding_mask=REAL, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (1.0, 2)])
def test_words_are_drawn_with_their_probabilities(temperature, top_k):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = (logits / temperature).exp()
    if top_k:
        expected[top_k:] = 0
    n = 20_000
    words = next_word(logits.expand(n, -1), temperature, top_k, torch.Generator().manual_seed(0))
    frequency = words.bincount(minlength=4) / n
    torch.testing.assert_close(frequency, expected / expected.sum(), atol=0.015, rtol=0)
    assert (frequency[expected == 0] == 0).all()


def test_top_1_is_greedy_and_a_top_k_beyond_the_vocabulary_is_all_of_it(decoder):
    greedy = decoder.generate(TOKENS[:1], 5)
    assert torch.equal(decoder.generate(TOKENS[:1], 5, temperature=1.0, top_k=1), greedy)
    everything = decoder.generate(TOKENS[:1], 5, temperature=1.0, top_k=99)
    assert torch.equal(everything, decoder.generate(TOKENS[:1], 5, temperature=1.0))


def test_no_new_tokens_gives_the_beginning_back(decoder):
    assert torch.equal(decoder.generate(TOKENS, 0), TOKENS)


def test_dropout_is_off_and_modes_come_back(decoder):
    greedy = decoder.generate(TOKENS, 4)
    for module in decoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.9
    decoder.train()
    decoder.blocks[0].eval()
    assert torch.equal(decoder.generate(TOKENS, 4), greedy)
    assert decoder.training and decoder.blocks[1].training and not decoder.blocks[0].attention.training


def test_modes_come_back_after_an_exception(decoder):
    decoder.train()
    with pytest.raises(RuntimeError, match="interrupted"):
        with evaluation_mode(decoder):
            raise RuntimeError("interrupted")
    assert all(module.training for module in decoder.modules())


class InAndOut(ExitStack):
    """A use of the model that begins and ends when it is told to."""

    def __init__(self, use, module):
        super().__init__()
        self.enter_context(use(module))


@pytest.mark.parametrize("use", [evaluation_mode, modes_restored])
@pytest.mark.parametrize("order", ["nested", "overlapping", "three"])
def test_the_last_to_leave_restores_the_modes(decoder, use, order):
    decoder.train()
    decoder.blocks[0].eval()
    before = {module: module.training for module in decoder.modules()}
    first, second = InAndOut(evaluation_mode, decoder), InAndOut(use, decoder.blocks)
    last = InAndOut(evaluation_mode, decoder) if order == "three" else None
    if order == "nested":
        second.close()
        assert not any(module.training for module in decoder.modules())
        first.close()
    else:
        first.close()
        inside = decoder.modules() if last else decoder.blocks.modules()
        assert not any(module.training for module in inside)
        second.close()
        if last:
            last.close()
    assert {module: module.training for module in decoder.modules()} == before


def test_a_mode_that_is_set_inside_is_what_an_inner_use_restores(decoder):
    decoder.eval()
    with evaluation_mode(decoder):
        decoder.train()
        with evaluation_mode(decoder):
            assert not decoder.training
        assert decoder.training
    assert not decoder.training


def test_generation_in_many_threads_leaves_the_modes(decoder):
    decoder.train()
    for module in decoder.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    expected = decoder.generate(TOKENS, 4)
    with ThreadPoolExecutor(4) as pool:
        asked = decoder.generate, decoder.attention_weights
        jobs = [(pool.submit(asked[0], TOKENS, 4), pool.submit(asked[1], TOKENS)) for _ in range(40)]
        results = [(words.result(), weights.result()) for words, weights in jobs]
    for words, weights in results:
        assert torch.equal(words, expected) and len(weights) == 2 and torch.equal(weights[1], results[0][1][1])
    assert all(module.training for module in decoder.modules())


@pytest.mark.parametrize(
    "n, options, message",
    [
        (-1, {}, "max_new_tokens=-1 must be a whole number, at least 0"),
        (9, {}, "4 tokens and 9 new ones exceed max_len 12; ask for at most 8 new tokens"),
        (1, {"temperature": -1.0}, "temperature must be 0 .greedy. or more"),
        (1, {"temperature": math.nan}, "temperature must be 0 .greedy. or more, and finite, got nan"),
        (1, {"temperature": math.inf}, "temperature must be 0 .greedy. or more, and finite, got inf"),
        (1, {"top_k": 3}, "top_k=3 and seed=0 would be ignored: give a temperature above 0"),
        (1, {"seed": 1}, "top_k=None and seed=1 would be ignored: give a temperature above 0"),
        (1, {"temperature": 1.0, "top_k": 0}, "top_k=0 must be a whole number, at least 1"),
        (1, {"padding_mask": REAL.flip(1)}, "pad on the left"),
    ],
)
def test_bad_options_are_refused(decoder, n, options, message):
    with pytest.raises(ValueError, match=message):
        decoder.generate(TOKENS, n, **options)


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize(
    "tokens, mask, message",
    [
        (TOKENS[0], None, r"tokens must be \[B, T\], got shape \(4,\); tokens\[None\]"),
        (TOKENS[None], None, r"tokens must be \[B, T\], got shape \(1, 3, 4\)"),
        (TOKENS[:, :0], None, "tokens is empty"),
        (TOKENS.double(), None, r"got torch.float64; use tokens.long\(\)"),
        (TOKENS.bool(), None, r"got torch.bool; use tokens.long\(\)"),
        (TOKENS, REAL[:, 0], r"padding_mask must be bool and of the shape of tokens"),
        (TOKENS, REAL.long(), r"padding_mask must be bool"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_batch_of_texts_is_refused(decoder, tokens, mask, message, n):
    with pytest.raises(ValueError, match=message):
        decoder.generate(tokens, n, padding_mask=mask)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_exactly_k_words_are_drawn_from_also_where_they_are_equal(k, temperature):
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]).expand(500, -1)
    words = next_word(logits, temperature, k, torch.Generator().manual_seed(0))
    best = [1, 3, 0, 2, 4]  # the higher first, of equal ones those in front
    assert set(words.tolist()) <= set(best[:k])
    if temperature == 1.0:
        assert set(words.tolist()) == set(best[:k])


def test_any_temperature_above_0_gives_probabilities():
    logits = torch.tensor([[1.0, 300.0, 2.0]])
    for temperature in (1e-300, 1e-38, 1e-30, 1e30):
        word = next_word(logits, temperature, None, torch.Generator().manual_seed(0))
        assert temperature > 1 or word == 1


def test_an_encoder_cannot_generate():
    with pytest.raises(ValueError, match=r"an encoder \(causal=False\) cannot generate.*use a decoder"):
        Transformer(TransformerConfig(**CONFIG, causal=False)).generate(TOKENS, 1)
