"""A checkpoint as Hugging Face's libraries save it: a folder with config.json and the weights.

The weights are one file (model.safetensors, pytorch_model.bin) or several with an index that says which tensor is in
which. Safetensors is preferred, and a .bin file, which is a pickle, is read without running code from it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import load_file

from minitransformer.pretrained import bert, gpt2, llama
from minitransformer.pretrained.state_dict import Form
from minitransformer.transformer import Transformer

READERS: tuple[tuple[Form, Callable[..., Transformer]], ...] = (
    (bert.FORM, bert.from_bert),
    (gpt2.FORM, gpt2.from_gpt2),
    *((form, llama.from_llama) for form in llama.FORMS),
)
FORMATS = (("model.safetensors", "*.safetensors.index.json"), ("pytorch_model.bin", "*.bin.index.json"))
LFS = b"version https://git-lfs"
LOOK_LIKE_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


def from_pretrained(folder: str | Path, leave_out: tuple[str, ...] = ()) -> Transformer:
    """The model in a folder that `save_pretrained` of Hugging Face's transformers wrote, in evaluation mode.

    Args:
        folder: on this machine; nothing is downloaded.
        leave_out: beginnings of tensors' names, as messages give them, that are not wanted: ("classifier.",).

    Raises:
        ValueError: the folder, its config, its weights or one of their files is absent or cannot be read; an
            architecture that has no reader; and what the readers (`from_bert`, `from_gpt2`, `from_llama`) refuse.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = (
            "is a file; pass the folder that it is in"
            if folder.exists()
            else "is absent; download the checkpoint first"
        )
        raise ValueError(f"{folder} {what}")
    config = read_json(folder / "config.json", "the checkpoint's config")
    reader = _reader(config)
    return reader(_weights(folder), config, leave_out)


def _reader(config: Mapping[str, Any]) -> Callable[..., Transformer]:
    """By model_type, and where the config has none, by the classes that it names."""
    kind, classes = config.get("model_type"), config.get("architectures")
    fitting = [reader for form, reader in READERS if form.is_of(config)] if kind or classes else []
    if not fitting:
        raise ValueError(
            f"config.json has model_type={kind!r} and architectures={classes!r}, for which there is no reader; choose "
            f"a checkpoint whose model_type is one of {', '.join(form.model_type for form, _ in READERS)}, or write it "
            f"into config.json where it is only missing"
        )
    return fitting[0]


def _weights(folder: Path) -> Mapping[str, Any]:
    """The contents of the one file, or of all shards together."""
    for one_file, index in FORMATS:
        found = [path for path in (folder / one_file, *sorted(folder.glob(index))) if path.is_file()]
        if len(found) > 1:
            raise ValueError(
                f"{folder} has {' and '.join(path.name for path in found)}; remove the one that is not meant"
            )
        if found:
            return _read_shards(found[0]) if found[0].suffix == ".json" else read_tensors(found[0])
    others = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in LOOK_LIKE_WEIGHTS)[:3])
    raise ValueError(
        f"{folder} has no weights: model.safetensors, pytorch_model.bin and an index of shards (*.index.json) are all "
        f"absent{others and f' (there is {others})'}; add one, or save the model again in one of these forms"
    )


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors of every shard; each shard holds exactly those that the index says."""
    shard_of = read_json(index, "the index of the shards").get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map, which says which tensor is in which file; download it again")
    for shard in shard_of.values():
        if not _is_plain_name(shard):
            raise ValueError(
                f"{index} names {shard!r}, which is no file right in its folder; choose another checkpoint"
            )
    shards = list(dict.fromkeys(shard_of.values()))
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ValueError(
            f"of {len(shards)} shards in {index}, {', '.join(absent[:3])}{', …' * (len(absent) > 3)} is absent; add it"
        )
    tensors: dict[str, Any] = {}
    for shard in shards:
        held = read_tensors(index.parent / shard)
        said = {name for name, file in shard_of.items() if file == shard}
        if held.keys() != said:
            name = min(map(str, held.keys() ^ said))
            has, lacks = (index.name, shard) if name in said else (shard, index.name)
            raise ValueError(f"{has} has {name!r} and {lacks} has not; download both again, so that they fit together")
        tensors |= held
    return tensors


def _is_plain_name(shard: Any) -> bool:
    """Whether this names a file right in the folder, on every system."""
    return (
        isinstance(shard, str)
        and shard not in ("", "..")
        and PurePosixPath(shard).name == PureWindowsPath(shard).name == shard
    )


def read_tensors(file: Path) -> Mapping[str, Any]:
    """The dict in a file of safetensors or a pickle, from which no code is run; ValueError if it cannot be read."""
    with open(file, "rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(f"{file} is a pointer of Git LFS and not the weights; get them by `git lfs pull`")
    safe = file.suffix == ".safetensors"
    try:
        held = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{file} cannot be read as {'safetensors' if safe else 'a pickle of tensors alone'} "
            f"({type(error).__name__}: {reason}): it is cut off, damaged or of another kind; download it again, or "
            f"save its state dict as safetensors where it was made"
        ) from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{file} holds a {type(held).__name__} and no state dict; save model.state_dict() instead")
    return held


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a file of JSON; ValueError, with the cure, if there is none."""
    if not file.is_file():
        raise ValueError(f"{file} is absent, {what}; download it with the weights")
    try:
        text = file.read_text(encoding="utf-8-sig")
        held = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} holds no JSON object, but {type(held).__name__}; download it again")
    return held


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values; ValueError for a name that is there twice, of which readers differ."""
    if len(held := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return held


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
