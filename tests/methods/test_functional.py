"""peft/functional.py against its NumPy twin: value, gradient derived by hand, autograd, and finite differences."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from reference import numpy_peft

from peft import functional
from peft.methods import vera

CAUSAL = np.tril(np.ones((4, 5), dtype=bool), 1)[None, None]  # [1, 1, T, S]
PADDED = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=bool)[:, None, None] | np.eye(4, 5, dtype=bool)
FULL = np.random.default_rng(3).random((2, 3, 4, 5)) < 0.6  # another mask for each head
FULL[..., 0] = True
HEADS = {"q": (2, 3, 4, 6), "k": (2, 3, 5, 6), "v": (2, 3, 5, 6), "prefix_k": (2, 3, 7, 6), "prefix_v": (2, 3, 7, 6)}
BOTTLENECK = {"h": (2, 3, 5), "down_weight": (4, 5), "down_bias": (4,), "up_weight": (5, 4), "up_bias": (5,)}
MLP = {"source": (3, 5), "hidden_weight": (7, 5), "hidden_bias": (7,), "out_weight": (4, 7), "out_bias": (4,)}


@dataclass
class Case:
    """A function's name, the shapes of the tensors it is differentiated by, and its other arguments."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    others: dict = field(default_factory=dict)

    def arrays(self):
        generator = np.random.default_rng(1)
        return [generator.normal(size=shape) for shape in self.shapes.values()]

    def torch(self, tensors):
        others = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in self.others.items()}
        return as_tuple(getattr(vera if self.name.startswith("vera") else functional, self.name)(*tensors, **others))

    def numpy(self, arrays):
        return as_tuple(getattr(numpy_peft, self.name)(*arrays, **self.others))

    def backward(self, g, arrays):
        g = g[0] if len(g) == 1 else g
        return getattr(numpy_peft, f"{self.name}_backward")(g, *arrays, **self.others)


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


