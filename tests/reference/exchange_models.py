"""Tiny models of the three architectures, with a method whose tensors are not at their start."""

import torch
from reference.method_cases import train_a_little
from reference.their_form import state_dict

import peft
from minitransformer import SequenceClassifier
from minitransformer.pretrained import from_bert, from_gpt2, from_llama

READERS = {"llama": from_llama, "bert": from_bert, "gpt2": from_gpt2}
TOKENS = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(2))


def built(family, weights=None):
    """From their state dict, or from one that was changed."""
    given, config = state_dict(family)
    return READERS[family](given if weights is None else weights, config)


def classifier(family):
    return SequenceClassifier(built(family), n_classes=3, seed=4).eval()


def with_methods(model, *recipes, train_also=()):
    """The model, each tensor of the methods moved away from its start; the first recipe brings `train_also`."""
    for number, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=number, train_also=() if number else train_also)
    return train_a_little(model)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)
