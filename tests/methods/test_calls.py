"""What a pass needs to know belongs to the pass: not to another thread, and to its recomputation as well."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from reference.kinds import of_kind
from reference.method_cases import RECIPES, SETS, batch, each_of, train_a_little

import peft
from peft.sites import named_tensors

N = 40


@of_kind("causal-pre")
@pytest.mark.parametrize("name", ["lora", "prefix kv", "houlsby", "prompt"])
def test_off_in_one_thread_is_on_in_another(tiny, name):
    model = peft.attach(tiny(), RECIPES[name])
    train_a_little(model)
    tokens, mask = batch()
    on = model(tokens, mask)
    with peft.disabled(model):
        off = model(tokens, mask)
    assert not torch.equal(on, off)

    def disabled_pass(_):
        with peft.disabled(model):
            return model(tokens, mask)

    with ThreadPoolExecutor(4) as pool:
        passes = [(pool.submit(disabled_pass, i), pool.submit(model, tokens, mask)) for i in range(N)]
        for was_off, was_on in passes:
            assert torch.equal(was_off.result(), off) and torch.equal(was_on.result(), on)


@of_kind("causal-pre")
@each_of("name", {name: name for name in SETS})
def test_a_recomputation_sees_what_the_pass_saw(tiny, name):
    """The input's gradient of a disabled pass is the frozen model's, also where blocks are computed again later."""
    plain = tiny(gradient_checkpointing=True)
    model = tiny(gradient_checkpointing=True)
    for recipe in SETS[name]:
        peft.attach(model, recipe)
    train_a_little(model)
    tokens, mask = batch()
    found = []
    for own, around in ((plain, nullcontext), (model, peft.disabled)):
        own.requires_grad_(False)
        weight = named_tensors(own)["embedding.token.weight"].requires_grad_(True)
        with around(own):
            out = own(tokens, mask)
        found.append(torch.autograd.grad(out[mask].square().sum(), weight)[0])
    assert torch.equal(*found)
