"""The README's picture, results.png, drawn again: `.venv/bin/python notebooks/figures/results.py`."""

from hashlib import sha256
from pathlib import Path

from peft.experiments.compare import current
from peft.experiments.plots import plot_comparison, use_style
from peft.experiments.results import read_rows
from peft.experiments.sweep import summaries

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "results" / "qa.csv"


def main() -> None:
    """Draw the picture; a digest in its file says which runs it shows."""
    use_style()
    records = summaries(current(read_rows(RUNS), "qa"))
    title = "Question answering in a toy world: mean ± standard deviation over seeds"
    figure = plot_comparison(records, title)
    axis = figure.axes[0]
    axis.set_xticks([0.2, 1, 5, 20, 100], ["0.2", "1", "5", "20", "100"])
    axis.set(xlim=(0.15, 150), ylim=(45, 103), xlabel="trained parameters, % of the backbone's (log)")
    digest = sha256(RUNS.read_bytes()).hexdigest()
    figure.savefig(HERE / "results.png", dpi=100, metadata={"Source": f"qa.csv, SHA-256 {digest}"})


if __name__ == "__main__":
    main()
