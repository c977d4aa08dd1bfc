"""Starting from real words: the activations that words of the vocabulary have in each layer.

Source: Li & Liang 2021, section 7.4: a prefix that starts from the activations of real words learns from little data
far better than one that starts from random numbers. Lester et al. 2021, section 3.2, found the same for prompts.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention, attention_mask
from minitransformer.modes import evaluation_mode
from minitransformer.transformer import Transformer
from peft.method import unwrapped


def transformer_of(model: nn.Module) -> Transformer:
    """The Transformer in the model, which may be a classifier round it."""
    for module in model.modules():
        if isinstance(module, Transformer):
            return module
    raise ValueError("there is no minitransformer Transformer in this model")


def words_to_start_from(
    given: tuple[int, ...] | None, length: int, vocab_size: int, generator: torch.Generator
) -> Int[Tensor, "n"]:
    """The given words, or `length` drawn from the vocabulary: the same ones for every layer of one `attach`."""
    if given is not None:
        return torch.tensor(given)
    again = torch.Generator().manual_seed(generator.initial_seed())
    return torch.randint(vocab_size, (length,), generator=again)


def attention_input_of_words(
    model: nn.Module,
    attention: Attention,
    given: tuple[int, ...] | None,
    length: int,
    generator: torch.Generator,
) -> Float[Tensor, "n d_model"]:
    """What that attention layer reads at each of `length` words: the given ones, or words drawn from the vocabulary."""
    transformer = transformer_of(model)
    words = words_to_start_from(given, length, transformer.config.vocab_size, generator)
    pieces = words.split(transformer.config.max_len)  # a prefix may be longer than any text
    return torch.cat([attention_input(transformer, attention, piece) for piece in pieces])


@torch.no_grad()
def attention_input(
    transformer: Transformer, attention: Attention, words: Int[Tensor, "n"]
) -> Float[Tensor, "n d_model"]:
    """What that attention layer reads at each of the words: the hidden states below it, after a pre-norm."""
    tokens = words.to(next(transformer.parameters()).device)[None]
    mask = attention_mask(tokens.shape[1], None, tokens.shape[1], transformer.config.causal, tokens.device)
    with evaluation_mode(transformer):
        x = unwrapped(transformer.embedding)(tokens, torch.ones_like(tokens, dtype=torch.bool))
        for block in transformer.blocks:
            if unwrapped(block.attention) is attention:
                return (block.norm_attention(x) if block.pre_norm else x)[0]
            x = block(x, mask)
    raise ValueError("this attention layer is not in the Transformer")
