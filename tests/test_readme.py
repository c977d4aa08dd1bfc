"""The README promises commands, files and a table: they must exist and be current."""

import re
from pathlib import Path

from peft.report import END, START

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
