"""Weights under which every term of every equation shows in the output."""

import torch


def randomize(model, seed: int = 5, std: float = 0.3):
    """Draw every weight anew: fresh biases are 0 and norms are 1, which would hide that one is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.copy_(gain + std * torch.randn(p.shape, generator=generator))
    return model.eval()
