"""Shapes are checked in every test: jaxtyping's import hook wraps both packages before anything imports them."""

import functools
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from reference.tiny_models import KINDS, tiny_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def _refuse_another_peft() -> None:
    """Another package of the name `peft` is widespread; testing that one instead of ours must not pass."""
    spec = importlib.util.find_spec("peft")
    found = Path(next(iter(spec.submodule_search_locations))).resolve() if spec else None
    if found != ROOT / "peft":
        raise RuntimeError(
            f"`import peft` finds {found}, not {ROOT / 'peft'}; use a fresh virtual environment without another peft"
        )


_refuse_another_peft()
if any(name.split(".")[0] in ("minitransformer", "peft") for name in sys.modules):
    raise RuntimeError("the packages were imported before their shapes could be checked; look for a plugin that does")
install_import_hook(["minitransformer", "peft"], "beartype.beartype")
# Tiny tensors gain nothing from a second thread, and on a busy machine waiting for it costs ten times the work.
torch.set_num_threads(1)


@pytest.fixture(params=KINDS)
def tiny(request):
    """A tiny model of each kind: `tiny(activation="relu", ...)`; decoders and encoders, pre- and post-norm."""
    return tiny_of(request.param)


@pytest.fixture
def decoder():
    """A small causal pre-norm model with random weights."""
    from minitransformer import Transformer, TransformerConfig

    def build(seed: int = 0, **changes):
        sizes = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
        return Transformer(TransformerConfig(**(sizes | changes)), seed).eval()

    return build


@pytest.fixture
def unchecked():
    """Run without the shape checks, as a user does: what our own error messages say then."""
    with _without_shape_checks():
        yield


@contextmanager
def _without_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@functools.cache
def _splits(name: str):
    from minitransformer.tasks import qa_splits, sentiment_splits

    with _without_shape_checks():  # tens of thousands of short texts; smaller splits are made with the checks
        return {"qa": qa_splits, "sentiment": sentiment_splits}[name](seed=0)


@pytest.fixture(scope="session")
def splits():
    """The toy tasks, made once for all tests, which only read them: splits("qa") and splits("sentiment")."""
    return _splits
