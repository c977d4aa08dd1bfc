"""Where PEFT code tends to break: compilers, precisions, shared weights, padding, very short and very long input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference.kinds import ALL, of_kind
from reference.method_cases import RECIPES, SETS, batch, each_of, loss_of, outputs, train_a_little

import peft

every_set = each_of("recipes", SETS)
every_recipe = each_of("recipe", RECIPES)
COMPILED = ("lora all", "prefix hidden", "prompt", "dora + gated prefix + ia3", "everything")


def attach_all(model, recipes):
    for number, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=number)
    return train_a_little(model)


def prompt_length(recipes):
    return sum(recipe.length for recipe in recipes if isinstance(recipe, peft.PromptTuning))


@pytest.mark.slow
def test_compiled_models_give_the_same_outputs_and_gradients():
    script = Path(__file__).with_name("compile_all.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(COMPILED)


@pytest.mark.slow
@every_set
def test_the_modules_own_state_dict_carries_everything_to_a_twin(tiny, recipes):
    model, twin = attach_all(tiny(seed=1), recipes), tiny(seed=2)
    for number, recipe in enumerate(recipes):
        peft.attach(twin, recipe, seed=number + 50)
    assert not torch.equal(outputs(twin), outputs(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin), outputs(model))


@every_set
def test_the_tied_head_and_embedding_stay_one_tensor(decoder, recipes):
    model = decoder()
    table = model.embedding.token.weight
    attach_all(model, recipes)
    assert model.embedding.token.weight is table and not table.requires_grad
    tokens, mask = batch()
    hidden = model.hidden(tokens, mask)
    torch.testing.assert_close(model.lm_head(hidden), hidden @ table.T * model.config.logit_scale)
    loss_of(model).backward()
    assert table.grad is None


# A causal row sees padding on its left alone; one that is read from both ends, that on its right as well.
SIDES = [
    pytest.param(kind, side, id=f"{side}-{name}", marks=[] if name == fast else [pytest.mark.slow])
    for side, fast in (("left", "causal-pre"), ("right", "encoder-post"))
    for name, kind in ALL.items()
]


@every_set
@pytest.mark.parametrize(("tiny", "side"), SIDES, indirect=["tiny"])
def test_padding_on_either_side_changes_no_real_output(tiny, recipes, side):
    model, (tokens, _) = attach_all(tiny(), recipes), batch(length=5)
    filler = torch.full((3, 3), 7)
    parts = [filler, tokens] if side == "left" else [tokens, filler]
    padded = torch.cat(parts, dim=1)
    mask = torch.cat([torch.full_like(part, part is tokens, dtype=torch.bool) for part in parts], dim=1)
    torch.testing.assert_close(
        outputs(model, padded, mask).view(3, 5, 16), outputs(model, tokens), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@every_set
def test_one_row_alone_gives_what_it_gives_in_a_batch(tiny, recipes):
    model, (tokens, mask) = attach_all(tiny(), recipes), batch()
    together = model.hidden(tokens, mask)
    for row in range(3):
        alone = outputs(model, tokens[row : row + 1, : int(mask[row].sum())])
        torch.testing.assert_close(together[row : row + 1, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


@of_kind("causal-pre")
@every_set
def test_a_single_token_has_an_output_and_gives_every_trained_tensor_a_finite_gradient(tiny, recipes):
    model = attach_all(tiny(), recipes)
    out = model(torch.tensor([[4]]))
    assert out.shape == (1, 1, 23)
    out.logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in peft.trainable_parameters(model).values())


@every_set
def test_text_up_to_max_len_fits_and_one_word_more_is_an_error_that_says_so(decoder, recipes):
    model = attach_all(decoder(), recipes)
    room = 12 - prompt_length(recipes)
    assert model.hidden(torch.zeros(1, room, dtype=torch.int64)).shape == (1, room, 16)
    with pytest.raises(ValueError, match="max_len is 12"):
        model.hidden(torch.zeros(1, room + 1, dtype=torch.int64))


@pytest.mark.slow
@every_set
def test_generation_with_and_without_cache_agrees_up_to_the_last_position(decoder, recipes):
    model, (tokens, mask) = attach_all(decoder(init="unit_embedding"), recipes), batch(length=4)
    tokens, mask = tokens.flip(1), mask.flip(1)  # padding on the left, as generation wants it
    new = 12 - prompt_length(recipes) - 4
    cached = model.generate(tokens, new, padding_mask=mask)
    assert cached.shape == (3, 4 + new)
    assert torch.equal(cached, model.generate(tokens, new, padding_mask=mask, use_cache=False))
    with pytest.raises(ValueError, match="max_len"):
        model.generate(tokens, new + 1, padding_mask=mask)


@pytest.mark.slow
@every_recipe
def test_in_bfloat16_the_outputs_are_those_of_float32_up_to_its_rounding(tiny, recipe):
    model = train_a_little(peft.attach(tiny(), recipe), size=0.05)
    half = tiny().to(torch.bfloat16)
    peft.attach(half, recipe)
    peft.load_state_dict(half, peft.state_dict(model))
    exact, rounded = outputs(model), outputs(half).float()
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    loss_of(half).float().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in peft.trainable_parameters(half).values())


@of_kind("encoder-post")
@every_recipe
def test_a_model_in_float64_has_methods_in_float64(tiny, recipe):
    model = peft.attach(tiny().double(), recipe)
    assert {p.dtype for p in peft.trainable_parameters(model).values()} == {torch.float64}
    assert outputs(train_a_little(model)).dtype == torch.float64
