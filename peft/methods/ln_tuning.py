"""LN-tuning: train the gains of the norms, and nothing else.

Source: Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models" (its
abstract). Zhao et al. 2023, "Tuning LayerNorm in Attention", do so in language models that learn to read pictures.

    y = norm(x) + Δg ⊙ x̂            Δg = 0 at the start; x̂ is x as the norm normalises it, before gain and bias

Every norm gets an explicit change Δg [d_model] of its gain, in a wrapper, so that the frozen gain stays where it is.
LayerNorm: x̂ = (x - mean(x)) / sqrt(var(x) + eps). RMSNorm: x̂ = x / sqrt(mean(x²) + eps).
Trained: per block 2 d_model parameters, and d_model for a norm outside of the blocks.

Differs from the paper: the gains only, where LN-tuning trains a LayerNorm's bias too. Those are among BitFit's, which
may stand beside it; RMSNorm, in the Llama family, has none.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.config import TransformerConfig
from minitransformer.norm import RMSNorm
from peft.functional import gain_update
from peft.method import LayerwiseMethod, Wrapper, parameter_like
from peft.sites import in_layers, inner_modules

NORMS = (nn.LayerNorm, RMSNorm, nn.RMSNorm)


@dataclass(frozen=True)
class LNTuning(LayerwiseMethod):
    """Recipe: a trained change for the gain of every norm in the blocks that `layers` names; None: also outside."""

    def sites(self, modules: dict[str, nn.Module]) -> list[str]:
        """Every norm with a gain, in blocks, and a Transformer's norms outside of them."""
        norms = [name for name in inner_modules(modules) if isinstance(modules[name], NORMS)]
        return in_layers([n for n in norms if modules[n].weight is not None], modules, self.layers)

    def wrap(self, name: str, module: nn.Module, model: nn.Module, generator: torch.Generator) -> "ShiftedGain":
        return ShiftedGain(module)

    def expected_parameters(self, config: TransformerConfig) -> int:
        """blocks * 2 d_model, and d_model for each norm outside of the blocks."""
        return self.n_norms(config) * config.d_model


class ShiftedGain(Wrapper):
    """A norm with an explicit `delta_gain` [d] on top of its frozen gain."""

    order = 0
    position_wise = True

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.delta_gain = parameter_like(torch.zeros_like(base.weight), base)
        self.eps, self.centred = base.eps, isinstance(base, nn.LayerNorm)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """norm(x) + Δg ⊙ x̂, added in the precision of Δg."""
        y = self.base(x)
        if not self.enabled:
            return y
        return (y + gain_update(x.to(self.delta_gain.dtype), self.delta_gain, self.eps, self.centred)).to(y.dtype)
