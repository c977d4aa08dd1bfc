"""Twenty shapes of the Llama family, their weights and their texts, for Hugging Face's code and for ours.

The weights follow from the names and shapes of the tensors by whole numbers, so that they need not be stored, and are
the same with every version of every library.
"""

import zlib

import torch

N_WORDS = 23
LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {  # model_type, and what differs from LLAMA
    "plain": ("llama", {}),
    "as many": ("llama", {"num_key_value_heads": 4}),
    "two for four": ("llama", {"num_key_value_heads": 2}),
    "one for four": ("llama", {"num_key_value_heads": 1}),
    "three for nine": ("llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "as SmolLM2": (
        "llama",
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"}, "rms_norm_eps": 1e-5},
    ),
    "wide heads": ("llama", {"head_dim": 10, "num_key_value_heads": 2}),
    "narrow heads": ("llama", {"head_dim": 2}),
    "small theta": ("llama", {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}),
    "large eps": ("llama", {"rms_norm_eps": 0.1}),
    "attention biases": ("llama", {"attention_bias": True, "num_key_value_heads": 2}),
    "mlp biases": ("llama", {"mlp_bias": True}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "deep": ("llama", {"num_hidden_layers": 5, "num_key_value_heads": 1, "intermediate_size": 11}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2 tied": (
        "qwen2",
        {"num_key_value_heads": 4, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral wide": ("mistral", {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 8}),
}
SIZES = {"vocab_size": N_WORDS, "max_position_embeddings": 16}


def options(name: str) -> tuple[str, dict]:
    """The model_type of a shape, and the options of its config."""
    kind, changes = SHAPES[name]
    return kind, {**SIZES, **LLAMA, **changes}


def weight(name: str, shape) -> torch.Tensor:
    """Numbers between -0.5 and 0.5 (of a norm 0.5 to 1.5) that no two tensors share."""
    n, seed = torch.Size(shape).numel(), zlib.crc32(name.encode())
    mixed = (torch.arange(n) * 1_103_515_245 + seed) % 2_147_483_647
    mixed = (mixed * 48_271) % 2_147_483_647 * 16_807 % 2_147_483_647
    values = (mixed.double() / 2_147_483_647 - 0.5 + ("norm" in name)).float()
    return values.view(shape)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [3, 7], and which of them are real where the rows are padded on the left."""
    tokens = (torch.arange(21).view(3, 7) * 8 + 3) % N_WORDS
    return tokens, torch.arange(7) >= torch.tensor([0, 2, 5])[:, None]
