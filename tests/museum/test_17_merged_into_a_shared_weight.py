"""Merging by writing into the weight, which somebody else uses too.

The language-model head of many models *is* the embedding: one tensor under two names. An update of the head that is
added to that tensor in place changes what every word looks like at the input as well. And a state dict taken then holds
the update inside the weights *and* beside them, so that whoever loads it counts it twice.

Found in: huggingface/peft, pull request 2972 (https://github.com/huggingface/peft/pull/2972), on tied weights;
jingyaogong/minimind, pull request 598 (https://github.com/jingyaogong/minimind/pull/598), on adding in place.

The lesson: a frozen weight is never written. Ours keeps the merged weight beside it, where no state dict finds it.
"""

import torch
from exhibit import caught
from torch import nn

import peft


class Tied(nn.Module):
    """Words in, scores of words out, by one weight [7, 4]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.word = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.word.weight

    def forward(self, tokens):
        return self.head(self.word(tokens).tanh())


def with_lora():
    model = peft.attach(Tied(), peft.LoRA(rank=2, targets=("head",)))
    with torch.no_grad():
        model.head.B.normal_(generator=torch.Generator().manual_seed(1))
    return model


def merged_in_place(model):
    """The wrong way."""
    lora = model.head
    with torch.no_grad():
        lora.base.weight += lora.scale * lora.B @ lora.A
    model.head = lora.base
    return model


TOKENS = torch.arange(7)


def check_merging_changes_no_output(merge):
    model = with_lora()
    before = model(TOKENS)
    assert torch.allclose(merge(model)(TOKENS), before, atol=1e-5), "the embedding has changed as well"


def check_a_state_dict_counts_the_update_once(merge):
    model = with_lora()
    before = model(TOKENS)
    model.word = nn.Embedding.from_pretrained(model.word.weight.detach().clone())  # not tied, for this question
    state, twin = merge(model).state_dict(), with_lora()
    twin.load_state_dict(state, strict=False)
    assert torch.allclose(twin(TOKENS), before, atol=1e-5), "the update counts twice"


def merged_in_place_and_kept(model):
    """The wrong way, with A and B left for later."""
    lora = model.head
    with torch.no_grad():
        lora.base.weight += lora.scale * lora.B @ lora.A
    return model


def test_a_tied_weight():
    caught(check_merging_changes_no_output, merged_in_place)
    check_merging_changes_no_output(peft.merge)


def test_a_merged_state_dict():
    caught(check_a_state_dict_counts_the_update_once, merged_in_place_and_kept)
    check_a_state_dict_counts_the_update_once(peft.merge)
