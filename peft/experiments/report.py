"""All results as tables, as one picture, and in a few lines for the README, from the result files.

python -m peft report              writes notebooks/results/README.md, between its markers README.md, and the picture
python -m peft report --check      says whether all of them are current
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from peft.experiments import speed
from peft.experiments.compare import current
from peft.experiments.plots import STYLE, plot_tasks, plt
from peft.experiments.results import read_rows
from peft.experiments.sweep import accuracy, n_seeds, percent, summaries, to_90
from peft.experiments.tasks import BFLOAT16, FULL, HEAD, LORA, NF4, Q4_1, TASKS, UNTRAINED

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results"
PICTURE = Path("notebooks", "figures", "results.png")  # the README's
SPOKEN = "language_model.json"  # what notebooks/results/language_model.py writes
START, END = "<!-- results: written by python -m peft report -->", "<!-- end of results -->"
SPEED_START, SPEED_END = "<!-- speed: written by python -m peft report -->", "<!-- end of speed -->"
TOY_TASKS, REAL_TASKS = ("sentiment", "qa"), ("rotten_tomatoes", "reuters_r8", "quiz")
LANGUAGE_TASKS = ("movers", "records", "rotten_tomatoes_words")
RANDOM = ", random backbone"
SIXTEEN = "pretrained" + BFLOAT16
ADDED = {"pretrained": "", "random": RANDOM, SIXTEEN: ", bfloat16"}  # to a method's name, by backbone
ADDED |= {"pretrained" + NF4: ", NF4", "pretrained" + Q4_1: ", Q4_1"}

# For the README: the jobs of the benchmark in each line, and what they are called there.
METHODS = {
    "full fine-tuning": "full fine-tuning",
    "LoRA q,v": "LoRA on q and v",
    "LoRA all": "LoRA on all linear layers",
}
FIT = {f"fit: {job}": name for job, name in METHODS.items()}
LORAS = {"forward: 16 LoRAs, 16 rows": "16 LoRAs in a batch", "forward: 64 LoRAs, 64 rows of 16": "64 LoRAs"}
SPEED = {
    "Forward pass": {"forward": "no method", "forward: LoRA q,v": "LoRA", "forward: LoRA q,v, merged": "merged"}
    | LORAS,
    "Training step in a plain loop": {f"plain loop: {job}": name for job, name in METHODS.items()},
    "Training step of `fit` and of a loop like their Trainer's": FIT,
    "Generation": {"generate: 1 row": "1 row", "generate: 16 rows": "16 rows"},
    "Memory of the same steps of `fit`": FIT,
}

PAGE = """# Results

Written by `python -m peft report` from the files beside this one, which have a row for each run: its recipe, settings,
inputs (digests of data and base), seed and versions. Only runs of the comparison as it is now count. A file without the
columns `settings` and `inputs` does not say which data and base its runs had; it counts until there are runs that do.
Test accuracy is mean ± standard deviation over seeds. Every method has a learning rate of its own, chosen on
the validation split; the test split is read once per run. *Not run*: waits for its runs; –: not in that comparison.
A sweep that was stopped goes on where it stopped; all of them take hours on two cores.

## Toy tasks

On the backbone that comes along. A *random backbone* has its shape and was never pretrained. Notebook 09 draws this
table, and the runs with few examples.

{toy}

```bash
.venv/bin/python -m peft compare --task sentiment --out notebooks/results
.venv/bin/python -m peft compare --task qa --out notebooks/results
for task in sentiment qa; do
    .venv/bin/python -m peft compare --task $task --random-backbone --out notebooks/results
done
for n in 16 64 256; do .venv/bin/python -m peft compare --task sentiment --examples $n --out notebooks/results; done
```

## Real text

On MiniLM. A head is trained beside every method for the first two tasks, the quiz has none. Parameters are counted on
the leftmost task that has the method.

{real}

```bash
.venv/bin/python -m peft compare --task rotten_tomatoes --seeds 3 --out notebooks/results
for task in reuters_r8 quiz; do .venv/bin/python -m peft compare --task $task --seeds 1 --out notebooks/results; done
```

{language}## Speed

Our Transformer and methods beside Hugging Face's OPT and peft: the same shape, weights and batches, float32, in turns.
A `step` is forward, backward and AdamW; memory is the most that a fresh process held, its libraries included. *The
limit* is what nobody can leave out, as [`speed.py`](../../peft/experiments/speed.py) defines it.

{speed}

```bash
python3 -m venv elsewhere && elsewhere/bin/pip install torch transformers peft
.venv/bin/python tests/benchmarks/against_huggingface.py --theirs elsewhere/bin/python
```
"""

LANGUAGE = """## A language model

