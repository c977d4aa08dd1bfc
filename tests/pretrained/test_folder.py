"""Folders as Hugging Face's libraries save them: which files are read, and what is said of those that cannot be."""

import json
import pickle
import struct

import pytest
import torch
from reference.golden import read_golden
from safetensors.torch import save_file

from minitransformer.pretrained import from_bert, from_gpt2, from_pretrained

GPT2, BERT = read_golden("huggingface_gpt2"), read_golden("huggingface_bert")
WEIGHTS = {
    "gpt2": {name: GPT2.weight[name] for name in GPT2.names["GPT2LMHeadModel"] if name != "lm_head.weight"},
    "bert": {name: BERT.weight[name] for name in BERT.names["BertForMaskedLM"] if "decoder" not in name},
}
CONFIG = {"gpt2": GPT2.config, "bert": BERT.config}
N_SHARDS = 3


def write(folder, tensors, form):
    """The weights in one of the four forms."""
    name, kind = ("model", "safetensors") if "safetensors" in form else ("pytorch_model", "bin")
    save = save_file if kind == "safetensors" else torch.save
    if "shards" not in form:
        return save(tensors, folder / f"{name}.{kind}")
    shard_of = {key: f"{name}-{i % N_SHARDS + 1:05}-of-{N_SHARDS:05}.{kind}" for i, key in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        save({key: tensors[key] for key in tensors if shard_of[key] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of}
    (folder / f"{name}.{kind}.index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of a checkpoint."""

    def make(family="gpt2", form="safetensors", config=(), tensors=None):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG[family] | dict(config)))
        write(tmp_path, WEIGHTS[family] if tensors is None else tensors, form)
        return tmp_path

    return make


def change_index(folder, change):
    file = next(folder.glob("*.index.json"))
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["safetensors", "safetensors shards", "bin", "bin shards"])
@pytest.mark.parametrize("named_by", ["model_type", "architectures"])
def test_every_form_is_read_to_hugging_faces_numbers(folder, form, named_by):
    other = {"model_type": {"architectures": None}, "architectures": {"model_type": None}}[named_by]
    names = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}
    for family, golden in (("gpt2", GPT2), ("bert", BERT)):
        model = from_pretrained(folder(family, form, {"architectures": [names[family]]} | other))
        tokens, real = golden.input["tokens"], torch.ones(3, 7, dtype=torch.bool)
        inputs = (tokens,)
        if family == "bert":
            real = golden.input["padding_mask"]
            inputs = (tokens, real, golden.input["segments"])
        torch.testing.assert_close(model(*inputs)[real], golden.output["logits"][real], atol=1e-4, rtol=0)
        assert not model.training


def test_safetensors_are_preferred(folder):
    path = folder(form="safetensors")
    torch.save({name: torch.zeros_like(tensor) for name, tensor in WEIGHTS["gpt2"].items()}, path / "pytorch_model.bin")
    assert from_pretrained(str(path)).embedding.token.weight.abs().min() > 0


def test_a_bin_of_a_training_loop_is_read(folder):
    tensors = {f"module.{name}": tensor for name, tensor in WEIGHTS["gpt2"].items()}
    path = folder(form="bin", tensors={"epoch": 1, "state_dict": tensors})
    assert torch.equal(from_pretrained(path).embedding.token.weight, WEIGHTS["gpt2"]["transformer.wte.weight"])


def test_a_head_is_left_out(folder):
    path = folder("bert", tensors=WEIGHTS["bert"] | {"classifier.weight": torch.zeros(2, 24)})
    with pytest.raises(ValueError, match=r"classifier.weight; .*leave_out=\('classifier.',\)"):
        from_pretrained(path)
    assert from_pretrained(path, leave_out=("classifier.",)).config.lm_head == "bert"


def remove(pattern):
    return lambda path: [file.unlink() for file in path.glob(pattern)]


def overwrite(pattern, data):
    return lambda path: [file.write_bytes(data) for file in path.glob(pattern)]


def cut(pattern):
    return lambda path: [file.write_bytes(file.read_bytes()[:-100]) for file in path.glob(pattern)]


class Code:
    """A pickle of it runs code when it is read."""

    def __reduce__(self):
        return (print, ("run",))


