"""The commands of this package.

    python -m peft compare --task sentiment --methods lora,prefix,adapter --seeds 3 --out results
    python -m peft report
    python -m peft doctor

`compare` runs the sweep of one task: it says what it will cost, shows its progress, goes on where it was stopped, and
leaves a table, a CSV file and a figure; `torchrun --nproc-per-node 2 -m peft compare …` shares every run between two
processes. `report` writes the tables of all results. `doctor` says whether this environment is right, and what to do if
it is not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minitransformer.training.distributed import is_writer, launched_together
from peft.experiments import compare, doctor, report, sweep
from peft.experiments.plots import plot_comparison, plt, use_style
from peft.experiments.results import read_rows
from peft.experiments.tasks import RANDOM_BACKBONE, TASKS


def selected(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The methods that a command line names, in the order of `names`; all of them without words.

    Raises:
        ValueError: a word is part of no name.
    """
    chosen = [name for word in words for name in named_by(word, names)]
    return [name for name in names if not words or name in chosen]


def named_by(word: str, names: Sequence[str]) -> list[str]:
    """A whole name; how names with a comma begin, such as `LoRA q,v`; or parts of names, as in `lora,prefix`."""
    if word in names:
        return [word]
    begun = [name for name in names if name.lower().startswith(word.lower())]
    if "," in word:
        return begun or [name for part in word.split(",") if part for name in named_by(part, names)]
    found = [name for name in names if word.lower() in name.lower()]
    if not found:
        raise ValueError(f"no method is called {word!r} or has it in its name; there are: {'; '.join(names)}")
    return found


def run_comparison(arguments: Sequence[str]) -> None:
    """`python -m peft compare`."""
    parser = argparse.ArgumentParser("python -m peft compare", description="Every method, a learning rate for each.")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--methods", nargs="+", default=[], help="names, or parts of names such as lora,prefix")
    parser.add_argument("--seeds", type=int, default=len(sweep.SEEDS), help="how many final runs of each method")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV file and the figure")
    parser.add_argument("--random-backbone", action="store_true", help="on a frozen backbone that learned nothing")
    parser.add_argument("--examples", type=int, help="so many training rows, drawn anew for each seed; all without it")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least one final run")
    torch.set_num_threads(options.threads)
    names, backbone = list(TASKS[options.task].entries), "pretrained"
    if options.random_backbone:
        names, backbone = RANDOM_BACKBONE, "random"
    try:
        study = compare.study(options.task, selected(options.methods, names), backbone, options.examples)
    except ValueError as error:
        parser.error(str(error))
    with launched_together():
        compared(study, options)


def compared(study: sweep.Study, options: argparse.Namespace) -> None:
    """Say what it will cost, run what is missing, and leave a table, a CSV file and a figure."""
    name = compare.label(options.task, options.examples)
    seeds, out = range(1, options.seeds + 1), options.out / f"{name}.csv"
    price = sweep.cost(study, read_rows(out), seeds)
    if is_writer():
        print(price, flush=True)
    rows = [row for row in sweep.run(study, out, seeds) if row["method"] in study.rates]
    if not is_writer():
        return
    records = sweep.summaries(rows, study.backbone)
    print(sweep.table(records))
    use_style()
    few = f", {options.examples} examples" if options.examples else ""
    many = f"mean and spread of {sweep.n_seeds(options.seeds)}"
    picture = out.with_name(f"{name}{'_random' if options.random_backbone else ''}.png")
    plot_comparison(records, f"{TASKS[options.task].title}{few}: {many}").savefig(picture, dpi=110)
    plt.close("all")
    print(f"\nrows in {out}, figure in {picture}")


COMMANDS = {"compare": run_comparison, "report": report.main, "doctor": doctor.main}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first word names."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in COMMANDS:
        print(__doc__.strip())
        sys.exit(0 if words[:1] in ([], ["-h"], ["--help"]) else f"\nthe command {words[0]!r} is unknown")
    COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    main()
