"""Two LoRAs, averaged factor by factor.

To have both skills at once, somebody averages the A's and the B's. But the update is their *product*:

    (B1 + B2)/2 (A1 + A2)/2  =  (B1 A1 + B2 A2)/4 + (B1 A2 + B2 A1)/4

A quarter of each update instead of a half, and cross terms that belong to no task.

Found in: Hugging Face peft's `combination_type="linear"`; another library's average, which also divides twice

The lesson: a sum of products is a product of concatenations. `combine` puts the factors side by side along the rank.
"""

import torch
from exhibit import caught, small_model

import peft


def average_the_factors(loras, weights):
    """The wrong way."""
    first, second = (peft.state_dict(model) for model in loras)
    mixed = {name: weights[0] * first[name] + weights[1] * second[name] for name in first}
    return peft.attached(loras[0])[0].method, mixed


def lora(seed):
    model = peft.attach(small_model(), peft.LoRA(rank=2, alpha=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in peft.trainable_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def delta(model):
    layer = model.blocks[0].attention.query
    return layer.recipe.scale * layer.B.detach() @ layer.A.detach()


def check_the_sum_is_the_sum(combine):
    loras, weights = [lora(1), lora(2)], [0.5, 0.5]
    recipe, tensors = combine(loras, weights)
    both = peft.attach(small_model(), recipe)
    peft.load_state_dict(both, tensors)
    true = sum(weight * delta(model) for weight, model in zip(weights, loras, strict=True))
    error = (delta(both) - true).norm() / true.norm()
    assert error < 1e-5, f"the update is {100 * error:.0f}% off"


def test_combining_two_loras():
    caught(check_the_sum_is_the_sum, average_the_factors)
    check_the_sum_is_the_sum(peft.combine)
