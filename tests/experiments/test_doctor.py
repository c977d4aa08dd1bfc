"""The doctor, in an environment where Hugging Face's `peft` lies in front of ours, as in hosted notebooks."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from peft.experiments import doctor

ROOT = Path(__file__).resolve().parents[2]
FIRST_CELL = "import minitransformer.environment as environment; print(environment.check())"
USE_IT = f"{FIRST_CELL}; import peft; print(peft.LoRA(rank=2))"


@pytest.fixture(scope="module")
def hosted(tmp_path_factory) -> Path:
    """The Python of an environment with another `peft` in its site-packages, and this repository as an editable."""
    folder = tmp_path_factory.mktemp("hosted")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (site / "peft").mkdir(parents=True)
    (site / "peft" / "__init__.py").write_text("__version__ = '0.21.2'  # stands for Hugging Face's\n")
    here = sysconfig.get_paths()["purelib"]
    (site / "editable.pth").write_text(f"{here}\n{ROOT}\n")  # torch and the like, then what an editable install adds
    return python


def run(python: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_other_peft_is_noticed_and_every_way_that_the_doctor_names_works(hosted, tmp_path):
    """The doctor fails and names its cures; a notebook's first cell fails without, and passes with each of them."""
    result = run(hosted, "-m", "peft", "doctor", cwd=ROOT)
    assert result.returncode == 1 and "WRONG     another package of the name peft" in result.stdout, result
    in_front, first_cell = f"PYTHONPATH='{ROOT}' jupyter lab", f"import sys; sys.path.insert(0, '{ROOT}')"
    assert in_front in result.stdout and first_cell in result.stdout

    refused = run(hosted, "-c", FIRST_CELL, cwd=tmp_path)
    assert refused.returncode != 0 and "another one of the same name" in refused.stderr and first_cell in refused.stderr

    by_path = run(hosted, "-c", USE_IT, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert by_path.returncode == 0 and "LoRA(rank=2)" in by_path.stdout, by_path.stderr
    by_cell = run(hosted, "-c", f"{first_cell}; {USE_IT}", cwd=tmp_path)
    assert by_cell.returncode == 0 and "LoRA(rank=2)" in by_cell.stdout, by_cell.stderr
    assert run(hosted, "-m", "peft", "doctor", cwd=ROOT, PYTHONPATH=str(ROOT)).returncode == 0


def test_a_healthy_environment(capsys):
    doctor.main([])
    said = capsys.readouterr().out
    assert "WRONG" not in said and "827,776" in said  # what only some purposes need is optional


def test_what_is_missing_is_named_with_the_command_that_brings_it():
    finding = doctor.on_packages(("numpy", "no-such-package"), "something", "pip install it")
    assert not finding.right and "no-such-package" in str(finding) and "-> pip install it" in str(finding)
    assert "numpy" not in finding.what and str(finding).startswith("optional  for something")
    assert str(doctor.on_packages(("no-such-package",), "all", "", optional=False)).startswith("WRONG     for all")


def test_every_cure_calls_this_python(monkeypatch):
    """A bare `pip` may belong to another environment; here everything is missing."""
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    cures = [finding.cure for finding in doctor.diagnosis() if finding.what.startswith("for ")]
    assert len(cures) == 4 and all(cure.startswith(f"{sys.executable} -m pip install ") for cure in cures)
    files = [Path(found) for cure in cures for found in re.findall(r'-[cr] "([^"]+)"', cure)]
    assert len(files) == 4 and all(file.is_file() for file in files)


def test_a_copy_of_our_own_package_is_not_another_one(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, files in ((ours, ("__init__.py", "sites.py")), (theirs, ("__init__.py",))):
        (folder / "peft").mkdir(parents=True)
        for name in files:
            (folder / "peft" / name).touch()
    assert doctor.others_of_that_name([str(ours), str(theirs)]) == [theirs.resolve() / "peft"]
    assert doctor.on_peft([str(ours)], []).right and not doctor.on_peft([str(theirs)], []).right
    assert doctor.on_peft([str(theirs)], [str(ROOT)]).right


def test_a_package_in_the_folder_where_one_works_counts_and_is_named_in_full(tmp_path, monkeypatch):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert doctor.others_of_that_name([""]) == [tmp_path.resolve() / "peft"]
    assert str(tmp_path.resolve() / "peft") in str(doctor.on_peft([""], []))
    assert str(ROOT / "peft") in str(doctor.on_peft([str(ROOT)], []))


def test_the_interpreter_is_new_enough():
    assert doctor.on_python() == doctor.on_python(sys.version_info[:3])
    assert str(doctor.on_python((3, 10, 4))) == "ok        Python 3.10.4"
    assert doctor.on_python((3, 10)).right and doctor.on_python((4, 0, 0)).right
    assert str(doctor.on_python((3, 9, 18))) == "WRONG     Python 3.9.18\n          -> install Python 3.10 or newer"


def test_a_damaged_backbone_is_noticed(monkeypatch):
    def damaged():
        raise ValueError("toy.safetensors is damaged")

    monkeypatch.setattr("peft.experiments.doctor.toy_backbone", damaged)
    finding = doctor.on_backbone()
    assert not finding.right and "toy.safetensors is damaged" in finding.what and "clone" in finding.cure
