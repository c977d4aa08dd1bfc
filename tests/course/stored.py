"""Notebooks as they are stored, read as the JSON that they are."""

import hashlib
import json
from pathlib import Path


class Node(dict):
    """A dictionary whose keys are attributes too, as in nbformat."""

    __getattr__ = dict.__getitem__


def read(path: Path) -> Node:
    """The notebook, with sources and printed text as one string each."""
    notebook = json.loads(path.read_text(encoding="utf-8"), object_hook=Node)
    for cell in notebook.cells:
        cell["source"] = "".join(cell.source)
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = "".join(output.text)
    return notebook


def digest(notebook: Node) -> str:
    """SHA-256 of all code in the notebook, in its order."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def last_state(text: str) -> str:
    """The text as a terminal would show it: what a carriage return overwrote is gone."""
    return "\n".join(line.removesuffix("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
