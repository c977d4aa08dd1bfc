"""The kinds of model that the fixture `tiny` builds, and which of them a plain `pytest` takes."""

import pytest

ALL = {
    "causal-pre": {"causal": True},
    "encoder-post": {"causal": False, "norm": "post"},
    "causal-post": {"causal": True, "norm": "post"},
    "encoder-pre": {"causal": False},
}


def kinds(*fast: str) -> list:
    """All of them as parameters, options of the config; those that are not named are slow."""
    return [pytest.param(ALL[name], id=name, marks=[] if name in fast else [pytest.mark.slow]) for name in ALL]


def of_kind(*fast: str) -> pytest.MarkDecorator:
    """For a test whose claim depends little on the kind, or is shown on another kind elsewhere: the others are slow."""
    return pytest.mark.parametrize("tiny", kinds(*fast), indirect=True)
