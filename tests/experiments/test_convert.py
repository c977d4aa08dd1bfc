"""`python -m peft convert` and `describe`, as they are typed."""

import json

import pytest
import torch
from reference.exchange_with_huggingface import TOKENS, our_base, with_methods
from safetensors.torch import save_file

import peft
from minitransformer.files import pack, unpack
from minitransformer.pretrained import from_pretrained, save_pretrained
from peft import BottleneckAdapter, LoRA
from peft.contents import KEY
from peft.experiments.cli import main

LORA = LoRA(rank=3, alpha=5)


@pytest.fixture
def files(tmp_path):
    """A folder with a base, a file of a LoRA on it, and its logits."""
    save_pretrained(our_base("llama"), tmp_path / "base")
    model = with_methods("llama", (LORA,))
    peft.save(model, tmp_path / "lora.safetensors")
    return tmp_path, model(TOKENS).detach()


def stopped(arguments, capsys):
    """The exit status and what was said, which is one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return stop.value.code, said.err


def test_a_file_becomes_a_folder_and_a_file_again(files, capsys):
    path, logits = files
    base = ["--base", str(path / "base")]
    main(["convert", str(path / "lora.safetensors"), str(path / "folder"), *base])
    said = capsys.readouterr().out
    assert said.startswith("'LORA': r=3, lora_alpha=5, target_modules=[")
    assert said.endswith(f"trained on the base '{path}/base'\n")
    torch.testing.assert_close(peft.from_huggingface(our_base("llama"), path / "folder")(TOKENS), logits)
    main(["convert", str(path / "folder"), str(path / "again.safetensors"), *base])
    assert "LoRA(" in capsys.readouterr().out
    assert torch.equal(peft.load(from_pretrained(path / "base"), path / "again.safetensors")(TOKENS), logits)


def test_both_kinds_are_described(files, capsys):
    path, _ = files
    main(["describe", str(path / "lora.safetensors")])
    assert capsys.readouterr().out.strip() == str(peft.describe(path / "lora.safetensors"))
    peft.to_huggingface(with_methods("llama", (LORA,)), path / "folder")
    main(["describe", str(path / "folder")])
    said = capsys.readouterr().out
    n = 2 * 3 * (16 + 16 + 16 + 8)
    assert said.startswith("'LORA': r=3, lora_alpha=5, target_modules=[") and f"8 tensors, {n} parameters" in said
    assert "q_proj.lora_A.weight' [3, 16]" in said and said.endswith("its base has no name\n")


def test_what_a_folder_says_cannot_steer_a_terminal(files, capsys):
    path, _ = files
    peft.to_huggingface(with_methods("llama", (LORA,)), path / "folder")
    config = {"peft_type": "\x1b[2J", "base_model_name_or_path": "\x1b]0;x\x07", "target_modules": ["\x1b[31m"]}
    (path / "folder" / "adapter_config.json").write_text(json.dumps(config))
    main(["describe", str(path / "folder")])
    assert "\x1b" not in capsys.readouterr().out


def test_no_name_in_a_file_can_steer_a_terminal(files, capsys):
    """An error stays on its one line; a file of ours can be made by anybody, with its checksum."""
    path, _ = files
    tensors, record, _ = unpack((path / "lora.safetensors").read_bytes(), KEY)
    odd = {f"\x1b[2J{name}": tensor for name, tensor in tensors.items()}
    (path / "odd.safetensors").write_bytes(pack(odd, record, KEY))
    main(["describe", str(path / "odd.safetensors")])
    assert "\x1b" not in capsys.readouterr().out
    peft.to_huggingface(with_methods("llama", (LORA,)), path / "folder")
    for name, dtype in [("\x1b[2J\nx", torch.int8), ("\u2028\u202e", torch.int8)]:
        save_file({name: torch.ones(1, dtype=dtype)}, path / "folder" / "adapter_model.safetensors")
        code, said = stopped(["convert", path / "folder", path / "out", "--base", path / "base"], capsys)
        assert code == 1 and said[:-1].isprintable() and "is of torch.int8" in said


def test_nothing_that_is_there_is_replaced(files, capsys):
    """Least of all what is read."""
    path, _ = files
    folder, lora, base = path / "folder", path / "lora.safetensors", path / "base"
    peft.to_huggingface(with_methods("llama", (LORA,)), folder)
    (path / "empty").mkdir()
    (path / "link").symlink_to(lora)

    def files_of_all():
        return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    before = files_of_all()
    for source, target in [
        *[(folder, file) for file in (*folder.iterdir(), folder, path / "empty", lora, path / "link")],
        *[(lora, file) for file in (lora, path / "link", base)],
    ]:
        code, said = stopped(["convert", source, target, "--base", base], capsys)
        assert code == 1 and "is there already; choose another name" in said and files_of_all() == before
    main(["convert", str(lora), str(path / "empty"), "--base", str(base)])


def test_an_error_is_one_line_and_an_exit_status(files, capsys):
    path, _ = files
    lora, folder, base = path / "lora.safetensors", path / "folder", path / "base"
    for arguments, expected in [
        (["describe", path / "nothing"], "No such file"),
        (["describe", base], "adapter_config.json is absent"),
        (["describe", base / "config.json"], "is not a file that peft.save wrote"),
        (["convert", path / "nothing", folder, "--base", base], "No such file"),
        (["convert", lora, folder, "--base", path / "no"], "no is absent; download the checkpoint first"),
        (["convert", lora, base, "--base", base], "base is there already; choose another name"),
        (["convert", lora, path / "no" / "folder", "--base", base], "is not there; make it first"),
    ]:
        code, said = stopped(arguments, capsys)
        assert code == 1 and said.startswith(f"python -m peft {arguments[0]}: ") and expected in said
    assert not folder.exists()


def test_what_does_not_fit_is_said(files, capsys):
    path, _ = files
    save_pretrained(our_base("bert"), path / "bert")
    code, said = stopped(["convert", path / "lora.safetensors", path / "out", "--base", path / "bert"], capsys)
    assert code == 1 and "another base" in said
    model = peft.attach(our_base("llama"), BottleneckAdapter(bottleneck=2))
    peft.save(model, path / "adapter.safetensors")
    code, said = stopped(["convert", path / "adapter.safetensors", path / "out", "--base", path / "base"], capsys)
    assert code == 1 and "Hugging Face's peft has no form for" in said
    assert not (path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["convert", "a", "b"], "the following arguments are required: --base"),
        (["convert", "a", "b", "--bas", "c"], "the following arguments are required: --base"),
        (["describe"], "the following arguments are required: path"),
        (["describe", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_what_is_typed_wrong_is_said(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err