UNREADABLE = {
    "no config": ("safetensors", remove("config.json"), "config.json is absent, the checkpoint's config; download it"),
    "config cut off": ("safetensors", cut("config.json"), "config.json is no JSON"),
    "config not of text": ("safetensors", overwrite("config.json", b"\xff\xfe{"), "config.json is no JSON"),
    "config a list": ("safetensors", overwrite("config.json", b"[]"), "config.json holds no JSON object, but list"),
    "no weights": ("safetensors", remove("*.safetensors"), r"no weights: model.safetensors, .* are all absent; add"),
    "weights of another library": (
        "safetensors",
        lambda path: (path / "model.safetensors").rename(path / "tf_model.h5"),
        r"absent \(there is tf_model.h5\); add one, or save the model again",
    ),
    "no index": ("safetensors shards", remove("*.index.json"), r"an index of shards .*there is model-00001-of-00003"),
    "no shard": ("bin shards", remove("*00002-of*"), "of 3 shards in .*, pytorch_model-00002-of-00003.bin is absent"),
    "one file and an index": (
        "safetensors shards",
        lambda path: write(path, WEIGHTS["gpt2"], "safetensors"),
        "model.safetensors and model.safetensors.index.json; remove the one that is not meant",
    ),
    "index without a map": ("bin shards", overwrite("*.index.json", b'{"metadata": {}}'), "no weight_map"),
    "index of an empty map": ("bin shards", overwrite("*.index.json", b'{"weight_map": {}}'), "no weight_map"),
    "a tensor that the index alone knows": (
        "safetensors shards",
        lambda path: change_index(path, lambda of: of.update(x="model-00002-of-00003.safetensors")),
        "model.safetensors.index.json has 'x' and model-00002-of-00003.safetensors has not; download both again",
    ),
    "a tensor that the shard alone knows": (
        "safetensors shards",
        lambda path: change_index(path, lambda of: of.pop("transformer.wte.weight")),
        "-of-00003.safetensors has 'transformer.wte.weight' and model.safetensors.index.json has not",
    ),
    "cut off": ("safetensors", cut("*.safetensors"), "model.safetensors cannot be read as safetensors .Saf"),
    "a pickle, cut off": ("bin", cut("*.bin"), "pytorch_model.bin cannot be read as a pickle of tensors alone"),
    "a shard, cut off": ("bin shards", cut("*00003-of*"), "pytorch_model-00003-of-00003.bin cannot be read"),
    "empty": ("safetensors", overwrite("*.safetensors", b""), "cannot be read as safetensors"),
    "an empty pickle": ("bin", overwrite("*.bin", b""), "cannot be read as a pickle of tensors alone"),
    "a huge header": ("safetensors", overwrite("*.safetensors", struct.pack("<Q", 1 << 62)), "cannot be read as"),
    "a page of the web": ("bin", overwrite("*.bin", b"<html>not found</html>"), "damaged or of another kind"),
    "a pointer": (
        "safetensors",
        overwrite("*.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is a pointer of Git LFS and not the weights; get them by `git lfs pull`",
    ),
    "code": ("bin", overwrite("*.bin", pickle.dumps({"w": Code()}, protocol=2)), "save its state dict as safetensors"),
    "no dict": ("bin", lambda path: torch.save([torch.zeros(1)], path / "pytorch_model.bin"), "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("form, damage, message", UNREADABLE.values(), ids=list(UNREADABLE))
def test_what_is_absent_or_cannot_be_read_is_said(folder, form, damage, message, capsys):
    path = folder(form=form)
    damage(path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "shard", ["../x.bin", "/etc/passwd", "sub/x.bin", "..", "", ".", "..\\x.bin", "C:x.bin", None, ["x"]]
)
def test_a_shard_outside_the_folder_is_not_read(folder, shard):
    path = folder(form="bin shards")
    torch.save({}, path.parent / "x.bin")
    change_index(path, lambda of: of.update({"transformer.wte.weight": shard}))
    with pytest.raises(ValueError, match="which is no file right in its folder; choose another checkpoint"):
        from_pretrained(path)


def test_a_shard_may_be_a_link(folder, tmp_path_factory):
    """As in the cache of Hugging Face's hub: the names are those of the folder, the contents are elsewhere."""
    path, elsewhere = folder(form="safetensors shards"), tmp_path_factory.mktemp("blobs")
    for shard in path.glob("*.safetensors"):
        shard.rename(elsewhere / shard.name)
        shard.symlink_to(elsewhere / shard.name)
    assert from_pretrained(path).config.n_layers == 2


def test_an_absent_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="gpt2 is absent; download the checkpoint first"):
        from_pretrained(tmp_path / "gpt2")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file; pass the folder that it is in"):
        from_pretrained(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "model_type='roberta' .*no reader; .* one of bert, gpt2"),
        ({"model_type": None, "architectures": None}, r"model_type=None and architectures=None.*no reader"),
        ({"model_type": None, "architectures": ["BertGenerationDecoder"]}, "BertGenerationDecoder.*no reader"),
        ({"model_type": ["gpt2"]}, "no reader"),
        ({"model_type": None, "architectures": "GPT2Model"}, "no reader"),
    ],
)
def test_an_architecture_without_a_reader_is_said(folder, change, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder(config=change))


@pytest.mark.parametrize("reader, family", [(from_bert, "gpt2"), (from_gpt2, "bert")])
def test_a_reader_refuses_the_others_checkpoints(reader, family):
    with pytest.raises(ValueError, match=r"but only .* is supported"):
        reader(WEIGHTS[family], CONFIG[family])
