"""A prefix, its mask, its positions and its loss.

n more keys need n more columns in the mask: without them the shapes clash, or, worse, they fit by accident and hide
the wrong keys. If the prefix counts as words, the positions of the text move by n, and what pretraining learned about
position 0 is lost. And where virtual words have outputs, a loss may be taken on them, against labels that do not
exist.

Found in: https://github.com/huggingface/peft/issues/869, https://github.com/meta-llama/llama-cookbook/issues/47

The lesson: a prefix is a cache of keys and values. It has no position, asks no query, and every query may see it.
"""

import torch
from exhibit import batch, caught, small_model
from torch.nn import functional as F

import peft
from minitransformer.attention import attention_mask

N = 3


def mask_of_the_text_alone(q, k, v, prefix_k, prefix_v, mask):
    """The wrong way: the text's mask, cut or filled to the new width at the wrong end."""
    keys, values = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
    wide = F.pad(mask, (0, N), value=True)  # the prefix stands in front, the new columns behind
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=wide)


def check_padding_and_future_stay_hidden(attention):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 6, 8, generator=generator) for _ in range(3))
    prefix_k, prefix_v = (torch.randn(3, 2, N, 8, generator=generator) for _ in range(2))
    real = batch()[1]
    mask = attention_mask(6, real, 6, causal=True)
    before = attention(q, k, v, prefix_k, prefix_v, mask)
    moved = v.clone()
    moved[:, :, 5] += 10.0  # the last word: the future of all others, padding in rows 1 and 2
    after = attention(q, k, moved, prefix_k, prefix_v, mask)
    assert torch.equal(before[:, :, :5], after[:, :, :5]), "a hidden key was seen"
    prefix_moved = attention(q, k, v, prefix_k, prefix_v + 10.0, mask)
    assert not torch.isclose(prefix_moved, before).any(), "a query does not see the prefix"


def test_the_mask():
    caught(check_padding_and_future_stay_hidden, mask_of_the_text_alone)
    check_padding_and_future_stay_hidden(peft.functional.prefix_attention)


def prefix_as_words(model):
    """The wrong way: n virtual words in front of the text, with positions of their own."""
    return peft.attach(model, peft.PromptTuning(length=N))


def check_positions_do_not_move(attach):
    tokens, mask = batch()
    before = small_model().embedding(tokens, mask)
    assert torch.equal(attach(small_model()).embedding(tokens, mask)[:, -6:], before), "the positions moved"


def test_the_positions():
    """A soft prompt does move them, by design: it *is* words. A prefix is not, and does not."""
    caught(check_positions_do_not_move, prefix_as_words)
    check_positions_do_not_move(lambda model: peft.attach(model, peft.PrefixTuning(length=N)))


def outputs_at_virtual_words(model, tokens, mask):
    """The wrong way: an output for each virtual word, which the labels know nothing of."""
    n = model.embedding.prompt.shape[0]
    wide = torch.cat([torch.ones(len(mask), n, dtype=torch.bool), mask], dim=1)
    vectors = model.embedding(tokens, mask)
    attend = attention_mask(wide.shape[1], wide, wide.shape[1], model.config.causal)
    for block in model.blocks:
        vectors = block(vectors, attend)
    return model.lm_head(model.norm(vectors))


def check_one_output_for_each_word(run):
    tokens, mask = batch()
    model = peft.attach(small_model(), peft.PromptTuning(length=N))
    assert run(model, tokens, mask).shape[1] == tokens.shape[1], "there are outputs that no label belongs to"


def test_the_loss():
    caught(check_one_output_for_each_word, outputs_at_virtual_words)
    check_one_output_for_each_word(lambda model, tokens, mask: model(tokens, mask))
