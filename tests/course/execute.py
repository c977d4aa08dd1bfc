"""Execute notebooks in place, and store their outputs the way they are committed.

    python tests/course/execute.py notebooks/04_lora.ipynb notebooks/05_adapters.ipynb

The outputs of a cell are joined, progress bars keep their last state only. A digest of what was executed goes into the
notebook, so that a test can tell when code was changed and not run again, and the seconds it took, for notebook 00.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from stored import digest, last_state

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def tidied(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Pieces of one stream joined, overwritten progress dropped."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if "metadata" in output:
            output.metadata = NotebookNode()
        follows = kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name
        if follows:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = last_state(output.text)
    return kept


def execute(path: Path) -> float:
    """Execute the notebook and write it back; returns the seconds that took. Raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=place).execute()
    seconds = time.perf_counter() - began
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = tidied(cell.outputs)
    notebook.metadata = NotebookNode(
        kernelspec=KERNEL,
        language_info={"name": "python"},
        executed={"code_sha256": digest(notebook), "seconds": round(seconds)},
    )
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    return seconds


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {execute(Path(name)):.0f} s", flush=True)
