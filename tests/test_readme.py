"""The README promises commands, files and a table: they must exist and be current."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import peft
from minitransformer import Transformer, TransformerConfig
from peft.experiments.report import END, START

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ci_script_finds_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m1 -E '([^']+)'", (ROOT / ".ci" / "run").read_text()).group(1)
    found = [line for line in README.splitlines() if re.search(pattern, line)]
    assert len(found) == 1
    assert "pip install -c constraints.txt -e '.[test]'" in found[0]
    assert "ruff check" in found[0]


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_readme_has_a_place_for_the_results():
    assert README.index(START) < README.index(END)


def code_after(heading):
    """The first Python block behind a heading."""
    return re.search(r"```python\n(.*?)```", README.split(f"## {heading}\n", 1)[1], re.DOTALL).group(1)


@pytest.fixture
def own_method():
    """The recipe of the README's example, as a reader would type it; forgotten again afterwards."""
    known, space = dict(peft.Method.registry), {"__name__": "query_scale"}
    sys.modules["query_scale"] = types.ModuleType("query_scale")
    exec(code_after("A method of your own"), space)
    yield space["QueryScale"]
    peft.Method.registry.clear()
    peft.Method.registry.update(known)
    del sys.modules["query_scale"]


def test_the_example_of_a_method_of_ones_own_does_all_that_the_readme_says(own_method, tmp_path):
    config = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)
    model, tokens = Transformer(config).eval(), torch.tensor([[3, 1, 4, 1, 5]])
    base = model(tokens)
    peft.attach(model, own_method())
    assert torch.equal(model(tokens), base)
    assert peft.parameter_table(model).trained == peft.expected_parameters(config, own_method()) == 2 * 16
    peft.gradient_audit(model, lambda m: m(tokens).logsumexp(-1).mean())
    with torch.no_grad():
        for p in peft.trainable_parameters(model).values():
            p.mul_(2.0)
    changed = model(tokens)
    assert not torch.allclose(changed, base)
    with peft.disabled(model):
        assert torch.equal(model(tokens), base)
    peft.save(model, tmp_path / "own")
    assert peft.describe(tmp_path / "own").recipes == ("QueryScale()",)
    assert torch.equal(peft.load(Transformer(config).eval(), tmp_path / "own")(tokens), changed)
    peft.attach(model, peft.LoRA(rank=2))
    peft.attach(model, peft.PrefixTuning(length=2))
    peft.detach(model)
    assert torch.equal(model(tokens), base)


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys, splits):
    """With fewer steps: what they reach is the notebooks' business."""
    monkeypatch.chdir(tmp_path)
    task = splits("qa")
    monkeypatch.setattr("minitransformer.tasks.qa_splits", lambda: task)
    code = code_after("In ten lines").replace("steps=600", "steps=2")
    assert "steps=2" in code
    exec(code, {})
    assert "trained: 8,192" in capsys.readouterr().out
    assert (tmp_path / "qa.safetensors").exists()
