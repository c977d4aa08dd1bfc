"""Files of methods from the shell: into Hugging Face's form and out of it, and what a file or a folder holds.

    python -m peft convert method.safetensors folder --base smollm2
    python -m peft convert folder method.safetensors --base path/of/the/model
    python -m peft describe method.safetensors          or folder

A file of ours knows the very base that it was trained on, by a hash, and theirs only its name; so `convert` needs the
base, whose weights are read as float32. For a base of another type, or with a head on top, load the method there, and
call `to_huggingface` or `save`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import peft
from minitransformer.pretrained import from_pretrained, smollm2
from minitransformer.transformer import Transformer
from peft.exchange.folder import TENSORS, read_folder

# Of a config's options those that say where a method enters, and how large it is.
TELLING = (
    "r", "lora_alpha", "use_rslora", "use_dora", "num_virtual_tokens", "target_modules", "feedforward_modules",
    "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save",
)  # fmt: skip


def base_model(name: str) -> Transformer:
    """The base that a command line names: "smollm2", or a folder that `from_pretrained` reads."""
    return smollm2() if name == "smollm2" else from_pretrained(name)


def described(path: Path) -> str:
    """What a file of ours or a folder of Hugging Face's peft holds, without a model.

    Raises:
        ValueError: it is neither, or damaged.
        OSError: it cannot be read.
    """
    text = describe_folder(path) if path.is_dir() else str(peft.describe(path))
    return "\n".join(map(one_line, text.split("\n")))


def describe_folder(folder: Path) -> str:
    """The method of a folder, its sizes and places, its tensors, and the name of its base. Errors as in `described`."""
    config, tensors, _ = read_folder(folder)
    options = [f"{name}={config[name]!r}" for name in TELLING if config.get(name) not in (None, False, [], {})]
    size = (folder / TENSORS).stat().st_size
    lines = [f"{config.get('peft_type')!r}: {', '.join(options)}".rstrip(": ")]
    lines += [f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters, {size:,} bytes"]
    lines += [f"  {name!r} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())]
    name = config.get("base_model_name_or_path")
    return "\n".join([*lines, "its base has no name" if name is None else f"trained on the base {name!r}"])


def one_line(text: object) -> str:
    """What could steer a terminal, or begin another line, as an escape: names of tensors in a file can be anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def converted(source: Path, target: Path, base: str) -> None:
    """Write a file of ours as a folder of Hugging Face's peft, or such a folder as a file of ours.

    Raises:
        ValueError: the source is absent, damaged or of another base, or has no exact counterpart.
        OSError: a file cannot be read or written, or the target is there already.
        ModuleNotFoundError: the base is in a package that is not installed.
    """
    described(source)  # before the base is loaded
    if target.exists() and (source.is_dir() or not target.is_dir()):  # of a folder, writing it says whether it is empty
        raise FileExistsError(f"{target} is there already; choose another name, or remove it first")
    model = base_model(base)
    if source.is_dir():
        peft.save(peft.from_huggingface(model, source), target)
    else:
        peft.to_huggingface(peft.load(model, source), target, None if base == "smollm2" else base)


def convert(arguments: Sequence[str] | None = None) -> None:
    """`python -m peft convert`."""
    parser = argparse.ArgumentParser(
        "python -m peft convert", description="A file of ours to a folder of Hugging Face's peft, or back.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("source", type=Path, help="a file that peft.save wrote, or a folder of Hugging Face's peft")
    parser.add_argument("target", type=Path, help="the folder or the file to write")
    parser.add_argument("--base", required=True, help="smollm2, or a folder with config.json and the weights")
    options = parser.parse_args(arguments)
    try:
        converted(options.source, options.target, options.base)
        print(described(options.target))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.exit(1, f"{parser.prog}: {one_line(error)}\n")


def describe(arguments: Sequence[str] | None = None) -> None:
    """`python -m peft describe`."""
    parser = argparse.ArgumentParser(
        "python -m peft describe", description="What a file or folder of a method holds.", allow_abbrev=False
    )
    parser.add_argument("path", type=Path, help="a file that peft.save wrote, or a folder of Hugging Face's peft")
    options = parser.parse_args(arguments)
    try:
        print(described(options.path))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {one_line(error)}\n")
