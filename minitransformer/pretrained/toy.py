"""The toy backbone: the pretrained Transformer of the toy world, as it ships with the package.

`backbone.safetensors` holds the weights, `backbone.json` the record: config, words, recipe, versions, losses and
probe scores.
`python -m minitransformer.pretrained.pretrain` makes both from nothing.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from minitransformer.config import TransformerConfig
from minitransformer.transformer import Transformer
from minitransformer.vocabulary import Vocabulary

BACKBONE = Path(__file__).with_name("backbone.safetensors")


def toy_record(file: Path = BACKBONE) -> dict[str, Any]:
    """What is known about the backbone: `config`, `words`, `recipe`, `versions`, `held_out_loss`, `probes`, `history`.

    Raises:
        ValueError: the record is missing; the message says which command makes it.
    """
    record = file.with_suffix(".json")
    if not record.exists():
        raise ValueError(f"{record} is missing: make it by `python -m minitransformer.pretrained.pretrain`")
    return json.loads(record.read_text())


def toy_vocabulary(file: Path = BACKBONE) -> Vocabulary:
    """The words the backbone was trained on, in the order of its embedding."""
    return Vocabulary(toy_record(file)["words"])


def toy_backbone(file: Path = BACKBONE) -> Transformer:
    """The pretrained Transformer: 0.8 M parameters, d_model 128, 4 layers. A fresh copy with every call.

    Raises:
        ValueError: the file or its record is missing, or the two do not fit together.
    """
    config = TransformerConfig(**toy_record(file)["config"])
    if config.vocab_size != len(toy_vocabulary(file)):
        raise ValueError(
            f"{file.name} was trained on {config.vocab_size} words, but its record lists "
            f"{len(toy_vocabulary(file))}: train it again by `python -m minitransformer.pretrained.pretrain`"
        )
    if not file.exists():
        raise ValueError(f"{file} is missing: make it by `python -m minitransformer.pretrained.pretrain`")
    model = Transformer(config)
    model.load_state_dict(load_file(file))
    return model
