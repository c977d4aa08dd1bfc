"""Looking too early, and taking zero for nothing.

A test runs one step, asks whether A and B got a gradient, and either fails on correct code or, once it was weakened
to "B did", passes on wrong code. At the start B = 0, so the gradient of A, which travels through B, is *exactly*
zero.

The other way round: "a prefix of zeros changes nothing" is believed because a LoRA of zeros does. But a zero key has
the score q·0 = 0, not minus infinity: it takes its share of the softmax, and its zero value dilutes the rest.

The lesson: look after three steps; and show by how much a prefix changes the start, since nothing it holds makes it
none."""

import torch
from exhibit import batch, caught, loss_of, small_model

import peft


class CutOff(peft.methods.lora.LoRALinear):
    """A LoRA whose A really never learns: its graph is cut."""

    def forward(self, x):
        return self.base(x) + peft.functional.lora_update(x, self.A.detach(), self.B, self.recipe.scale)


def cut_off(model):
    for layer in peft.sites.all_wrappers(model).values():
        layer[0].__class__ = CutOff
    return model


def lora():
    return peft.attach(small_model(), peft.LoRA(rank=2))


def gradients_after(model, steps):
    optimizer = torch.optim.SGD(peft.trainable_parameters(model).values(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model).backward()
        optimizer.step()
    return {name: p.grad for name, p in peft.trainable_parameters(model).items()}


def check_one_step(model):
    """The wrong test."""
    for name, gradient in gradients_after(model, 1).items():
        assert gradient is not None and gradient.norm() > 0, f"{name} gets none"


def check_three_steps(model):
    for name, gradient in gradients_after(model, 3).items():
        assert gradient is not None and gradient.norm() > 0, f"{name} gets none"


def check_b_only(model):
    """The weakened test."""
    assert all(g.norm() > 0 for name, g in gradients_after(model, 1).items() if name.endswith(".B"))


def test_one_step_sees_nothing_three_steps_do():
    caught(check_one_step, lora())  # a false alarm
    check_b_only(cut_off(lora()))  # a bug that passes
    caught(check_three_steps, cut_off(lora()))
    check_three_steps(lora())


def check_zeros_change_nothing(recipe):
    (tokens, mask), model = batch(), small_model()
    before = model(tokens, mask)
    peft.attach(model, recipe)
    with torch.no_grad():
        for p in peft.trainable_parameters(model).values():
            p.zero_()
    assert torch.allclose(model(tokens, mask), before, atol=1e-4), "zeros changed the output"


def test_a_prefix_of_zeros_is_no_identity_but_a_closed_gate_is():
    caught(check_zeros_change_nothing, peft.PrefixTuning(length=3))
    check_zeros_change_nothing(peft.LoRA(rank=2))
    check_zeros_change_nothing(peft.BottleneckAdapter(bottleneck=2))
    check_zeros_change_nothing(peft.PrefixTuning(length=3, gated=True))