On SmolLM2-135M-Instruct. Test accuracy is the share of answers in free greedy generation that are right, word for word
(of a record: as JSON). *Steps to 90%* says when nine in ten of 32 validation answers were right, in the fewest and the
most steps of the seeds; –: never. *bfloat16*: products and the frozen base in 16 bits, what is trained in 32. *NF4*,
*Q4_1*: the frozen linear layers in 4 bits, products in float32. What it says before and after, and what tuning does to
its loss on other text, is in `language_model.json`, for notebook 15.

{tables}

```bash
for task in movers records rotten_tomatoes_words; do
    .venv/bin/python -m peft compare --task $task --out notebooks/results
done
.venv/bin/python notebooks/results/language_model.py
```

"""

CAPTION = """SmolLM2, asked: {question}
Before: "{before}"   After {steps} steps of LoRA: "{after}"   (it is {answer})"""

Records = Mapping[str, Mapping[str, dict]]  # by task and method, what `summaries` gives


def records_in(results: Path) -> Records:
    """What the files of the comparisons say.

    Raises:
        ValueError: no run counts, or what `read_rows` and `current` refuse.
    """
    rows = {task: current(read_rows(results / f"{task}.csv"), task) for task in TASKS}
    if not any(rows.values()):
        raise ValueError(f"no results in {results}; run: python -m peft compare --task qa --out notebooks/results")
    return {
        task: {
            record["method"] + added: record for backbone, added in ADDED.items() for record in summaries(own, backbone)
        }
        for task, own in rows.items()
    }


def table(found: Records, tasks: Sequence[str]) -> str:
    """Tasks side by side, a row for each method, as Markdown."""
    lines = [f"| method | trained parameters | share | {' | '.join(TASKS[task].title for task in tasks)} |"]
    lines.append("|---|---:|---:|" + "---:|" * len(tasks))
    for method in dict.fromkeys(name for task in tasks for name in found[task]):
        own = [found[task].get(method) for task in tasks]
        first = next(record for record in own if record)
        known = ["not run" if plain(method) in TASKS[task].entries else "–" for task in tasks]
        cells = [accuracy(record, 1) if record else other for record, other in zip(own, known, strict=True)]
        lines.append(f"| {method} | {first['trained']:,} | {percent(first['share'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(name: str) -> str:
    """The method's name, without what is added to it for its backbone."""
    for added in ADDED.values():
        name = name.removesuffix(added)
    return name


def steps_table(found: Records, tasks: Sequence[str]) -> str:
    """How soon each method answers well, tasks side by side, as Markdown."""
    lines = [f"| steps to 90% | {' | '.join(TASKS[task].title for task in tasks)} |", "|---|" + "---:|" * len(tasks)]
    for method in dict.fromkeys(name for task in tasks for name in found[task]):
        own = [found[task].get(method) for task in tasks]
        lines.append(f"| {method} | {' | '.join(to_90(record) if record else '' for record in own)} |")
    return "\n".join(lines)


def result_lines(found: Records) -> list[str]:
    """For each task a line: its three best methods (of equal ones the smallest first) and what they compare with."""
    lines = []
    for task, own in found.items():
        beside = [name for known in (FULL, HEAD, UNTRAINED) for name in own if name in (known, known + ADDED[SIXTEEN])]
        methods = [r for name, r in own.items() if name not in beside and not name.endswith(RANDOM)]
        best = sorted(methods, key=lambda r: (-round(r["mean"], 3), r["share"]))[:3]
        if best:
            shown = best + [own[name] for name in beside]
            name_of = {id(record): name for name, record in own.items()}
            said = [f"{name_of[id(r)]} (trains {percent(r['share'])}) {r['mean']:.1%}" for r in best]
            said += [f"{name} {own[name]['mean']:.1%}" for name in beside]
            lines.append(f"* {TASKS[task].title}, {n_seeds(*(r['runs'] for r in shown))}: {'; '.join(said)}")
    return linked(lines, "every method, with its spread")


def speed_lines(record: Mapping) -> list[str]:
    """Ours / theirs, in time for each line of `SPEED`, and in memory; a job that was not measured is left out."""
    times = {job: speed.ratio(own) for job, own in record["seconds"].items()}
    times = {job: quartiles[1] for job, quartiles in times.items() if quartiles}
    peaks = {job: [own.get(side, {}).get("peak") for side in speed.SIDES] for job, own in record["memory"].items()}
    memory = {job: ours / theirs for job, (ours, theirs) in peaks.items() if ours and theirs}
    lines = []
    for title, jobs in SPEED.items():
        ratios = memory if title.startswith("Memory") else times
        said = [f"{name} {ratios[job]:.2f}" for job, name in jobs.items() if job in ratios]
        lines += [f"* {title}, ours / theirs: {'; '.join(said)}"] if said else []
    return linked(lines, "every job, with its quartiles")


def linked(lines: list[str], what: str) -> list[str]:
    """The lines, the last one with a link to the tables."""
    return [*lines[:-1], f"{lines[-1]} ([{what}](notebooks/results/README.md))"] if lines else []


