"""A scale that forgets its denominator, and two more slips in a few lines of LoRA.

    delta = alpha * (x A B)              instead of            (alpha / r) x A B

With r = 16 the update is then sixteen times too large, and a learning rate that was found at one rank is wrong at the
next. Two relatives: layers that are not square are skipped without a word, and a rank above min(d_in, d_out) is
accepted, although B A cannot use it.

Found in: https://github.com/rasbt/LLMs-from-scratch/issues/821,
https://github.com/rasbt/LLMs-from-scratch/issues/1079, https://github.com/jingyaogong/minimind/issues/787

The lesson: compare with the printed formula in numbers, at a rank other than alpha, on layers that are not square.
"""

import numpy as np
import pytest
import torch
from exhibit import caught, small_model
from torch import nn

import peft
from peft.functional import lora_update


def forgets_r(x, A, B, alpha, r):
    """The wrong way."""
    return alpha * (x @ A.T @ B.T)


def ours(x, A, B, alpha, r):
    return lora_update(x, A, B, peft.LoRA(rank=r, alpha=alpha).scale)


def check_against_the_paper(update):
    generator = np.random.default_rng(0)
    for r, alpha in ((1, 1.0), (4, 8.0), (16, 8.0)):
        x, A, B = generator.normal(size=(3, 20)), generator.normal(size=(r, 20)), generator.normal(size=(24, r))
        delta_w = (alpha / r) * B @ A  # Hu et al. 2022, section 4.1
        found = update(*(torch.from_numpy(array) for array in (x, A, B)), alpha, r)
        assert np.allclose(found.numpy(), x @ delta_w.T), f"wrong at r = {r}, alpha = {alpha}"


def test_the_scale():
    caught(check_against_the_paper, forgets_r)
    check_against_the_paper(ours)


def attach_to_square_layers(model):
    """The wrong way: what is not square is passed over."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features]


def attach_ours(model):
    return list(peft.sites.all_wrappers(peft.attach(model, peft.LoRA(rank=2, targets=peft.ALL_LINEARS))))


def check_the_ffn_is_adapted(attach):
    adapted = attach(small_model())
    for layer in (0, 1):
        for name in ("up", "down"):
            assert f"blocks.{layer}.feedforward.{name}" in adapted, f"feedforward.{name} was skipped"


def test_layers_that_are_not_square():
    caught(check_the_ffn_is_adapted, attach_to_square_layers)
    check_the_ffn_is_adapted(attach_ours)


def test_a_rank_that_cannot_be_is_an_error_that_names_the_limit():
    """The wrong way has nothing to show: any rank multiplies. What it costs is parameters without effect."""
    A, B = torch.randn(40, 16), torch.randn(24, 40)
    assert torch.linalg.matrix_rank(B @ A) == 16
    with pytest.raises(ValueError, match=r"rank 40 exceeds min\(d_in, d_out\) = 16"):
        peft.attach(small_model(), peft.LoRA(rank=40, targets=("up",)))
