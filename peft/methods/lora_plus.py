"""LoRA+: the factor B learns faster than A.

Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models", section 4.

    A <- A - eta g_A            B <- B - (ratio * eta) g_B             g: what the optimizer makes of the gradient

With one rate for both factors, that of A is too large or that of B too small once the model is wide. The tensors are
those of LoRA: all there is to do is to give the optimizer two groups.

Differs from the paper: nothing.
"""

from torch import nn

from peft.methods.lora import LoRALinear


def lora_plus_groups(model: nn.Module, learning_rate: float, ratio: float = 16.0) -> list[dict]:
    """Parameter groups for an optimizer in which every B learns `ratio` times as fast as all else.

        fit(model, data, steps=600, optimizer=torch.optim.AdamW(lora_plus_groups(model, 2e-3), weight_decay=0.0))

    Raises:
        ValueError: the model trains no B, or a rate or a ratio that is not above 0.
    """
    if not learning_rate > 0 or not ratio > 0:
        raise ValueError(f"learning_rate={learning_rate} and ratio={ratio} must be above 0")
    trained = [p for p in model.parameters() if p.requires_grad]
    writers = {m.B for m in model.modules() if isinstance(m, LoRALinear)} & {*trained}
    if not writers:
        raise ValueError("the model trains no B of a LoRA, so there is nothing to give a rate of its own")
    slow, fast = ([p for p in trained if (p in writers) == is_fast] for is_fast in (False, True))
    return [{"params": slow, "lr": learning_rate}, {"params": fast, "lr": ratio * learning_rate}]
