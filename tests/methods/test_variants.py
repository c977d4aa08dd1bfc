"""Uses that are odd and legitimate: what they ask for is what they get."""

import copy
from contextlib import ExitStack

import pytest
import torch
from reference.method_cases import batch, train_a_little
from torch import nn

import peft
from minitransformer import SequenceClassifier
from minitransformer.call import CALL
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import fit, predict


def test_switches_that_do_not_nest_leave_nothing_behind(decoder):
    models = [peft.attach(decoder(), peft.LoRA(rank=2)) for _ in range(2)]
    for model in models:
        train_a_little(model)
    tokens, _ = batch()
    before = [model(tokens) for model in models]
    first, second = ExitStack(), ExitStack()
    first.enter_context(peft.disabled(models[0]))
    second.enter_context(peft.disabled(models[1]))
    first.close()
    assert torch.equal(models[0](tokens), before[0]) and not torch.equal(models[1](tokens), before[1])
    second.close()
    assert torch.equal(models[1](tokens), before[1]) and not CALL.told


class WithAQuery(nn.Module):
    def __init__(self, transformer):
        super().__init__()
        self.transformer, self.query = transformer, nn.Linear(16, 16)


def test_a_target_means_every_layer_that_ends_in_it(decoder):
    model = peft.attach(WithAQuery(decoder()), peft.LoRA(rank=2, targets=("query",)))
    assert {name.removesuffix(".A") for name in peft.state_dict(model) if name.endswith(".A")} == {
        "query", "transformer.blocks.0.attention.query", "transformer.blocks.1.attention.query",
    }  # fmt: skip


def test_a_module_from_another_model_is_frozen_as_well(decoder):
    source = peft.attach(SequenceClassifier(decoder(), 3), peft.LoRA(rank=2))
    model = SequenceClassifier(decoder(), 3)
    model.head = copy.deepcopy(source.head).requires_grad_(True)
    peft.attach(model, peft.LoRA(rank=2))
    assert all(name.endswith((".A", ".B")) for name in peft.trainable_parameters(model))


def test_flags_of_the_readers_own_do_not_matter_to_fit(decoder):
    model = decoder()
    model.blocks[0].enabled, model.blocks[1].merged = False, True
    tokens, mask = batch()
    fit(model, Dataset(tokens, mask, tokens[:, 0]), steps=1, batch_size=3, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("more", [{}, {"reparameterize": 5}])
def test_a_prefix_generates_in_half_precision(decoder, dtype, more):
    model = peft.attach(decoder(max_len=24).to(dtype).eval(), peft.PrefixTuning(length=3, **more))
    tokens, _ = batch()
    assert model.generate(tokens, 9).shape == (3, 15)


def test_a_bank_beside_another_method(decoder):
    lora = peft.attach(decoder(), peft.LoRA(rank=2))
    bank = peft.TaskBank(decoder(), {"a": lora})
    with pytest.raises(ValueError, match=r"bank.detach\(\) first"):
        peft.attach(bank.model, peft.PrefixTuning(length=2))


def test_tasks_have_names(decoder, unchecked):
    lora = peft.attach(decoder(), peft.LoRA(rank=2))
    with pytest.raises(ValueError, match="give tasks by name"):
        peft.TaskBank(decoder(), {None: lora})


def test_a_block_that_stands_twice_merges_into_a_copy(decoder):
    model = decoder()
    model.blocks[1] = model.blocks[0]
    train_a_little(peft.attach(model, peft.LoRA(rank=2)))
    tokens, _ = batch()
    torch.testing.assert_close(peft.merged_copy(model)(tokens), model(tokens))


def test_choices_are_word_numbers(decoder):
    tokens, mask = batch()
    for choices in ([1, -1], []):
        with pytest.raises(ValueError, match="choice"):
            predict(decoder(), Dataset(tokens, mask, tokens[:, 0]), choices)


def test_weights_that_are_swapped_end_a_merge(decoder):
    model = peft.attach(decoder(), peft.LoRA(rank=2))
    train_a_little(model)
    tokens, _ = batch()
    values = torch.nn.utils.parameters_to_vector(model.parameters()) * 1.5
    peft.merge(model)
    torch.nn.utils.vector_to_parameters(values, model.parameters())
    merged = model(tokens)
    torch.testing.assert_close(merged, peft.unmerge(model)(tokens))
