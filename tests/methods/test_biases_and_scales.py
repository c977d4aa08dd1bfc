"""BitFit, IA3 and LN-tuning: which numbers they hold, what they compute, and what they leave out on purpose."""

import copy

import pytest
import torch
from reference.method_cases import RECIPES, batch, loss_of, outputs, train_a_little
from reference.tiny_models import LLAMA, tiny_of

import peft
from minitransformer.heads import SequenceClassifier
from minitransformer.norm import RMSNorm
from peft import IA3, BitFit, LNTuning
from peft.methods.ln_tuning import ShiftedGain

of_llama = tiny_of(LLAMA)


def test_bitfit_computes_what_moving_the_biases_themselves_computes(tiny):
    """The oracle: the same changes added to the frozen biases of a plain copy."""
    model, plain = train_a_little(peft.attach(tiny(), BitFit())), tiny()
    with torch.no_grad():
        for name, delta in peft.state_dict(model).items():
            plain.get_parameter(name.replace("delta_bias", "bias")).add_(delta)
    torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-5, atol=1e-5)


def test_bitfit_has_the_gradient_of_the_biases_and_leaves_out_only_the_keys_whose_gradient_is_zero(tiny):
    model, plain = peft.attach(tiny().double(), BitFit()), tiny().double()
    loss_of(model).backward()
    loss_of(plain).backward()
    ours = {name.replace("delta_bias", "bias"): p.grad for name, p in peft.trainable_parameters(model).items()}
    theirs = {name: p.grad for name, p in plain.named_parameters() if name.endswith("bias") and "head" not in name}
    left_out = theirs.keys() - ours.keys()
    assert left_out == {f"blocks.{layer}.attention.key.bias" for layer in (0, 1)}
    for name in left_out:
        assert theirs[name].abs().max() < 1e-15
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-14)


def test_ia3_computes_what_scaling_the_weights_themselves_computes(tiny):
    model, plain = train_a_little(peft.attach(tiny(), IA3())), tiny()
    with torch.no_grad():
        for name, scale in peft.state_dict(model).items():
            linear = plain.get_submodule(name.removesuffix(".scale"))
            if name.endswith("down.scale"):
                linear.weight.mul_(scale)  # columns: its input
            else:
                linear.weight.mul_(scale[:, None])
                linear.bias.mul_(scale)
    torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-5, atol=1e-5)


def test_ia3_has_three_vectors_in_each_block(tiny):
    shapes = {name: tuple(t.shape) for name, t in peft.state_dict(peft.attach(tiny(), IA3())).items()}
    places = {"attention.key.scale": (16,), "attention.value.scale": (16,), "feedforward.down.scale": (24,)}
    assert shapes == {f"blocks.{i}.{place}": shape for i in (0, 1) for place, shape in places.items()}


def test_ln_tuning_computes_what_moving_the_gains_themselves_computes(tiny):
    """The oracle: the same changes added to the frozen gains of a plain copy; with LayerNorm and with RMSNorm."""
    for build in (tiny, of_llama):
        model, plain = train_a_little(peft.attach(build(), LNTuning())), build()
        with torch.no_grad():
            for name, delta in peft.state_dict(model).items():
                plain.get_parameter(name.replace("delta_gain", "weight")).add_(delta)
        torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-5, atol=1e-5)


def test_ln_tuning_has_the_gradient_of_the_gains(tiny):
    for build in (tiny, of_llama):
        model, plain = peft.attach(build().double(), LNTuning()), build().double()
        loss_of(model).backward()
        loss_of(plain).backward()
        ours = {name.replace("delta_gain", "weight"): p.grad for name, p in peft.trainable_parameters(model).items()}
        assert ours.keys() == {n for n, _ in plain.named_parameters() if "norm" in n and n.endswith("weight")}
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(16), RMSNorm(16, 1e-5)], ids=["layer", "rms"])
def test_a_change_that_half_precision_would_round_away_reaches_the_output_of_a_norm(norm):
    """A gain of 1 + 0.003 is 1 in bfloat16; what 0.003 makes of x̂ is added before the output is rounded."""
    norm, x = norm.to(torch.bfloat16), 3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wrapper, wide = ShiftedGain(norm), copy.deepcopy(norm).float()
    wrapper.delta_gain.data.fill_(0.003)
    expected = (norm(x) + 0.003 * wide(x.float())).bfloat16()
    assert torch.equal(wrapper(x), expected) and not torch.equal(wrapper(x), norm(x))


@pytest.mark.parametrize("recipe", [BitFit(), IA3(), LNTuning()], ids=["bitfit", "ia3", "ln_tuning"])
def test_a_fresh_head_is_left_to_train_also(tiny, recipe):
    model = SequenceClassifier(tiny(lm_head="none"), n_classes=2)
    peft.attach(model, recipe)
    assert not any(name.startswith("head") for name in peft.trainable_parameters(model))
    assert peft.parameter_table(model).trained == peft.expected_parameters(model.transformer.config, recipe)


@pytest.mark.parametrize("recipe", [BitFit(), IA3(), LNTuning()], ids=["bitfit", "ia3", "ln_tuning"])
def test_a_model_without_a_place_is_refused(recipe):
    with pytest.raises(ValueError, match="nowhere to enter"):
        peft.attach(torch.nn.Sequential(torch.nn.ReLU()), recipe)


def test_lora_scale_bias_and_adapter_share_a_place_in_a_fixed_order(tiny):
    """adapter(scale(LoRA(W))) whatever came first: each works on what the one inside of it gives."""
    recipes = [RECIPES["lora all"], IA3(), BitFit(), RECIPES["inside_ffn"]]
    tokens, mask = batch()
    kinds = set()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        model = tiny()
        for number in order:
            peft.attach(model, recipes[number])
        module, names = model.blocks[0].feedforward.down, []
        while isinstance(module, peft.Wrapper):
            names.append(type(module).__name__)
            module = module.base
        kinds.add(tuple(names))
        assert torch.isfinite(model(tokens, mask)[mask]).all()
    assert kinds == {("Adapter", "ShiftedBias", "Rescaled", "LoRALinear")}


def test_gain_and_bias_share_a_norm_in_a_fixed_order(tiny):
    """With a norm's gain and bias both tuned, it is LN-tuning as published."""
    for recipes in ([BitFit(), LNTuning()], [LNTuning(), BitFit()]):
        model = tiny()
        for recipe in recipes:
            peft.attach(model, recipe)
        norm = model.blocks[0].norm_attention
        assert [type(norm).__name__, type(norm.base).__name__] == ["ShiftedBias", "ShiftedGain"]
