"""A small Transformer, written out to be read: decoder or encoder, pre- or post-norm.

Read in this order: config, attention, feedforward, embedding, block, transformer, heads, generation. What is called
`fast_…` is another form of something plain, for speed; it can be left out in reading.
"""

from minitransformer.config import TransformerConfig
from minitransformer.heads import SequenceClassifier
from minitransformer.transformer import Transformer

__all__ = ["SequenceClassifier", "Transformer", "TransformerConfig"]
