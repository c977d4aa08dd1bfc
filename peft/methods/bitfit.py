"""BitFit: train the biases, and nothing else.

Source: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", section 3.

    y = W x + b + Δb            Δb = 0 at the start

Every bias of a block gets an explicit change Δb [d_out] in a wrapper of its own, so that the frozen bias stays where it
is: `disabled` and `detach` give it back bit for bit. The same holds for LayerNorm, y = norm(x) g + b + Δb.
Trained: per block 6 d_model + d_ff parameters, and d_model for a norm outside of the blocks.

Differs from the paper: the key layer's bias is left out. Adding c to every key adds q·c to all scores of a query, which
the softmax cancels: the gradient of that bias is zero (a test shows it), and it would be counted for nothing; but where
rotary positions turn c, it is trained. Biases of heads are left out too; a fresh head is trained whole (`train_also`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.attention import Attention
from minitransformer.config import TransformerConfig
from peft.functional import in_their_precision, shifted
from peft.method import LayerwiseMethod, LinearMap, Wrapper, can_hold, linear_map, parameter_like, unwrapped
from peft.sites import block_names, in_layers, inner_modules, linear_shapes


@dataclass(frozen=True)
class BitFit(LayerwiseMethod):
    """Recipe: a trained change for every bias in the blocks that `layers` names; None: also in norms outside."""

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """Every linear layer and LayerNorm with a bias, in blocks, and a Transformer's norms outside of them."""
        keys = [unwrapped(m.key) for m in modules.values() if isinstance(m, Attention) and m.rope_theta is None]
        places = [name for name in inner_modules(modules) if isinstance(modules[name], (nn.Linear, nn.LayerNorm))]
        places = [name for name in places if modules[name].bias is not None and modules[name] not in keys]
        return in_layers(places, modules, self.layers) or (_refuse() if block_names(modules) else [])

    def wrap(self, name: str, module: nn.Module, model: nn.Module, generator: torch.Generator) -> "ShiftedBias":
        return ShiftedBias(module)

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * (6 d_model + d_ff), and d_model for each norm outside of the blocks; less if biases are absent."""
        left_out = () if config.position == "rotary" else ("key",)
        block = [(n.rpartition(".")[2], d_out) for n, (_, d_out) in linear_shapes(config).items() if ".0." in n]
        biases = sum(d_out for name, d_out in block if config.has_bias(name) and name not in left_out)
        norms = self.n_norms(config) if config.norm_type == "layer" else 0
        return self.n_blocks(config) * biases + norms * config.d_model or _refuse()


def _refuse():
    cure = "choose another method: LNTuning trains the norms' gains"
    raise ValueError(f"there is no bias to train: linear layers have none here, nor norms; {cure}")


class ShiftedBias(Wrapper):
    """A linear layer or a norm with an explicit `delta_bias` [d_out] on top of its frozen bias."""

    order = 2
    position_wise = True

    def __init__(self, base: nn.Linear | nn.LayerNorm):
        super().__init__(base)
        self.delta_bias = parameter_like(torch.zeros_like(base.bias), base)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Ben Zaken et al. 2022, section 3."""
        y = self.base(x)
        return in_their_precision(shifted, y, self.delta_bias) if self.enabled else y

    def as_linear(self) -> LinearMap | None:
        """W and b + Δb, if it is a linear layer whose precision can hold the change."""
        base = linear_map(self.base)
        if not self.enabled or base is None:
            return base
        return (base[0], base[1] + self.delta_bias) if can_hold(base[0], self.delta_bias) else None
