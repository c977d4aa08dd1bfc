"""A small Transformer, written out to be read: decoder or encoder, pre- or post-norm.

Read in this order: config, attention, feedforward, embedding, block, transformer, heads, cache, generation; for weights
of 4 bits code_book, quantized_layer, quantized. What is in `fast/` is another form of something plain, for speed; leave
it out in reading.
"""

from minitransformer.config import TransformerConfig
from minitransformer.heads import SequenceClassifier
from minitransformer.quantized import dequantize, quantize, stored_bytes
from minitransformer.transformer import Transformer

__all__ = ["SequenceClassifier", "Transformer", "TransformerConfig", "dequantize", "quantize", "stored_bytes"]
