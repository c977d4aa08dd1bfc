"""The commands of this package.

    python -m peft compare --task sentiment --methods lora,prefix,adapter --seeds 3 --out results
    python -m peft report
    python -m peft doctor
    python -m peft convert method.safetensors folder --base smollm2
    python -m peft describe method.safetensors

`compare` runs the sweep of one task: it says what it will cost, shows its progress, goes on where it was stopped, and
leaves a table, a CSV file and a figure; `torchrun --nproc-per-node 2 -m peft compare …` shares every run between two
processes. `report` writes the tables of all results. `doctor` says whether this environment is right, and what to do if
it is not. `convert` writes a file of a method as a folder of Hugging Face's peft, or such a folder as a file, and
`describe` says what either holds.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minitransformer.training.distributed import is_writer
from peft.experiments import compare, convert, doctor, report, sweep
from peft.experiments.plots import STYLE, plot_comparison, plt
from peft.experiments.processes import launched_together
from peft.experiments.results import read_rows
from peft.experiments.tasks import TASKS, methods_on


def selected(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The methods that a command line names, in the order of `names`; all of them without words.

    Each word is a whole name, or whole words of names, such as `prefix` or `LoRA q,v`; if it is neither, it is a list
    of such with commas between them, such as `lora,prefix`.

    Raises:
        ValueError: a word names no method; the message lists those that there are.
    """
    chosen = [name for word in words for name in named_by(word, names)]
    return [name for name in names if not words or name in chosen]


def named_by(word: str, names: Sequence[str]) -> list[str]:
    """Those that one word of the command line names."""
    whole = [name for name in names if name.lower() == word.strip().lower()]
    found = whole or [name for name in names if _words(word) and f" {_words(word)} " in f" {_words(name)} "]
    if not found and "," in word:
        return [name for part in word.split(",") for name in named_by(part, names)]
    if not found:
        raise ValueError(f"no method is called {word!r} or has it among its words; there are: {'; '.join(names)}")
    return found


def _words(text: str) -> str:
    """In small letters, with single spaces, and without commas at the end of words: those within, as in `q,v`, stay."""
    return " ".join(re.sub(r",(?=\s|$)", " ", text.lower()).split())


def at_least_one(text: str) -> int:
    """A whole number from 1, for the options that count something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return int(text)


def run_comparison(arguments: Sequence[str]) -> None:
    """`python -m peft compare`."""
    parser = argparse.ArgumentParser(
        "python -m peft compare", description="Every method, a learning rate for each.", allow_abbrev=False
    )
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--methods", nargs="+", action="extend", help="names, or whole words of them: lora,prefix")
    parser.add_argument("--seeds", type=at_least_one, help="final runs of each method; 5, of a language model 3")
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV file and the figure")
    parser.add_argument("--random-backbone", action="store_true", help="on a frozen backbone that learned nothing")
    parser.add_argument(
        "--examples", type=at_least_one, help="so many training rows, drawn anew for each seed; all without it"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "nf4", "q4_1"),
        default="float32",
        help="of a frozen base; bfloat16: of the products as well",
    )
    parser.add_argument("--threads", type=at_least_one, default=1)
    options = parser.parse_args(arguments)
    backbone = "random" if options.random_backbone else "pretrained"
    backbone += f" {options.precision}" * (options.precision != "float32")
    options.seeds = options.seeds or TASKS[options.task].seeds
    try:
        names = selected(options.methods or [], methods_on(options.task, backbone))
        study = compare.study(options.task, names, backbone, options.examples)
        out = options.out / f"{compare.label(options.task, options.examples)}.csv"
        read_rows(out)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with launched_together():
            compared(study, out, options)
    finally:
        torch.set_num_threads(threads)


def compared(study: sweep.Study, out: Path, options: argparse.Namespace) -> None:
    """Say what it will cost, run what is missing, and leave a table, a CSV file and a figure."""
    seeds = range(1, options.seeds + 1)
    price = sweep.cost(study, read_rows(out), seeds)
    if is_writer():
        print(price, flush=True)
    rows = sweep.run(study, out, seeds)
    if not is_writer():
        return
    backbone = rows[0]["backbone"]
    records = sweep.summaries(rows, backbone)
    print(sweep.table(records))
    own = [row for row in read_rows(out) if row["method"] in study.rates and row["backbone"] == backbone]
    if len(own) > len(rows):
        print(f"\n{len(own) - len(rows)} more rows of these methods are of other recipes, inputs, rates or seeds")
    few = f", {options.examples} examples" if options.examples else ""
    title = f"{TASKS[options.task].title}{few}: mean and spread of {sweep.n_seeds(options.seeds)}"
    title += f", {options.precision}" * (options.precision != "float32")
    picture = out.with_name("_".join([out.stem, *backbone.split()[backbone.startswith("pretrained") :]]) + ".png")
    with plt.rc_context(STYLE):
        figure = plot_comparison(records, title)
        figure.savefig(picture, dpi=110)
        plt.close(figure)
    print(f"\nrows in {out}, figure in {picture}")


COMMANDS = {
    "compare": run_comparison,
    "report": report.main,
    "doctor": doctor.main,
    "convert": convert.convert,
    "describe": convert.describe,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first word names."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in COMMANDS:
        print(__doc__.strip())
        sys.exit(0 if words[:1] in ([], ["-h"], ["--help"]) else f"\nthe command {words[0]!r} is unknown")
    COMMANDS[words[0]](words[1:])


if __name__ == "__main__":
    main()
