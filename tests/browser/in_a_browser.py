"""Notebooks in JupyterLab, in a real browser, light and dark: every cell runs, figures are seen, sliders move.

    .venv/bin/pip install -c constraints.txt -e '.[notebooks,test]' playwright && .venv/bin/playwright install chromium
    .venv/bin/pytest tests/browser/in_a_browser.py

Not part of the default run (pytest looks for files called test_…): it needs a browser, Playwright's or one on the path,
and some minutes. The notebooks are copied first, so nothing is written into the repository.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "only-on-this-machine"
MINUTE = 60_000  # in milliseconds, as Playwright counts


@pytest.fixture(scope="module", params=["Light", "Dark"])
def lab(request, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a JupyterLab of either theme, and the folder it serves: a copy of the notebooks."""
    folder, settings = tmp_path_factory.mktemp("lab") / "notebooks", tmp_path_factory.mktemp("settings")
    shutil.copytree(ROOT / "notebooks", folder)
    theme = settings / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
    theme.parent.mkdir(parents=True)
    theme.write_text(json.dumps({"theme": f"JupyterLab {request.param}"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}", f"--IdentityProvider.token={TOKEN}"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(settings)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=1)
                break
            time.sleep(0.5)
        yield address, folder
        server.terminate()


@pytest.fixture(scope="module")
def page(lab) -> Iterator[Page]:
    """A tab of a headless Chromium."""
    own = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1300, "height": 1000})
        browser.close()


def start_all_cells(page: Page, address: str, name: str) -> None:
    """Open the notebook and run it from the menu."""
    page.goto(f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}?token={TOKEN}&reset")
    expect(page.locator(".jp-Notebook")).to_be_visible(timeout=MINUTE)
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=MINUTE)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel and Run All Cells…", exact=True).click()
    page.get_by_role("button", name="Confirm Kernel Restart").click()


def code_cells(path: Path) -> list:
    """The code cells of a notebook as it was saved."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run_and_read(page: Page, lab, name: str, minutes: int) -> list:
    """The code cells of the notebook after its run, their old outputs dropped before it.

    A kernel that restarts is busy and idle again before the first cell reaches it, so what was saved decides, not the
    kernel's state: it is saved and read until every cell has run, or one has failed, or the time is over.
    """
    address, folder = lab
    notebook = nbformat.read(folder / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / name)
    start_all_cells(page, address, name)
    end = time.monotonic() + 60 * minutes
    while True:
        page.wait_for_timeout(3000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        cells = code_cells(folder / name)
        if all(cell.execution_count for cell in cells) or failures(cells) or time.monotonic() > end:
            return cells


def failures(cells: list) -> list:
    """The errors among the cells' outputs."""
    return [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def check_all_ran(cells: list) -> None:
    assert all(cell.execution_count for cell in cells)
    assert not failures(cells)


CORNER = """image => {
    const canvas = document.createElement("canvas");
    canvas.getContext("2d").drawImage(image, 0, 0);
    return Array.from(canvas.getContext("2d").getImageData(2, 2, 1, 1).data);
}"""


def test_the_first_notebook_runs_and_its_figure_is_seen_in_either_theme(page, lab, request):
    cells = run_and_read(page, lab, "00_start_here.ipynb", minutes=3)
    check_all_ran(cells)
    dark = request.node.callspec.params["lab"] == "Dark"
    assert page.evaluate("document.body.dataset.jpThemeLight") == ("false" if dark else "true")
    figure = page.locator(".jp-OutputArea-output img").first
    figure.scroll_into_view_if_needed()
    expect(figure).to_be_visible()
    assert figure.evaluate("image => image.complete && image.naturalWidth > 300")
    assert figure.evaluate(CORNER) == [255, 255, 255, 255]  # black letters on opaque white, whatever lies below
    expect(page.get_by_text("Not yet: linear returns nothing yet; replace the dots")).to_be_attached()


def test_the_sliders_appear_and_move_the_picture(page, lab):
    cells = run_and_read(page, lab, "03_prefix_tuning.ipynb", minutes=8)
    check_all_ran(cells)
    slider = page.locator(".widget-slider .noUi-handle").first
    slider.scroll_into_view_if_needed()
    expect(slider).to_be_visible(timeout=MINUTE)
    picture = page.locator(".jp-OutputArea-output .widget-output img, .widget-interact img").first
    before = picture.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(picture).not_to_have_attribute("src", before, timeout=MINUTE)
