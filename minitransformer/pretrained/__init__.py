"""Pretrained weights: the toy backbone that ships with the package, a language model that another package
brings, readers of Hugging Face's checkpoints, and their writer."""

from minitransformer.pretrained.bert import from_bert
from minitransformer.pretrained.folder import from_pretrained
from minitransformer.pretrained.gpt2 import from_gpt2
from minitransformer.pretrained.llama import from_llama
from minitransformer.pretrained.saving import save_pretrained
from minitransformer.pretrained.smollm2 import smollm2, smollm2_tokenizer
from minitransformer.pretrained.toy import toy_backbone, toy_record, toy_vocabulary

__all__ = [
    "from_bert",
    "from_gpt2",
    "from_llama",
    "from_pretrained",
    "save_pretrained",
    "smollm2",
    "smollm2_tokenizer",
    "toy_backbone",
    "toy_record",
    "toy_vocabulary",
]
