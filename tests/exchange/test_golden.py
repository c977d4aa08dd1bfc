"""Folders that Hugging Face's peft wrote, read and written again: the same logits, and the same file.

`tests/reference/exchange_with_huggingface.py` made the golden files, with their own client; run by hand, it also shows
that their client reads what `to_huggingface` writes.
"""

import json

import pytest
import torch
from reference.exchange_with_huggingface import BAR, GOLDEN, TOKENS, our_base
from safetensors.torch import load_file, save_file

import peft

CONFIGS = json.loads(GOLDEN.with_suffix(".json").read_text())
TENSORS = load_file(GOLDEN.with_suffix(".safetensors"))
REFUSED = {
    "gpt2: prefix": "with learned positions no keys make up for that",
    "llama: LoRA, a pattern of targets": "a list of modules' names is needed; write the names out",
}
# Read exactly, and written in another way: default places of theirs that ours are worth, keys that are turned.
WRITTEN_OTHERWISE = {"bert: IA3", "gpt2: IA3", "llama: prefix"}


def folder_of(cell, path):
    """The folder as their client wrote it, and its logits."""
    tensors = {name.removeprefix(f"{cell}/"): t for name, t in TENSORS.items() if name.startswith(f"{cell}/")}
    logits = tensors.pop("logits")
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIGS[cell]))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors, logits


def base_of(cell):
    return our_base(cell.partition(":")[0])


@pytest.mark.parametrize("cell", [cell for cell in CONFIGS if cell not in REFUSED])
def test_their_folder_gives_their_logits_and_is_written_again_as_it_was(cell, tmp_path):
    tensors, logits = folder_of(cell, tmp_path / "theirs")
    model = peft.from_huggingface(base_of(cell), tmp_path / "theirs")
    ours = model(TOKENS).detach()
    torch.testing.assert_close(ours, logits, rtol=0, atol=BAR)
    assert (ours - base_of(cell)(TOKENS)).abs().max() > 0.01
    peft.to_huggingface(model, tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert said["peft_type"] == CONFIGS[cell]["peft_type"] and said["task_type"] == CONFIGS[cell]["task_type"]
    if cell not in WRITTEN_OTHERWISE:
        assert written.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(written[name], tensor), name
    back = peft.from_huggingface(base_of(cell), tmp_path / "again")
    torch.testing.assert_close(back(TOKENS).detach(), ours, rtol=0, atol=BAR)


@pytest.mark.parametrize("cell", REFUSED)
def test_what_cannot_be_exact_is_refused_with_its_reason(cell, tmp_path):
    folder_of(cell, tmp_path / "theirs")
    with pytest.raises(ValueError, match=REFUSED[cell]):
        peft.from_huggingface(base_of(cell), tmp_path / "theirs")
