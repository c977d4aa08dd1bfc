"""Prompt tuning: vectors in front of the text that take positions, but ask nothing and return nothing."""

import pytest
import torch
from reference.method_cases import RECIPES, batch, outputs

import peft
from peft import PromptTuning

PROMPTS = {name: RECIPES[name] for name in ("prompt", "prompt normal")}
every_prompt = pytest.mark.parametrize("recipe", PROMPTS.values(), ids=PROMPTS.keys())


@every_prompt
def test_outputs_are_those_of_the_text_only(tiny, recipe):
    model = peft.attach(tiny(), recipe)
    tokens, mask = batch()
    assert model.hidden(tokens, mask).shape == (3, 6, 16)
    assert model(tokens, mask).shape == (3, 6, 23)


@pytest.mark.parametrize("length", [1, 4])
def test_a_prompt_of_real_words_equals_those_words_in_front_of_the_text(tiny, length):
    """The simplest oracle: what the model says of [words ; text], without the outputs at the words."""
    words, tokens = torch.tensor([5, 1, 7, 2])[:length], batch()[0]
    by_hand = outputs(tiny(), torch.cat([words.expand(3, -1), tokens], dim=1))[:, length:]
    model = peft.attach(tiny(), PromptTuning(length=length, init_tokens=tuple(words.tolist())))
    torch.testing.assert_close(outputs(model, tokens), by_hand, rtol=1e-5, atol=1e-5)


def test_prompt_and_text_together_must_fit_into_max_len(decoder):
    model = peft.attach(decoder(), PromptTuning(length=3))
    assert model.embedding.room == 9
    with peft.disabled(model):
        assert model.embedding.room == 12
    outputs(model, batch(length=9)[0])
    with pytest.raises(ValueError, match="13 positions, but max_len is 12; shorten the text"):
        outputs(model, batch(length=10)[0])
    assert model.generate(batch(length=5)[0], 4).shape == (3, 9)
    with pytest.raises(ValueError, match="max_len"):
        model.generate(batch(length=5)[0], 6)


def test_a_prompt_that_leaves_no_room_is_refused_and_the_model_stays(decoder):
    model = decoder()
    peft.detach(peft.attach(model, PromptTuning(length=11)))
    with pytest.raises(ValueError, match="leaves no room"):
        peft.attach(model, PromptTuning(length=12))
    with pytest.raises(ValueError, match="leaves no room"):
        peft.expected_parameters(model.config, PromptTuning(length=12))
    assert not peft.attached(model)


def test_segments_of_the_prompt_are_the_first_kind_and_the_texts_stay(decoder):
    model = decoder(causal=False, n_segments=2)
    tokens = batch()[0]
    segments = (torch.arange(6) >= 3).long().expand(3, -1)
    words = torch.tensor([4, 8])
    by_hand = model.hidden(
        torch.cat([words.expand(3, -1), tokens], dim=1),
        segments=torch.cat([torch.zeros(3, 2, dtype=torch.long), segments], dim=1),
    )[:, 2:]
    peft.attach(model, PromptTuning(length=2, init_tokens=(4, 8)))
    torch.testing.assert_close(model.hidden(tokens, segments=segments), by_hand, rtol=1e-5, atol=1e-5)


def test_the_tied_head_still_reads_the_word_table(decoder):
    model = peft.attach(decoder(), RECIPES["prompt"])
    tokens = batch()[0]
    assert torch.equal(model(tokens), model.hidden(tokens) @ model.embedding.base.token.weight.T)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 0}, "length"),
        ({"init": "zeros"}, '"tokens" or "normal"'),
        ({"length": 2, "init_tokens": (1,)}, "1 words, but length is 2"),
        ({"length": 1, "init": "normal", "init_tokens": (1,)}, "init_tokens"),
        ({"init_std": -1.0}, "init_std"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PromptTuning(**options)
