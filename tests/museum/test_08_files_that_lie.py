"""Files that lie: the wrong base, the lost head, nothing at all, and a program in disguise.

A file of a method is only right on the base it was trained on; loaded on another one it gives wrong answers without a
word. The fresh classification head was trained as well, but only "the adapter" is saved. A hand-made `state_dict`
filter finds no name and saves an empty file. And a file that is a pickle runs whatever it likes when it is opened.

Found in: https://github.com/huggingface/peft/issues/577, https://github.com/huggingface/peft/issues/876,
https://github.com/huggingface/peft/issues/286, https://github.com/adapter-hub/adapters/issues/661

The lesson: a file says what it is, what it was trained on, and whether it is whole; the reader checks all three
before it touches the model."""

import contextlib
import pickle

import pytest
import torch
from exhibit import batch, caught, small_model

import peft
from minitransformer.heads import SequenceClassifier


def save_by_name(model, path):
    """The wrong way: a filter on names, and torch.save."""
    torch.save({n: p for n, p in model.state_dict().items() if "lora_" in n or n.endswith((".A", ".B"))}, path)


def load_by_name(model, path):
    """The wrong way: whatever fits is copied."""
    peft.attach(model, peft.LoRA(rank=2), train_also=("head",) if hasattr(model, "transformer") else ())
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    return model


WRONG, OURS = (save_by_name, load_by_name), (peft.save, peft.load)


def trained(model, **options):
    peft.attach(model, peft.LoRA(rank=2), **options)
    with torch.no_grad():
        for p in peft.trainable_parameters(model).values():
            p.add_(0.3)
    return model


def check_another_base_is_refused(tmp_path, save, load):
    save(trained(small_model(seed=0)), tmp_path / "file")
    try:
        load(small_model(seed=1), tmp_path / "file")
    except ValueError as error:
        assert "another base" in str(error)
        return
    raise AssertionError("it was loaded on another base")


def check_the_head_travels(tmp_path, save, load):
    def classifier(seed):
        return SequenceClassifier(small_model(lm_head="none"), n_classes=2, seed=seed)

    model, (tokens, mask) = trained(classifier(1), train_also=("head",)), batch()
    save(model, tmp_path / "file")
    again = load(classifier(2), tmp_path / "file")
    assert torch.allclose(again(tokens, mask), model(tokens, mask)), "the head was lost"


def check_nothing_is_not_saved(tmp_path, save, load):
    try:
        save(small_model(), tmp_path / "file")
    except ValueError:
        assert not (tmp_path / "file").exists()
        return
    raise AssertionError("a file with nothing in it was written")


@pytest.mark.parametrize("check", [check_another_base_is_refused, check_the_head_travels, check_nothing_is_not_saved])
def test_the_wrong_way_and_ours(tmp_path, check):
    caught(check, tmp_path, *WRONG)
    (tmp_path / "file").unlink(missing_ok=True)
    check(tmp_path, *OURS)


class Mischief:
    """A pickle may name any function to be called when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def check_opening_runs_nothing(tmp_path, load):
    (tmp_path / "file").write_bytes(pickle.dumps(Mischief(tmp_path / "ran")))
    with contextlib.suppress(ValueError):
        load(tmp_path / "file")
    assert not (tmp_path / "ran").exists(), "the file ran code"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_pickle_is_a_program(tmp_path):
    caught(check_opening_runs_nothing, tmp_path, lambda path: pickle.loads(path.read_bytes()))
    (tmp_path / "ran").unlink(missing_ok=True)
    check_opening_runs_nothing(tmp_path, lambda path: peft.load(small_model(), path))
    check_opening_runs_nothing(tmp_path, peft.describe)