DORA = {"frozen_weight": (6, 5), "A": (4, 5), "B": (6, 4), "magnitude": (6,)}
GATED = {"own": (2, 3, 4, 6), "q": (2, 3, 4, 6), "prefix_k": (2, 3, 7, 6), "prefix_v": (2, 3, 7, 6), "gate": (3,)}
LORA = {"x": (2, 3, 5), "A": (4, 5), "B": (6, 4)}
CASES = {
    "lora_update": Case("lora_update", LORA, {"scale": 1.7}),
    "lora_update of one vector": Case("lora_update", LORA | {"x": (5,)}, {"scale": 0.5}),
    "lora_weight": Case("lora_weight", {"A": (4, 5), "B": (6, 4)}, {"scale": 1.7}),
    "vera_update": Case("vera_update", LORA | {"d": (4,), "b": (6,)}),
    "vera_weight": Case("vera_weight", {"A": (4, 5), "B": (6, 4), "d": (4,), "b": (6,)}),
    "row_norms": Case("row_norms", {"weight": (6, 5)}),
    "dora_weight": Case("dora_weight", DORA, {"scale": 1.7, "norms": np.linspace(0.5, 2.0, 6)}),
    "gated_prefix": Case("gated_prefix", GATED),
    "rescaled": Case("rescaled", {"h": (2, 3, 5), "scale": (5,)}),
    "shifted": Case("shifted", {"h": (2, 3, 5), "delta_bias": (5,)}),
    "gain_update, LayerNorm": Case("gain_update", {"x": (2, 3, 5), "delta_gain": (5,)}, {"eps": 0.3}),
    "gain_update, RMSNorm": Case("gain_update", {"x": (2, 3, 5), "delta_gain": (5,)}, {"eps": 0.3, "centred": False}),
    "prefix_attention": Case("prefix_attention", HEADS),
    "prefix_attention causal": Case("prefix_attention", HEADS, {"mask": CAUSAL}),
    "prefix_attention padded": Case("prefix_attention", HEADS, {"mask": PADDED}),
    "prefix_attention masked by head": Case("prefix_attention", HEADS, {"mask": FULL}),
    "gated_attention": Case("gated_attention", HEADS),
    "gated_attention causal": Case("gated_attention", HEADS, {"mask": CAUSAL}),
    "gated_attention padded": Case("gated_attention", HEADS, {"mask": PADDED}),
    "gated_attention masked by head": Case("gated_attention", HEADS, {"mask": FULL}),
    "prefix_mlp": Case("prefix_mlp", MLP),
    "prepend": Case("prepend", {"prompt": (3, 5), "vectors": (2, 4, 5)}),
    "bottleneck, defaults": Case("bottleneck", BOTTLENECK),
    "bottleneck relu": Case("bottleneck", BOTTLENECK, {"activation": "relu", "scale": 2.5}),
    "bottleneck gelu": Case("bottleneck", BOTTLENECK, {"activation": "gelu", "scale": 0.5}),
    "bottleneck gelu_tanh": Case("bottleneck", BOTTLENECK, {"activation": "gelu_tanh", "scale": 0.5}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def loss_weights(outputs):
    """A random linear loss: a plain sum would hide errors that cancel, such as those along a softmax."""
    generator = np.random.default_rng(2)
    return [generator.normal(size=tuple(out.shape)) for out in outputs]


def leaves(arrays):
    return [torch.from_numpy(array).requires_grad_() for array in arrays]


@every_case
def test_value_equals_the_numpy_twin(case):
    arrays = case.arrays()
    for ours, twin in zip(case.torch(leaves(arrays)), case.numpy(arrays), strict=True):
        assert tuple(ours.shape) == twin.shape
        np.testing.assert_allclose(ours.detach().numpy(), twin, rtol=1e-11, atol=1e-12)


@every_case
def test_gradient_equals_the_one_derived_by_hand(case):
    arrays = case.arrays()
    tensors = leaves(arrays)
    outputs = case.torch(tensors)
    weights = loss_weights(outputs)
    sum((out * torch.from_numpy(w)).sum() for out, w in zip(outputs, weights, strict=True)).backward()
    by_hand = case.backward(weights, arrays)
    for name, tensor, gradient in zip(case.shapes, tensors, by_hand, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-9, atol=1e-11, err_msg=name)


@every_case
def test_gradient_equals_central_finite_differences(case):
    """Of the torch function itself, along random directions of each tensor."""
    arrays, step, generator = case.arrays(), 1e-5, np.random.default_rng(4)
    weights = loss_weights(case.numpy(arrays))
    gradients = case.backward(weights, arrays)

    def loss(index, moved):
        tensors = [torch.from_numpy(moved if i == index else array) for i, array in enumerate(arrays)]
        return sum((out.numpy() * w).sum() for out, w in zip(case.torch(tensors), weights, strict=True))

    for index, name in enumerate(case.shapes):
        for _ in range(2):
            direction = generator.normal(size=arrays[index].shape)
            above, below = (loss(index, arrays[index] + sign * step * direction) for sign in (1, -1))
            slope = (gradients[index] * direction).sum()
            assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("mask", [None, CAUSAL, PADDED, FULL], ids=["open", "causal", "padded", "by head"])
def test_concatenated_prefix_equals_the_gated_form_of_he_et_al(mask):
    tensors = [torch.from_numpy(array) for array in CASES["prefix_attention"].arrays()]
    mask = None if mask is None else torch.from_numpy(mask)
    mixture, gate = functional.gated_attention(*tensors, mask)
    torch.testing.assert_close(functional.prefix_attention(*tensors, mask), mixture, rtol=1e-12, atol=1e-12)
    assert bool(((gate > 0) & (gate < 1)).all())


def test_lora_update_is_the_weight_change_applied_to_x():
    x, A, B = (torch.from_numpy(array) for array in CASES["lora_update"].arrays())
    by_weight = x @ functional.lora_weight(A, B, 1.7).T
    torch.testing.assert_close(functional.lora_update(x, A, B, 1.7), by_weight, rtol=1e-12, atol=1e-12)


def test_prepend_takes_the_precision_of_the_words():
    vectors = torch.zeros(2, 1, 3, dtype=torch.bfloat16)
    assert functional.prepend(torch.ones(2, 3), vectors).dtype == torch.bfloat16


def test_golden_numbers_computed_by_hand():
    A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0], [0.5]])
    out = functional.lora_update(torch.tensor([[1.0, 1.0]]), A, B, 2.0)  # A x = 3, B A x = (9, -3, 1.5), twice
    assert out.tolist() == [[18.0, -6.0, 3.0]]
    assert functional.lora_weight(A, B, 2.0).tolist() == [[6.0, 12.0], [-2.0, -4.0], [1.0, 2.0]]
    zero = torch.zeros(1, 1, 1, 1)  # equal scores: the mean of all values, of which the prefix gives 1 out of 2
    out, gate = functional.gated_attention(zero, zero, zero + 4.0, zero, zero + 8.0)
    assert (out.item(), gate.item()) == (6.0, 0.5)
    assert functional.prefix_attention(zero, zero, zero + 4.0, zero, zero + 8.0).item() == 6.0
