"""Folders written by Hugging Face's transformers, read by `from_pretrained`: each class, each form of its files.

    python -m venv elsewhere && elsewhere/bin/pip install torch transformers
    elsewhere/bin/python tests/reference/huggingface_folders.py write folder
    .venv/bin/python tests/reference/huggingface_folders.py read folder

The first program needs neither of our packages. It saves tiny random models by `save_pretrained`, whole and in shards,
and the same tensors as .bin files, since the library writes only safetensors from its version 5 on; what wraps a model
in training (DataParallel, compile, checkpointing) writes a .bin as well. Beside each folder stands what the saved model
computes in their code. The second program compares, and ends with the largest difference.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40, "n_positions": 12}}
SIZES["bert"] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
SIZES["bert"]["max_position_embeddings"] = 12
N_WORDS, SHARD = 40, 20_000
HEADS = {"BertForSequenceClassification": "classifier.", "GPT2ForSequenceClassification": "score."}
CLASSES = {
    "GPT2Model": "gpt2",
    "GPT2LMHeadModel": "gpt2",
    "GPT2ForSequenceClassification": "gpt2",
    "BertModel": "bert",
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert",
    "BertForSequenceClassification": "bert",
}
FORMS = ("safetensors", "safetensors_shards", "bin", "bin_shards", "float16")
WRAPPED = ("data_parallel", "compiled", "compiled_data_parallel", "checkpointed", "training_loop")


def write(folder: Path) -> None:
    """In an environment with transformers."""
    import transformers

    for name, family in CLASSES.items():
        for tied in (True, False) if name in ("GPT2LMHeadModel", "BertForMaskedLM") else (True,):
            config = getattr(transformers, {"gpt2": "GPT2Config", "bert": "BertConfig"}[family])(
                vocab_size=N_WORDS,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
                **SIZES[family],
            )
            model = getattr(transformers, name)(config).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p == 1.0))
            for form in (*FORMS, *WRAPPED):
                target = folder / f"{name}{'' if tied else '_untied'}_{form}"
                save(model, target, form)
                expect(name, tied, model.half().float() if form == "float16" else model, target)


def save(model: torch.nn.Module, folder: Path, form: str) -> None:
    """The model in one form of files."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.save_pretrained(folder, max_shard_size=SHARD if form == "safetensors_shards" else "1GB")
    if form.startswith("safetensors"):
        return
    (folder / "model.safetensors").unlink()
    tensors = model.state_dict()
    if form == "bin_shards":
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=SHARD
        )
        for file, names in split.filename_to_tensors.items():
            torch.save({name: tensors[name] for name in names}, folder / file)
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return
    if form == "float16":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if "compiled" in form:
        tensors = torch.compile(model).state_dict()
    if form == "data_parallel":
        tensors = torch.nn.DataParallel(model).state_dict()
    if form == "compiled_data_parallel":
        tensors = torch.nn.DataParallel(torch.compile(model)).state_dict()
    if form == "checkpointed":
        tensors = {
            f"_fsdp_wrapped_module.{name}": tensor for name, tensor in checkpoint_wrapper(model).state_dict().items()
        }
    if form == "training_loop":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)  # has a state after a step
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        tensors = {"epoch": 3, "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}}
        tensors |= {"optimizer": optimizer.state_dict(), "rng_state": torch.get_rng_state()}
        model.zero_grad()
    torch.save(tensors, folder / "pytorch_model.bin")


@torch.no_grad()
def expect(name: str, tied: bool, model: torch.nn.Module, folder: Path) -> None:
    """What the library computes: hidden states of the Transformer, and scores of words where the class gives them."""
    tokens = torch.randint(1, N_WORDS, (3, 7), generator=torch.Generator().manual_seed(1))
    out = model(tokens, output_hidden_states=True)
    # GPT-2's last hidden states are those after the last norm, as are ours.
    hidden = out.hidden_states[-1]
    logits = getattr(out, "prediction_logits", None)
    logits = out.get("logits") if logits is None and ("LM" in name) else logits
    expected = {"tokens": tokens, "hidden": hidden, "logits": logits if tied else None, "head": HEADS.get(name)}
    expected["untied"] = {"GPT2LMHeadModel": "lm_head.", "BertForMaskedLM": "cls."}[name] if not tied else None
    torch.save(expected, folder.with_suffix(".expected"))


@torch.no_grad()
def read(folder: Path) -> None:
    """In our environment."""
    sys.path.insert(0, str(ROOT))
    from minitransformer.pretrained import from_pretrained

    largest, n = 0.0, 0
    for file in sorted(folder.glob("*.expected")):
        expected = torch.load(file, weights_only=True)
        begins = expected["head"] or expected["untied"]
        if begins:  # refused by name, with what to write instead
            try:
                from_pretrained(file.with_suffix(""))
            except ValueError as error:
                assert begins in str(error), (file.stem, error)
            else:
                raise AssertionError(f"{file.stem} was read without a word about {begins}")
        model = from_pretrained(file.with_suffix(""), leave_out=(begins,) if begins else ())
        pairs = [(model.hidden(expected["tokens"]), expected["hidden"])]
        if expected["logits"] is not None:
            pairs.append((model(expected["tokens"]), expected["logits"]))
        if expected["untied"]:
            assert model.config.lm_head == "none"
        for ours, theirs in pairs:
            torch.testing.assert_close(
                ours, theirs, atol=1e-4, rtol=0, msg=lambda text, file=file: f"{file.stem}: {text}"
            )
            largest = max(largest, float((ours - theirs).abs().max()))
        n += 1
    assert n, f"{folder} has no folders to read; write them first"
    print(f"{n} folders read, largest difference {largest:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Folders of transformers, read by us.")
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    {"write": write, "read": read}[options.what](options.folder)
