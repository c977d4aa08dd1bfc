"""Folders of Hugging Face's peft, damaged or not meant for the model: none is attached, none changes the model.

What is counted as damage must be noticed: `reference/damaged_folders.py` says what cannot be, since the form has no
checksum. In a config that is any other finite alpha, and whatever has no part in what is computed (`NO_PART`).
"""

import json
import random
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from exchange.test_golden import CONFIGS, REFUSED, base_of, folder_of
from reference.damaged_folders import OF_NO_OPTION, all_damages, of_options
from reference.exchange_with_huggingface import BASES, our_base
from safetensors.torch import load_file, save_file

import peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ["LORA", "IA3", "VERA", "PREFIX_TUNING", "PROMPT_TUNING"]
CELLS = ["llama: LoRA, head trained whole", *[cell for cell in CONFIGS if cell not in REFUSED]]
# Options that say where a folder is from, or how training began; only of an odd type are they refused, if at all.
NO_PART = {
    "auto_mapping", "base_model_name_or_path", "d_initial", "encoder_hidden_size", "fan_in_fan_out", "inference_mode",
    "init_ia3_weights", "init_lora_weights", "init_weights", "megatron_core", "peft_version", "prefix_projection",
    "projection_prng_key", "prompt_tuning_init", "prompt_tuning_init_text", "qalora_group_size", "revision",
    "save_projection", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
HARMLESS = [  # another finite scale, and a layer that is not there and is left out
    ("lora_alpha", -1), ("lora_alpha", 1.5), ("alpha_pattern", {"q_proj": -1}), ("use_rslora", True),
    ("exclude_modules", ["x"]),
]  # fmt: skip


def damages(cell, n):
    """`n` times each kind that is random."""
    config = CONFIGS[cell]
    yield from all_damages(CONFIG, WEIGHTS, random.Random(cell), n)
    options = {name: [*OF_NO_OPTION] for name in config.keys() - NO_PART}
    options["peft_type"] += [None, "lora", "OFT", "LOHA", "X_LORA", *[m for m in METHODS if m != config["peft_type"]]]
    options |= {"an_option_of_tomorrow": [1, "x", True], "r": [None, 0, 2**29, -3], "lora_alpha": [None, 0]}
    options |= {"num_virtual_tokens": [None, 0, 2**29, -3], "target_modules": [None, [], "x", ["x"], ["q_proj", ["x"]]]}
    options = {name: values for name, values in options.items() if name in config or name == "an_option_of_tomorrow"}
    options = {
        name: [v for v in values if (name, v) not in HARMLESS and not (type(v) is bool and v is config.get(name))]
        for name, values in options.items()
    }
    if cell == "llama: LoRA, all-linear":  # which names every module in full, and so without regard to layers
        del options["layers_to_transform"]
    yield from of_options(CONFIG, options)


def state(model):
    """All that must be as before: modules and what they know, flags, and every bit of every tensor."""
    modules = {name: (id(m), type(m), m.training, frozenset(vars(m))) for name, m in model.named_modules()}
    tensors = {name: (id(t), t.requires_grad, t.detach().clone()) for name, t in model.named_parameters()}
    return modules, tensors, peft.attached(model)


def assert_as_before(before, after, what):
    assert before[0] == after[0] and before[2] == after[2] and before[1].keys() == after[1].keys(), what
    for name, (identity, flag, values) in before[1].items():
        assert (identity, flag) == after[1][name][:2] and torch.equal(values, after[1][name][2]), (what, name)


def mixed(model):
    """In training, some tensors frozen: a state that nobody would restore by accident."""
    model.train().blocks[0].eval()
    model.embedding.token.weight.requires_grad_(False)
    model.blocks[1].attention.query.weight.requires_grad_(False)
    return model


EVERY_CELL = [pytest.param(cell, 4, marks=pytest.mark.slow, id=cell) for cell in CELLS]


@pytest.mark.parametrize("cell, n", [pytest.param(CELLS[0], 1, id="some"), *EVERY_CELL])
def test_no_damaged_folder_is_attached(cell, n, tmp_path, unchecked):
    folder_of(cell, tmp_path / "sound")
    model = mixed(base_of(cell))
    before, accepted, tried = state(model), [], [*damages(cell, n)]
    for what, damage in tried:
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "sound", folder)
        damage(folder)
        try:
            peft.from_huggingface(model, folder)
        except ValueError as error:
            assert str(error)
        else:
            accepted.append(what)
        assert not (folder / "run").exists(), what
        assert_as_before(before, state(model), what)
        shutil.rmtree(folder)
    assert not accepted and len(tried) >= (300 if "LoRA" in cell else 200)
    peft.from_huggingface(model, tmp_path / "sound")


@pytest.mark.parametrize("cell", ["llama: LoRA", "llama: prefix", "llama: VeRA", "gpt2: LoRA", "bert: LoRA"])
def test_a_folder_of_another_model_is_refused(cell, tmp_path):
    folder_of(cell, tmp_path / "theirs")
    for family in BASES.keys() - {cell.partition(":")[0]}:
        model = mixed(our_base(family))
        before = state(model)
        with pytest.raises(ValueError):
            peft.from_huggingface(model, tmp_path / "theirs")
        assert_as_before(before, state(model), family)


def test_what_is_refused_in_the_middle_leaves_nothing_behind(tmp_path):
    """The first recipe fits; the second has a rank that the layers cannot use, as only attaching it shows."""
    folder_of("llama: LoRA", tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    for name, tensor in tensors.items():
        if "v_proj" in name:
            tensors[name] = torch.ones(20, 16) if "lora_A" in name else torch.ones(len(tensor), 20)
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    config = {**CONFIGS["llama: LoRA"], "rank_pattern": {"v_proj": 20}}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    model = mixed(base_of("llama: LoRA"))
    before = state(model)
    with pytest.raises(ValueError, match="rank 20 exceeds"):
        peft.from_huggingface(model, tmp_path / "theirs")
    assert_as_before(before, state(model), "")


WATCHING = []  # lists of paths; a hook of the interpreter cannot be taken away again
sys.addaudithook(lambda event, args: [w.append(str(args[0])) for w in WATCHING] if event == "open" else None)


@contextmanager
def watched_files():
    """Gives the list of the paths that Python opens inside."""
    WATCHING.append([])
    try:
        yield WATCHING[-1]
    finally:
        WATCHING.pop()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "C:\\secret"])
def test_no_path_in_a_folder_is_followed(name, tmp_path):
    """Where a name of a file could stand: names of the base and of a tokenizer are read by nobody."""
    folder_of("llama: prompt", tmp_path / "theirs")
    config = CONFIGS["llama: prompt"] | {"base_model_name_or_path": name, "tokenizer_name_or_path": name}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(config))
    with watched_files() as opened:
        peft.from_huggingface(base_of("llama: prompt"), tmp_path / "theirs")
    assert any("theirs" in path for path in opened) and not any(name in path for path in opened)
    (tmp_path / "theirs" / WEIGHTS).unlink()
    index = {"weight_map": {"prompt_embeddings": name}}
    (tmp_path / "theirs" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is absent"):
        peft.from_huggingface(base_of("llama: prompt"), tmp_path / "theirs")


def test_files_may_be_links(tmp_path):
    """As in the cache of Hugging Face's hub."""
    folder_of("llama: LoRA", tmp_path / "blobs")
    (tmp_path / "theirs").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "theirs" / name).symlink_to(f"../blobs/{name}")
    assert peft.attached(peft.from_huggingface(base_of("llama: LoRA"), tmp_path / "theirs"))
