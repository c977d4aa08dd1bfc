"""A model with quantised weights, and back: all linear layers of its blocks are replaced.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".

    model = quantize(model.requires_grad_(False))      # 4 bits a weight; stored_bytes(model) says what that saves
    attach(model, LoRA(rank=8))                        # QLoRA, or any other method over it

What is rounded is lost: `dequantize` gives plain layers with the weights as they were rounded. How a weight is rounded:
`code_book.py`; what a layer does with it: `quantized_layer.py`.
"""

from functools import partial

import torch
from torch import nn

from minitransformer.attention import Attention
from minitransformer.block import Block
from minitransformer.checkpointing import give_memory_back
from minitransformer.code_book import BOOKS, packed, unpacked
from minitransformer.config import check_whole
from minitransformer.feedforward import FeedForward
from minitransformer.quantized_layer import Quantized, QuantizedLinear


@torch.inference_mode(False)
def quantize(model: nn.Module, storage: str = "nf4", block: int = 64, double: bool = True) -> nn.Module:
    """Store the weights of all linear layers in the blocks in 4 bits, in place; embedding, norms and heads stay.

    Args:
        model: a Transformer, or a module that contains one, frozen.
        storage: "nf4" or "int4".
        block: how many weights share a scale.
        double: whether the scales are quantised as well.

    Raises:
        ValueError: an unknown option; a model without blocks, or that is trained, quantised or wrapped; a weight that
            is shared, watched, not finite, or whose rows are no whole number of blocks. Nothing has changed then.
    """
    if storage not in [*BOOKS]:
        raise ValueError(f"storage={storage!r} is unknown; choose one of {', '.join(BOOKS)}")
    if not isinstance(double, bool):
        raise ValueError(f"double={double!r} must be True or False")
    check_whole("block", block, 2)
    places = _places(model)
    for name, (_, layer) in places.items():
        check_layer(model, name, layer)
        if block % 2 or layer.in_features % block:
            raise ValueError(f"block={block} must be an even number that divides d_in = {layer.in_features} of {name}")
    _check_frozen(model)
    unpack = partial(unpacked, storage)
    while places:  # so that each old weight is gone before the next one is packed
        name, (parent, layer) = places.popitem()
        stored = packed(layer.weight, storage, block, double)
        # By names that say the book: a state dict of another one must not fit.
        new = QuantizedLinear(unpack, {f"{storage}_{own}": tensor for own, tensor in stored.items()}, layer)
        parent._modules[name.rpartition(".")[2]] = new
    del layer
    give_memory_back()
    return model


@torch.inference_mode(False)
def dequantize(model: nn.Module) -> nn.Module:
    """Replace quantised layers by plain ones with the weights that are unpacked, in place; methods stay attached.

    The weights remain frozen. They are what they were rounded to: what they were before is lost.

    Raises:
        ValueError: nothing is quantised.
    """
    modules = [*model.modules()]
    if not any(isinstance(module, Quantized) for module in modules):
        raise ValueError("nothing is quantised in this model; quantize(model) first")
    plain = {module: module.plain() for module in modules if isinstance(module, Quantized)}
    for parent in modules:
        parent._modules.update({name: plain[m] for name, m in parent._modules.items() if m in plain})
    return plain.get(model, model)


def stored_bytes(model: nn.Module) -> int:
    """How many bytes the parameters of the model take, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each linear layer of the blocks, and the module that holds it, by the layer's name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Block))
    found = {}
    for name, module in modules.items():
        if not blocks or not name.startswith(blocks):
            continue
        holds_linear = any(isinstance(inner, nn.Linear) for inner in module.modules())
        if isinstance(module, nn.Linear):
            found[name] = modules[name.rpartition(".")[0]], module
        elif holds_linear and not isinstance(module, (Attention, FeedForward)):
            raise ValueError(f"{name} is a {type(module).__name__}: quantise the plain model, and attach afterwards")
    if not found:
        raise ValueError("the model has no blocks of linear layers; give a Transformer, or a module that contains one")
    return found


def check_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Raise ValueError, with the cure, unless the layer's weight is a plain one of its own, and finite in float32."""
    if isinstance(layer, Quantized):
        raise ValueError(f"{name} is quantised already; dequantize(model) first, or start from the model as it was")
    weight, hooks = layer._parameters.get("weight"), [v for k, v in vars(layer).items() if k.endswith("_hooks") and v]
    if type(layer) is not nn.Linear or type(weight) is not nn.Parameter or hooks:
        raise ValueError(f"{name} is pruned, parametrised, watched by a hook or of a class of its own; make it plain")
    if [p is weight for _, p in model.named_parameters(remove_duplicate=False)].count(True) > 1:
        raise ValueError(f"the weight of {name} is shared with another module; give each one its own first")
    if not bool(weight.float().abs().sum().isfinite()):  # nor weights so large that the mean of scales is none
        raise ValueError(f"the weight of {name} holds a NaN or an infinity, or nearly one; choose another checkpoint")


def _check_frozen(model: nn.Module) -> None:
    if trained := [name for name, p in model.named_parameters() if p.requires_grad]:
        cure = "first call model.requires_grad_(False), and attach afterwards what is to learn"
        raise ValueError(f"{trained[0]} is trained, but only a frozen model can be quantised; {cure}")
