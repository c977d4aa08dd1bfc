"""A small Transformer, written out to be read: decoder or encoder, pre- or post-norm.

Read in this order: config, attention, feedforward, embedding, block, transformer, heads, cache, generation. What is in
`fast/` is another form of something plain, for speed; leave it out in reading.
"""

from minitransformer.config import TransformerConfig
from minitransformer.heads import SequenceClassifier
from minitransformer.transformer import Transformer

__all__ = ["SequenceClassifier", "Transformer", "TransformerConfig"]