def page(found: Records, record: Mapping) -> str:
    """All tables, each with the commands that made its runs, as Markdown."""
    made_with = "{pairs} pairs, {threads} threads, {batch} rows of {length} tokens; ours: {ours}; theirs: {theirs}."
    speeds = f"{speed.table(record)}\n\n{made_with.format(**record['settings'])}"
    spoken = ""
    if any(found[task] for task in LANGUAGE_TASKS):
        tables = f"{table(found, LANGUAGE_TASKS)}\n\n{steps_table(found, LANGUAGE_TASKS)}"
        spoken = LANGUAGE.format(tables=tables)
    return PAGE.format(toy=table(found, TOY_TASKS), real=table(found, REAL_TASKS), language=spoken, speed=speeds)


def pictured(found: Records) -> list[str]:
    """The tasks in the README's picture: the language model's, or those of the toy world while these were not run."""
    return [task for task in LANGUAGE_TASKS if found[task]] or [task for task in TOY_TASKS if found[task]]


def picture(found: Records, results: Path = RESULTS) -> Figure:
    """Each method's share and accuracy on these tasks; above, what the language model says before and after."""
    tasks, untrained, shown = {}, {}, pictured(found)
    for task in shown:
        own: dict[str, dict] = {}  # of both precisions float32, which comes first
        for name, record in found[task].items():
            if not name.endswith(RANDOM):
                own.setdefault(plain(name), record)
        tasks[TASKS[task].title] = [record for name, record in own.items() if name != UNTRAINED]
        if UNTRAINED in own:
            untrained[TASKS[task].title] = own[UNTRAINED]["mean"]
    title = "Every method, with a learning rate of its own" + "; dotted: nothing trained" * bool(untrained)
    return plot_tasks(tasks, "\n".join([*(caption(results) if shown[0] in LANGUAGE_TASKS else ()), title]), untrained)


def caption(results: Path = RESULTS) -> list[str]:
    """The shortest stored question that LoRA answers, and the answer before, in lines; none where there is none."""
    file = results / SPOKEN
    if not file.exists():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    before, after = (stored["runs"][name]["said"] for name in (UNTRAINED, LORA))
    asked = zip(stored["asked"], before, after, strict=True)
    right = [(question, answer, old, new) for (question, answer), old, new in asked if new.strip() == answer]
    if not right:
        return []
    question, answer, old, new = min(right, key=lambda own: len(own[0]))
    question = question.removesuffix(" Answer with one word.")
    said = CAPTION.format(
        question=question, answer=answer, before=" ".join(old.split()), after=new.strip(), steps=stored["steps"]
    )
    return [line for part in said.splitlines() for line in textwrap.wrap(part, 120)]


def sources(found: Records, results: Path = RESULTS) -> str:
    """The files that the picture shows, each with its digest; the picture's own file says so."""
    files = [results / f"{task}.csv" for task in pictured(found)] + [results / SPOKEN]
    return "; ".join(f"{file.name} {sha256(file.read_bytes()).hexdigest()}" for file in files if file.exists())


def written_into(text: str, lines: Sequence[str], start: str, end: str) -> str:
    """The README's text with the lines between these markers.

    Raises:
        ValueError: a marker is missing.
    """
    if start not in text or end not in text:
        raise ValueError(f"README.md has lost its markers; put {start} and {end} round the place of the list")
    before, rest = text.split(start, 1)
    return "\n".join([before + start, *lines, end + rest.split(end, 1)[1]])


def documents(found: Records) -> dict[Path, str]:
    """Both files as they should be.

    Raises:
        ValueError: the record of the benchmark is missing, or what `written_into` refuses.
    """
    readme, results = ROOT / "README.md", ROOT / "notebooks" / "results"
    record = speed.read(results / "benchmark.json")
    if not record:
        raise ValueError(f"{results / 'benchmark.json'} is missing; tests/benchmarks/against_huggingface.py writes it")
    text = written_into(readme.read_text(), result_lines(found), START, END)
    text = written_into(text, speed_lines(record), SPEED_START, SPEED_END)
    return {readme: text, results / "README.md": page(found, record)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m peft report", description="Write all results as tables, lists and a picture.", allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not current")
    options = parser.parse_args(arguments)
    results, drawn = ROOT / "notebooks" / "results", ROOT / PICTURE
    found = records_in(results)
    for path, text in documents(found).items():
        if not options.check:
            path.write_text(text)
            print(f"wrote {path}")
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path} does not say what the result files say: python -m peft report")
    source = sources(found, results)
    if options.check:
        if not drawn.exists() or Image.open(drawn).text.get("Source") != source:
            sys.exit(f"{drawn} does not show what the result files say: python -m peft report")
        return
    drawn.parent.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        figure = picture(found, results)
        figure.savefig(drawn, dpi=100, metadata={"Source": source})
        plt.close(figure)
    print(f"wrote {drawn}")
