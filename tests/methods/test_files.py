"""Files: whole or not at all, ours or refused, and the model as it was whenever something is wrong."""

import json
import os
import pickle
import random

import pytest
import torch
from reference.kinds import of_kind
from reference.method_cases import RECIPES, SETS, assert_same, each_of, fingerprint, outputs, train_a_little
from safetensors.torch import load_file, save_file

import peft
from minitransformer.files import pack
from peft import LoRA, checkpoint, contents

SMALL = LoRA(rank=1, targets=("blocks.0.attention.query",), train=("B",))


@pytest.fixture
def small(decoder, tmp_path):
    """A path to a file of a method with few numbers, and its model."""
    model = train_a_little(peft.attach(decoder(), SMALL, seed=4))
    peft.save(model, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors", model


def refused(model, path, message):
    """`load` raises and leaves the model as it was; with the file's own recipe attached and without."""
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        peft.load(model, path)
    assert_same(before, fingerprint(model))


@of_kind("encoder-post")
@each_of("recipes", SETS)
def test_a_saved_method_gives_the_same_outputs_in_another_model(tiny, tmp_path, recipes):
    model = tiny()
    for number, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=number)
    train_a_little(model)
    peft.save(model, tmp_path / "file")
    fresh = peft.load(tiny(), tmp_path / "file")
    assert torch.equal(outputs(fresh), outputs(model))
    assert peft.attached(fresh) == peft.attached(model)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    expected = outputs(model)
    assert torch.equal(outputs(peft.load(train_a_little(model), tmp_path / "file")), expected)


def test_a_file_holds_exactly_the_declared_tensors_and_no_base_weight(small):
    path, model = small
    tensors = load_file(path)
    assert tensors.keys() == peft.state_dict(model).keys()
    assert all(torch.equal(tensors[name], t) for name, t in peft.state_dict(model).items())
    assert path.stat().st_size < 1500


def test_the_same_tensors_give_the_same_bytes(small, tmp_path):
    path, model = small
    peft.save(peft.load(model, path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_one_flipped_bit_anywhere_is_noticed(small, tmp_path, decoder):
    path, _ = small
    data, generator, broken = path.read_bytes(), random.Random(0), tmp_path / "broken"
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.randrange(8)
        broken.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|another format"):
            contents.read(broken)
    model = decoder()
    for place in generator.sample(range(len(data)), 20):
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.randrange(8)
        broken.write_bytes(damaged)
        refused(model, broken, r"damaged|another format")


def test_the_same_contents_written_in_another_way_are_noticed(small, decoder):
    """The checksum covers what is read; comparing the bytes also covers what a reader would skip."""
    path, _ = small
    length = int.from_bytes(path.read_bytes()[:8], "little")
    record = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    save_file(load_file(path), path, metadata=record | {"note": "hello"})
    refused(decoder(), path, "damaged")


def test_a_file_cut_off_or_prolonged_anywhere_is_refused(small, tmp_path, decoder):
    path, _ = small
    data, broken = path.read_bytes(), tmp_path / "broken"
    for end in [*range(0, len(data), 7), len(data) - 1]:
        broken.write_bytes(data[:end])
        with pytest.raises(ValueError, match="damaged"):
            contents.read(broken)
    for more in (b"\0", b" ", data):
        broken.write_bytes(data + more)
        refused(decoder(), broken, "damaged")


FOREIGN = {
    "empty": b"",
    "text": b"hello, world",
    "pickle": pickle.dumps({"A": [1.0]}),
    "zeros": bytes(100),
    "random": random.Random(1).randbytes(500),
    "huge header": b"\xff" * 8 + b"{}",
    "deep header": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "list header": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_file_is_refused(decoder, tmp_path, data):
    (tmp_path / "foreign").write_bytes(data)
    refused(decoder(), tmp_path / "foreign", "not a file that peft.save wrote")


def test_a_pickle_that_would_run_code_does_not_run_it(decoder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "bomb").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "bomb.pt")
    for name in ("bomb", "bomb.pt"):
        refused(decoder(), tmp_path / name, "not a file")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_files_of_others_are_refused(decoder, tmp_path):
    save_file({"A": torch.zeros(2)}, tmp_path / "plain")
    save_file({"A": torch.zeros(2)}, tmp_path / "other", metadata={"peft": json.dumps({"format": "theirs 1"})})
    save_file({"A": torch.zeros(2)}, tmp_path / "list", metadata={"peft": "[]"})
    for name, message in (("plain", "not a file"), ("other", "another format"), ("list", "another format")):
        refused(decoder(), tmp_path / name, message)


def rewritten(path, change_tensors=None, change_record=None):
    """A file with another content and a checksum that fits it: what only a wrong program could write."""
    tensors, record = contents.read(path)
    if change_tensors:
        change_tensors(tensors)
    if change_record:
        change_record(record)
    path.write_bytes(pack(tensors, record, contents.KEY))


NAME = "blocks.0.attention.query.A"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(NAME), "1 missing .*query.A"),
    "unexpected": (lambda t: t.update({"blocks.7.A": torch.zeros(1)}), "1 unexpected .*blocks.7.A"),
    "renamed": (lambda t: t.update({NAME.replace("0", "1"): t.pop(NAME)}), "1 missing .*1 unexpected"),
    "shape": (lambda t: t.update({NAME: torch.zeros(2, 16)}), r"shape \[2, 16\]"),
    "transposed": (lambda t: t.update({NAME: torch.zeros(16, 1)}), r"shape \[16, 1\]"),
    "nan": (lambda t: t[NAME].fill_(float("nan")), "NaN"),
    "infinite": (lambda t: t[NAME].fill_(float("inf")), "infinity"),
}
BAD_RECORDS = {
    "unknown method": (lambda r: r["methods"][0]["recipe"].update(method="Magic"), "'Magic' is unknown"),
    "unknown option": (lambda r: r["methods"][0]["recipe"].update(colour=1), "does not fit"),
    "bad option": (lambda r: r["methods"][0]["recipe"].update(rank=0), "rank"),
    "bad rank": (lambda r: r["methods"][0]["recipe"].update(rank=99), "rank"),
    "other target": (lambda r: r["methods"][0]["recipe"].update(targets=["nothing"]), "'nothing'"),
    "no methods": (lambda r: r.pop("methods"), "not complete"),
    "no seed": (lambda r: r["methods"][0].pop("seed"), "not complete"),
    "no base": (lambda r: r.pop("base"), "not complete"),
    "base is no text": (lambda r: r.update(base=7), "not complete"),
    "merged is no yes or no": (lambda r: r.update(merged="no"), "not complete"),
    "no recipe": (lambda r: r["methods"][0].update(recipe=None), "not complete"),
    "other base": (lambda r: r.update(base="0" * 64), "another base"),
}


