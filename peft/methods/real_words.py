"""Starting from real words: the activations that words of the vocabulary have in each layer.

Source: Li & Liang 2021, section 7.4: a prefix that starts from the activations of real words learns from little data
far better than one that starts from random numbers. Lester et al. 2021, section 3.2, found the same for prompts.

Activations are those of the frozen model, with every method off, so it makes no difference which one came first. Words
are drawn from the whole vocabulary: the model does not know what in it is none (padding, say); `init_tokens` does.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.attention import Attention
from minitransformer.modes import evaluation_mode
from minitransformer.transformer import Transformer
from peft.method import Method, Wrapper, switched_off, unwrapped


def words_to_start_from(recipe: Method, vocab_size: int, generator: torch.Generator) -> Int[Tensor, "n"]:
    """The recipe's words, or `length` drawn from the vocabulary: the same ones for every layer of one `attach`."""
    if recipe.init_tokens is not None:
        return torch.tensor(recipe.init_tokens, device="cpu")
    again = torch.Generator().manual_seed(generator.initial_seed())
    return torch.randint(vocab_size, (recipe.length,), generator=again, device="cpu")


@torch.no_grad()
def attention_input_of_words(
    recipe: Method, attention: Attention, model: nn.Module, generator: torch.Generator
) -> Float[Tensor, "1 n d_model"]:
    """What that attention layer reads at each of the words.

    Raises:
        ValueError: no Transformer is round the layer, or it does not have these words.
    """
    around = [m for m in model.modules() if isinstance(m, Transformer) and any(p is attention for p in m.modules())]
    if not around:
        raise ValueError('no minitransformer Transformer is round this attention layer; choose init="normal"')
    embedding = unwrapped(around[0].embedding)
    words = words_to_start_from(recipe, len(embedding.token.weight), generator).to(embedding.token.weight.device)
    read: list[Tensor] = []
    look = attention.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    wrappers = [module for module in model.modules() if isinstance(module, Wrapper)]
    try:
        with evaluation_mode(model), switched_off(*wrappers):
            for piece in words.split(embedding.room):  # a prefix may be longer than any text
                around[0].hidden(piece[None])
    finally:
        look.remove()
    return torch.cat(read, dim=1)


def check_start(recipe: Method) -> None:
    """Raise ValueError for `init_tokens` that do not count `length`, or an option that the start would ignore."""
    words = recipe.init_tokens
    if recipe.init == "normal" and words is not None:
        raise ValueError('init_tokens would be ignored by init="normal"; leave one of them out')
    if recipe.init != "normal" and recipe.init_std != 1.0:
        raise ValueError('init_std would be ignored: it goes with init="normal"')
    if words is not None and len(words) != recipe.length:
        raise ValueError(f"init_tokens has {len(words)} words, but length is {recipe.length}")
