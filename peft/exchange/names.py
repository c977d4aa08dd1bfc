"""How Hugging Face calls the modules of a model of ours: the tables of `minitransformer/pretrained`, read backwards.

    blocks.0.attention.query     Llama  model.layers.0.self_attn.q_proj
                                 BERT   bert.encoder.layer.0.attention.self.query
                                 GPT-2  transformer.h.0.attn.c_attn, of which query is one part of three

A class with a head has the Transformer as a part (`model.`, `bert.`, `transformer.`), the bare model has not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from minitransformer.config import TransformerConfig
from minitransformer.heads import SequenceClassifier
from minitransformer.pretrained import bert, gpt2, llama
from minitransformer.pretrained.saving import writer_of
from minitransformer.pretrained.state_dict import Form
from minitransformer.transformer import Transformer
from peft.sites import sites_of

PARTS = gpt2.PARTS  # of c_attn, in their order


# Where an architecture differs: the linear layer over every token, in its class …ForTokenClassification; and linear
# layers that it has and we have not, below the Transformer.
CLASSIFIERS = {bert.FORM: "classifier", gpt2.FORM: "classifier"} | dict.fromkeys(llama.FORMS, "score")
UNNAMED = {bert.FORM: ("pooler.dense",)}


class Place(NamedTuple):
    """Where a linear layer of ours is: in a module of theirs, whole or as one part of it."""

    module: str
    part: str | None = None


@dataclass(frozen=True)
class Names:
    """The names of one model, ours and theirs."""

    form: Form
    transformer: Transformer
    root: str  # in front of our names: "", or "transformer." in a SequenceClassifier
    linears: dict[str, nn.Linear]  # our linear layers that have a place, by their sites
    places: dict[str, Place]
    head: dict[str, str]  # our tensors of a head that may be trained whole -> theirs
    others: tuple[str, ...]  # linear layers that only theirs has

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config

    @cached_property
    def modules(self) -> dict[str, dict[str | None, str]]:
        """Their linear layer -> our site of each of its parts."""
        found: dict[str, dict[str | None, str]] = {}
        for site, place in self.places.items():
            found.setdefault(place.module, {})[place.part] = site
        return found

    def linears_of(self, module: str) -> dict[str | None, nn.Linear]:
        """Our linear layers in one of theirs, by part."""
        return {part: self.linears[site] for part, site in self.modules[module].items()}

    def shape(self, module: str) -> tuple[int, int]:
        """d_in and d_out of a linear layer of theirs."""
        layers = [*self.linears_of(module).values()]
        return layers[0].in_features, sum(layer.out_features for layer in layers)

    def site(self, module: str) -> str:
        """The full name of a module of our Transformer."""
        return f"{self.root}{module}"


def names_of(model: nn.Module, tensors: Iterable[str] | None = None) -> Names:
    """The names of a model, as the class writes them that it would be in theirs; or as those tensors of a folder do.

    Raises:
        ValueError: no Transformer, alone or in a SequenceClassifier; or none that an architecture of theirs computes.
    """
    sites = sites_of(model)
    found = [(name, site.module) for name, site in sites.items() if isinstance(site.module, Transformer)]
    outer = sites[""].module
    if len(found) != 1 or not isinstance(outer, (Transformer, SequenceClassifier)):
        raise ValueError("the folder is about one Transformer, alone or in a SequenceClassifier; give such a model")
    name, transformer = found[0]
    root, writer = f"{name}." * bool(name), writer_of(transformer.config)
    form, base = writer.form, f"{writer.form.base}."
    if tensors is None:
        is_bare = transformer.config.lm_head == "none" and not root
    else:
        is_bare = not any(tensor.startswith(f"base_model.model.{base}") for tensor in tensors)
    base *= not is_bare
    linears, places = {}, {}
    for ours, theirs in writer.names(transformer.config.n_layers).items():
        site = f"{root}{ours}"
        if site in sites and isinstance(sites[site].module, nn.Linear):
            linears[site] = sites[site].module
            places[site] = _place(theirs if ours.startswith("head") else f"{base}{theirs}")
    others = (*(f"{base}{name}" for name in UNNAMED.get(form, ())), "lm_head", "cls.predictions.decoder")
    return Names(form, transformer, root, linears, places, _head(form, outer), others)


def _place(name: str) -> Place:
    """`gpt2.py` calls the parts of c_attn by names below its own."""
    module, _, part = name.rpartition(".")
    return Place(module, part) if module.endswith("c_attn") else Place(name)


def _head(form: Form, outer: nn.Module) -> dict[str, str]:
    if isinstance(outer, SequenceClassifier):
        return {f"head.{last}": f"{CLASSIFIERS[form]}.{last}" for last in ("weight", "bias")}
    return {"head.weight": "lm_head.weight"} if outer.config.lm_head == "untied" else {}


def short(chosen: Iterable[str], others: Iterable[str]) -> list[str]:
    """For each name its shortest end, by whole parts, that none of the other names has: `q_proj` if all are chosen."""
    ends, others = [], [f".{other}" for other in others]
    for name in chosen:
        parts = name.split(".")
        own = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        ends.append(next((end for end in own if not any(other.endswith(f".{end}") for other in others)), name))
    return list(dict.fromkeys(ends))


def ends_in(name: str, ends: Iterable[str]) -> bool:
    """Whether a name is one of these, or ends in one by whole parts."""
    return any(f".{name}".endswith(f".{end}") for end in ends)