@pytest.mark.parametrize("present", [False, True], ids=["fresh", "attached"])
@pytest.mark.parametrize("change, message", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(small, decoder, change, message, present):
    path, model = small
    rewritten(path, change_tensors=change)
    refused(model if present else decoder(), path, message)


@pytest.mark.parametrize("change, message", BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_records_that_do_not_fit_are_refused(small, decoder, change, message):
    path, _ = small
    rewritten(path, change_record=change)
    refused(decoder(), path, message)


@pytest.mark.parametrize("present", [False, True], ids=["fresh", "attached"])
@pytest.mark.parametrize("changes", [{"seed": 1}, {"n_layers": 3}, {"max_len": 13}, {"n_segments": 2}], ids=str)
def test_another_base_is_refused(small, decoder, changes, present):
    path, _ = small
    other = decoder(**changes)
    if present:
        peft.attach(other, SMALL, seed=4)
    refused(other, path, "another base")


def test_a_base_of_another_precision_or_with_one_changed_number_is_refused(small, decoder):
    path, _ = small
    refused(decoder().double(), path, "another base")
    model = decoder()
    with torch.no_grad():
        model.embedding.position.weight[3, 3] += 1e-6
    refused(model, path, "another base")


def test_a_second_method_that_does_not_fit_takes_the_first_out_again(tiny, tmp_path):
    model = peft.attach(peft.attach(tiny(), RECIPES["lora"]), RECIPES["houlsby"])
    peft.save(model, tmp_path / "two")
    rewritten(tmp_path / "two", change_record=lambda r: r["methods"][1]["recipe"].update(placement="nowhere"))
    refused(tiny(), tmp_path / "two", "nowhere")
    rewritten(tmp_path / "two", change_record=lambda r: r["methods"].__setitem__(1, r["methods"][0]))
    refused(tiny(), tmp_path / "two", "already")


def test_loading_beside_other_methods_is_refused(small, decoder):
    path, _ = small
    for recipe, seed in ((RECIPES["houlsby"], 0), (LoRA(rank=2), 0)):
        refused(peft.attach(decoder(), recipe, seed=seed), path, "detach")


def test_a_missing_file_says_so(decoder, tmp_path):
    with pytest.raises(FileNotFoundError):
        peft.load(decoder(), tmp_path / "nothing")


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_method_with_a_nan_is_not_saved_and_the_old_file_stays(small, broken):
    path, model = small
    data = path.read_bytes()
    with torch.no_grad():
        model.blocks[0].attention.query.B[0] = broken
    with pytest.raises(ValueError, match=r"query.B holds a NaN"):
        peft.save(model, path)
    assert path.read_bytes() == data


def test_a_model_without_a_method_is_not_saved(decoder, tmp_path):
    with pytest.raises(ValueError, match="no method is attached"):
        peft.save(decoder(), tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_save_that_fails_keeps_the_old_file_and_leaves_no_stray_one(small, monkeypatch, function, error):
    path, model = small
    data = path.read_bytes()
    train_a_little(model)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        peft.save(model, path)
    monkeypatch.undo()
    assert path.read_bytes() == data
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_saved_file_is_as_readable_as_any_other(small, tmp_path):
    (tmp_path / "ordinary").write_text("")
    assert small[0].stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def mutated(data, generator):
    """One random defect of a file: bits flipped, cut off, bytes inserted, removed, swapped or overwritten."""
    damaged, place = bytearray(data), generator.randrange(len(data))
    other, size = generator.randrange(len(data)), generator.randrange(1, 40)
    kind = generator.randrange(7)
    if kind == 0:
        damaged[place] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del damaged[place:]
    elif kind == 2:
        damaged[place:place] = generator.randbytes(size)
    elif kind == 3:
        del damaged[place : place + size]
    elif kind == 4:
        damaged[place : place + size], damaged[other : other + size] = (
            damaged[other : other + size],
            damaged[place : place + size],
        )
    elif kind == 5:
        damaged[place : place + size] = generator.randbytes(size)
    else:
        damaged[place : place + size] = bytes(size)
    return bytes(damaged)


@pytest.mark.slow
@pytest.mark.parametrize("present", [False, True], ids=["fresh model", "same recipe attached"])
def test_a_thousand_random_defects_none_accepted_none_crashes_and_the_outputs_stay(decoder, tmp_path, present):
    generator, path = random.Random(5), tmp_path / "method"
    recipes = SETS["everything"] if present else SETS["prefix + parallel adapter"]
    model = decoder()
    for recipe in recipes:
        peft.attach(model, recipe)
    peft.save(train_a_little(model), path)
    data, model = path.read_bytes(), model if present else decoder()
    before, records, tried = outputs(model), peft.attached(model), 0
    while tried < 500:
        damaged = mutated(data, generator)
        if damaged == data:
            continue
        tried += 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            peft.load(model, path)
        assert torch.equal(outputs(model), before) and peft.attached(model) == records
    path.write_bytes(data)
    peft.load(model, path)


@pytest.mark.parametrize("recipes", SETS.values(), ids=SETS.keys())
def test_a_file_is_its_numbers_and_a_few_hundred_bytes_of_names(decoder, tmp_path, recipes):
    model = decoder()
    for recipe in recipes:
        peft.attach(model, recipe)
    peft.save(model, tmp_path / "file")
    size, tensors = (tmp_path / "file").stat().st_size, peft.state_dict(model)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert 4 * numbers < size < 4 * numbers + 600 + 130 * len(tensors) + 300 * len(recipes)


def test_lora_on_the_toy_backbone_is_a_few_dozen_kilobytes(tmp_path):
    from minitransformer.pretrained import toy_backbone

    model = peft.attach(toy_backbone(), LoRA(rank=4, alpha=8))
    peft.save(model, tmp_path / "lora")
    assert (tmp_path / "lora").stat().st_size < 40_000 < sum(p.numel() for p in model.parameters()) / 20


def test_a_file_is_described_without_a_model(decoder, tmp_path):
    model = peft.attach(decoder(), LoRA(rank=2, alpha=3.0), seed=7, train_also=("norm",))
    peft.attach(model, RECIPES["prefix kv"], seed=8)
    peft.save(model, tmp_path / "file")
    found = peft.describe(tmp_path / "file")
    assert found.recipes == ("LoRA(rank=2, alpha=3.0)", "PrefixTuning(length=3)")
    assert found.seeds == (7, 8) and found.train_also == ("norm",) and not found.merged
    assert found.tensors == {name: tuple(t.shape) for name, t in peft.state_dict(model).items()}
    assert found.numbers == sum(t.numel() for t in peft.state_dict(model).values())
    assert found.bytes == (tmp_path / "file").stat().st_size and found.base == checkpoint.base_hash(model)
    text = str(found)
    for part in ("LoRA(rank=2, alpha=3.0), seed 7", "norm, trained whole", "blocks.1.attention.query.A [2, 16]"):
        assert part in text
    assert "merged" not in text
    assert text.endswith(f"\ntrained on the base {found.base[:12]}…")
    with pytest.raises(ValueError, match="not a file that peft"):
        (tmp_path / "file").write_bytes(b"something else")
        peft.describe(tmp_path / "file")
