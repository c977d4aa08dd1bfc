"""Pairs of prompt and answer -> rows of tokens: to train on, padded on the right; to go on from, padded on the left.

Only the answer is asked for, and the end of the turn behind it: a model that never learned to stop does not stop.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from minitransformer.config import check_whole
from minitransformer.tasks.dataset import Dataset, pad_rows
from minitransformer.tasks.language.pairs import Pair

NOT_ASKED = -100  # as PyTorch has it


def answer_rows(tokenizer, pairs: Sequence[Pair]) -> Dataset:
    """What training reads: prompt, answer, end of turn, padded on the right; asked for are the last two.

    As `answer_only` takes them: targets [N, T] are the token that should follow each position, -100 where nothing is
    asked. Prompt and answer are read apart, as they are in generation: no token spans both.

    Args:
        tokenizer: such as `smollm2_tokenizer()`: `encode`, `encode_chat`, `end_id`, `pad_id`.
        pairs: at least one, none with an empty prompt.

    Raises:
        ValueError: no pairs, or a prompt without a token.
    """
    prompts = [prompt_tokens(tokenizer, pair) for pair in pairs]
    answers = [[*tokenizer.encode(pair.answer), tokenizer.end_id] for pair in pairs]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokens, padding_mask = pad_rows(rows, tokenizer.pad_id)
    n_prompt = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    asked = padding_mask & (torch.arange(tokens.shape[1]) >= n_prompt)
    said = tokens.masked_fill(~asked, NOT_ASKED)
    return Dataset(tokens, padding_mask, F.pad(said[:, 1:], (0, 1), value=NOT_ASKED))  # said at the position before


def prompt_rows(tokenizer, pairs: Sequence[Pair]) -> tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """What generation goes on from: the prompts alone, padded on the left, and their padding mask.

    Raises:
        ValueError: no pairs, or a prompt without a token.
    """
    backwards = [prompt_tokens(tokenizer, pair)[::-1] for pair in pairs]
    tokens, padding_mask = pad_rows(backwards, tokenizer.pad_id)
    return tokens.flip(1), padding_mask.flip(1)


def prompt_tokens(tokenizer, pair: Pair) -> list[int]:
    """The tokens in front of the answer; of a conversation, up to the beginning of the answering turn."""
    if isinstance(pair.prompt, str):
        tokens = tokenizer.encode(pair.prompt)
    else:
        tokens = tokenizer.encode_chat(pair.prompt, add_generation_prompt=True)
    if not tokens:
        raise ValueError("an empty prompt has no token that could say the answer; give it at least one word")
    return tokens


def generated_answers(
    model: nn.Module, tokenizer, pairs: Sequence[Pair], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """What the model says to each prompt, greedily, up to the end of its turn; in the order of the pairs.

    Args:
        model: a language model with `generate`.
        tokenizer: as `answer_rows` takes it, with `decode`.
        pairs: their answers are not looked at.
        max_new_tokens: a longer answer is cut off there.
        batch_size: rows at a time, those of like length together.

    Raises:
        ValueError: a batch_size below 1, a prompt without a token, or what `generate` refuses.
    """
    check_whole("batch_size", batch_size, 1)
    said = {}
    order = sorted(range(len(pairs)), key=lambda i: len(prompt_tokens(tokenizer, pairs[i])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens, padding_mask = prompt_rows(tokenizer, [pairs[i] for i in batch])
        device = next(model.parameters()).device
        options = {"padding_mask": padding_mask.to(device), "stop": tokenizer.end_id, "pad_id": tokenizer.pad_id}
        longer = model.generate(tokens.to(device), max_new_tokens, **options)
        for i, row in zip(batch, longer[:, tokens.shape[1] :].tolist(), strict=True):
            said[i] = tokenizer.decode(row[: [*row, tokenizer.end_id].index(tokenizer.end_id)])  # without the end
    return [said[i] for i in range(len(pairs))]
