"""Folders of a config and a file of safetensors, damaged at random in ways that a reader must notice.

What cannot be noticed is left out: the form has no checksum, so another finite value of a tensor, of another name of
the base or of a comment is as good as the one that was there. So are the metadata of safetensors and the white space.
"""

import json
import pickle
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Damage = tuple[str, Callable[[Path], None]]  # what it is, and how it is done to a sound folder
OTHER_BYTES = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"hello",
    "another format": b"\x1f\x8b\x08\x00" + bytes(40),
    "a pointer of LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html></html>",
}
BEYOND = "-1e999"  # a number that JSON allows and no float holds
OF_NO_OPTION = [
    "x", -1, 1.5, True, ["x"], [[]], {"x": "x"}, {"q_proj": -1}, {"x": [[]]}, float("nan"), float("inf"), BEYOND,
    10**30,
]  # fmt: skip


class Code:
    """A pickle of it runs code when it is read: it makes a file."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def all_damages(config: str, weights: str, generator: random.Random, n: int) -> Iterator[Damage]:
    """Of both files; `n` times each kind that is random."""
    yield from of_either_file(config, weights)
    yield from of_json(config, generator, n)
    yield from of_safetensors(weights, generator, n)
    yield from of_tensors(weights, generator, n)


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def of_either_file(config: str, weights: str) -> Iterator[Damage]:
    """Absent, or not what the name says."""
    for name in (config, weights):
        yield f"{name}: absent", lambda folder, name=name: (folder / name).unlink()
        for what, data in OTHER_BYTES.items():
            yield f"{name}: {what}", changed(name, lambda _, data=data: data)

        def a_folder(folder: Path, name=name) -> None:
            (folder / name).unlink()
            (folder / name).mkdir()

        def a_link_to_nothing(folder: Path, name=name) -> None:
            (folder / name).unlink()
            (folder / name).symlink_to("../nothing")

        yield f"{name}: a folder", a_folder
        yield f"{name}: a link to nothing", a_link_to_nothing

    def a_pickle(folder: Path) -> None:
        (folder / weights).write_bytes(pickle.dumps({"weight": Code(folder / "run")}))

    def a_bin(folder: Path) -> None:
        a_pickle(folder)
        (folder / weights).rename(folder / "pytorch_model.bin")
        (folder / "adapter_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes())

    yield f"{weights}: a pickle that runs code", a_pickle
    yield "a .bin that runs code", a_bin


def of_json(name: str, generator: random.Random, n: int) -> Iterator[Damage]:
    """Text that is no JSON, or that two readers could read in two ways."""
    for _ in range(n):
        share, bit, junk = generator.random(), generator.randrange(8), generator.choice((b"\xff", b"\xc3\x28", b"\x00"))

        def cut(data: bytes, share=share) -> bytes:
            return data[: int(share * len(data.rstrip(b" \n}")))]

        def flip(data: bytes, share=share, bit=bit) -> bytes:
            places = [match.start() for match in re.finditer(rb'"', data)]
            place = places[int(share * len(places))]
            return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

        def put_in(data: bytes, share=share, junk=junk) -> bytes:
            place = int(share * len(data))
            return data[:place] + junk + data[place:]

        yield f"{name}: cut at {share:.2f}", changed(name, cut)
        yield f"{name}: bit {bit} of a quotation mark at {share:.2f}", changed(name, flip)
        yield f"{name}: {junk!r} at {share:.2f}", changed(name, put_in)

        def twice(data: bytes, share=share) -> bytes:
            values = json.loads(data)
            key = list(values)[int(share * len(values))]
            return b"{" + f'"{key}": 3, '.encode() + data[data.index(b"{") + 1 :]

        yield f"{name}: a key twice, {share:.2f}", changed(name, twice)
    for what, text in {
        "nested too deep": b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a list": b"[]",
        "a string": b'"LORA"',
        "null": b"null",
        "in UTF-16": '{"r": 3}'.encode("utf-16"),
        "too long a number": b'{"r": ' + b"9" * 10_000 + b"}",
        "an empty object": b"{}",
    }.items():
        yield f"{name}: {what}", changed(name, lambda _, text=text: text)
    yield f"{name}: two objects", changed(name, lambda data: data + data)


def of_options(name: str, options: dict[str, list]) -> Iterator[Damage]:
    """Each option of the config with each of the values that it cannot have."""
    for option, values in options.items():
        for value in values:

            def put(data: bytes, option=option, value=value) -> bytes:
                text = json.dumps({**json.loads(data), option: "<here>" if value is BEYOND else value})
                return text.replace('"<here>"', "-1e999").encode()

            yield f"{option}={value!r:.40}", changed(name, put)


def of_safetensors(name: str, generator: random.Random, n: int) -> Iterator[Damage]:
    """The bytes of a file of tensors: its length, its header, its end."""
    for _ in range(n):
        share, bit, byte = generator.random(), generator.randrange(8), generator.randrange(8)

        def cut(data: bytes, share=share) -> bytes:
            return data[: int(share * len(data))]

        def flip(data: bytes, share=share, bit=bit) -> bytes:
            stop = 8 + int.from_bytes(data[:8], "little")
            known = data.index(b"}", data.index(b"__metadata__")) if b"__metadata__" in data[:stop] else 9
            places = [place for place in range(known + 1, stop) if data[place] not in b" "]
            place = places[int(share * len(places))]
            return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

        def length(data: bytes, bit=bit, byte=byte) -> bytes:
            return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]

        yield f"{name}: cut at {share:.2f}", changed(name, cut)
        yield f"{name}: bit {bit} of the header at {share:.2f}", changed(name, flip)
        yield f"{name}: bit {bit} of byte {byte} of the length", changed(name, length)
        yield f"{name}: {byte + 1} bytes more", changed(name, lambda data, byte=byte: data + bytes(byte + 1))
    huge = {"dtype": "F32", "data_offsets": [0, 4]}
    for what, header in {
        "a size beyond all memory": {"x": {**huge, "shape": [2**62, 2**62]}},
        "a negative size": {"x": {**huge, "shape": [-1]}},
        "offsets beyond the end": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}},
        "offsets backwards": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        "tensors that overlap": {name: {**huge, "shape": [1]} for name in "xy"},
        "an unknown type": {"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}},
        "a list": [],
        "no tensor": {},
    }.items():
        text = json.dumps(header).encode()
        data = struct.pack("<Q", len(text)) + text + bytes(4 * (header != {}))
        yield f"{name}: {what}", changed(name, lambda _, data=data: data)
    deep = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield f"{name}: nested too deep", changed(name, lambda _: struct.pack("<Q", len(deep)) + deep)


def of_tensors(name: str, generator: random.Random, n: int) -> Iterator[Damage]:
    """A sound file of other tensors."""

    def with_one(share: float, change: Callable) -> Callable[[Path], None]:
        """`change(tensors, key)` returns what replaces them."""

        def damage(folder: Path) -> None:
            tensors = load_file(folder / name)
            key = sorted(tensors)[int(share * len(tensors))]
            tensors = change(tensors, key)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)

        return damage

    def one_value(value: float, share: float) -> Callable:
        def change(tensors: dict, key: str) -> dict:
            tensors[key].view(-1)[int(share * tensors[key].numel())] = value
            return tensors

        return change

    for _ in range(n):
        share = generator.random()
        changes = {
            "lost": lambda t, key: {k: v for k, v in t.items() if k != key},
            "renamed": lambda t, key: {k + "x" * (k == key): v for k, v in t.items()},
            "named without its beginning": lambda t, key: {k[(k == key) :]: v for k, v in t.items()},
            "named by a path": lambda t, key: {("../" + k if k == key else k): v for k, v in t.items()},
            "added": lambda t, key: {**t, f"{key}.more": t[key].clone()},
            "of a block that is not there": lambda t, key: {
                re.sub(r"\.\d+\.", ".7.", k) if k == key and re.search(r"\.\d+\.", k) else k + "x" * (k == key): v
                for k, v in t.items()
            },
            "a row longer": lambda t, key: {**t, key: torch.cat([t[key], t[key][:1]])},
            "a row shorter": lambda t, key: {**t, key: t[key][:-1]},
            "an axis more": lambda t, key: {**t, key: t[key][..., None, None]},
            "flat": lambda t, key: {**t, key: t[key].reshape(1, 1, -1)},
            "whole numbers": lambda t, key: {**t, key: t[key].to(torch.int32)},
            "of eight bits": lambda t, key: {**t, key: t[key].to(torch.float8_e4m3fn)},
            "complex": lambda t, key: {**t, key: t[key].to(torch.complex64)},
            "NaN": one_value(float("nan"), generator.random()),
            "infinite": one_value(float("-inf"), generator.random()),
        }
        for what, change in changes.items():
            yield f"{name}: {what}, {share:.2f}", with_one(share, change)
