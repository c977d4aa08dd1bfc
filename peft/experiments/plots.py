"""Pictures: the same method has the same colour everywhere, and every axis says its unit.

Colours are Okabe & Ito's, which readers with any kind of colour vision can tell apart. Figures have an opaque white
ground, so they read the same in a light and in a dark JupyterLab.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import isabstract

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from minitransformer.training import History
from peft.method import Method

COLOURS = {
    "base": "#555555",
    "full": "#000000",
    "lora": "#0072B2",
    "prefix": "#D55E00",
    "prompt": "#CC79A7",
    "adapter": "#009E73",
    "head": "#E69F00",
    "inner": "#56B4E9",  # biases and scales of inner activations: BitFit, IA3, LN-tuning
}
FAMILIES = {name: name for name in COLOURS} | {"dora": "lora"} | dict.fromkeys(("bitfit", "ia3", "lntuning"), "inner")
FAMILIES |= dict.fromkeys(("houlsby", "pfeiffer", "parallel", "inside"), "adapter")
OTHERS = ("#9900FF", "#661100", "#332288", "#DDCC77")  # for methods of no family, in the order of `Method.registry`
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.facecolor": "white",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def use_style() -> None:
    """Set matplotlib's defaults for all figures that follow."""
    plt.rcParams.update(STYLE)


def colour_of(label: str) -> str:
    """The colour of the family or method that a label names, such as "LoRA q,v r=4"; grey if it names none."""
    if _family(label):
        return COLOURS[_family(label)]
    others = [name for name, method in Method.registry.items() if not isabstract(method) and not _family(name)]
    words = re.findall(r"\w+", label.lower())
    return next((OTHERS[i % len(OTHERS)] for i, name in enumerate(others) if name.lower() in words), "#777777")


def _family(label: str) -> str | None:
    return next((family for word, family in FAMILIES.items() if word in label.lower()), None)


def _looks(labels: Iterable[str], looks: Sequence[str]) -> dict[str, str]:
    """Labels of one colour get one look after the other: dashes or markers."""
    colours = [colour_of(label) for label in labels]
    return {label: looks[colours[:i].count(colours[i]) % len(looks)] for i, label in enumerate(labels)}


def smoothed(values: Sequence[float], window: int = 15) -> np.ndarray:
    """The running mean over up to `window` values behind each."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_training(histories: Mapping[str, History], title: str) -> Figure:
    """Training loss beside validation accuracy, a line for each run."""
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    styles = _looks(histories, ("-", "--", ":", "-."))
    for label, history in histories.items():
        look = {"color": colour_of(label), "linestyle": styles[label], "label": label}
        loss.plot(np.arange(1, len(history.loss) + 1), smoothed(history.loss), **look)
        accuracy.plot(history.validation_step, 100 * np.array(history.validation_accuracy), marker="o", **look)
    loss.set(xlabel="step", ylabel="training loss (nats)", title="Training loss, mean of 15 steps", ylim=(0, None))
    accuracy.set(xlabel="step", ylabel="validation accuracy (%)", title="Validation accuracy", ylim=(0, 102))
    if len(histories) > 1:
        accuracy.legend(fontsize=10)
    figure.suptitle(title)
    return figure


def plot_sweep(
    settings: Sequence, accuracies: Sequence[float], name: str, title: str, family: str, axis: Axes | None = None
) -> Axes:
    """Accuracy against one setting, each measured value a labelled point."""
    axis = axis or plt.subplots(figsize=(5.5, 3.6), layout="constrained")[1]
    places = range(len(settings))
    axis.plot(places, [100 * value for value in accuracies], marker="o", color=COLOURS[family])
    for place, value in zip(places, accuracies, strict=True):
        axis.annotate(
            f"{100 * value:.1f}", (place, 100 * value), (0, 8), textcoords="offset points", ha="center",
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
    axis.set_xticks(list(places), [str(setting) for setting in settings])
    axis.set(xlabel=name, ylabel="validation accuracy (%)", title=title, ylim=(0, 110))
    axis.margins(x=0.15)
    return axis


def plot_attention(weights, words: Sequence[str], title: str, n_prefix: int = 0) -> Figure:
    """One layer's attention, a panel for each head: rows are queries, columns are keys, a dark cell is a look.

    Args:
        weights: [H, T, n + T], as one row of `Transformer.attention_weights`.
        words: the T words.
        n_prefix: how many columns in front belong to a prefix; they are marked.
    """
    weights = np.asarray(weights)
    n_heads, n_queries, n_keys = weights.shape
    columns = [f"P{i + 1}" for i in range(n_prefix)] + list(words)
    across = n_heads if n_keys <= 12 else min(2, n_heads)  # long texts get two panels a line, to stay legible
    down = -(-n_heads // across)
    width = max(3.2, 0.3 * n_keys)
    height = width * n_queries / n_keys + 0.9
    figure, axes = plt.subplots(
        down, across, figsize=(width * across + 1, height * down + 0.5), layout="constrained", squeeze=False
    )
    for head, axis in enumerate(axes.flat):
        if head >= n_heads:
            axis.axis("off")
            continue
        image = axis.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(n_keys), columns, rotation=90, fontsize=9)
        axis.set_yticks(range(n_queries), words if head % across == 0 else [""] * n_queries, fontsize=9)
        axis.set(title=f"head {head}", xlabel="key", ylabel="query" if head % across == 0 else "")
        axis.grid(False)
        if n_prefix:
            axis.axvline(n_prefix - 0.5, color=COLOURS["prefix"], linewidth=2)
            for label in axis.get_xticklabels()[:n_prefix]:
                label.set_color(COLOURS["prefix"])
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    figure.suptitle(title)
    return figure


def plot_comparison(
    rows: Sequence[Mapping], title: str, chance: float | None = None, chance_label: str = "chance"
) -> Figure:
    """Test accuracy against the trained share (log axis), a point with its spread for each method.

    Args:
        rows: mappings with "method", "share", "mean" and "spread" (both between 0 and 1).
        title: says what is seen.
        chance: accuracy of guessing, drawn as a line.
        chance_label: what the legend calls it.
    """
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    markers = _looks([row["method"] for row in rows], "osD^v<>P")
    for row in rows:
        axis.errorbar(
            100 * row["share"], 100 * row["mean"], yerr=100 * row["spread"], label=row["method"], capsize=4,
            color=colour_of(row["method"]), marker=markers[row["method"]], markersize=9, linestyle="none",
        )  # fmt: skip
    if chance is not None:
        axis.axhline(100 * chance, color=COLOURS["base"], linestyle=":", label=chance_label)
    axis.set_xscale("log")
    axis.set(xlabel="trained parameters, % of the base model (log)", ylabel="test accuracy (%)", title=title)
    axis.legend(fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def plot_tasks(
    tasks: Mapping[str, Sequence[Mapping]], title: str, chance: Mapping[str, float], lowest: float = 0.0
) -> Figure:
    """A line for each method: how much it trains, and its test accuracy on each task, with the spread.

    Args:
        tasks: for each task by its title the rows, as for `plot_comparison`; a method may be missing on some.
        title: says what is seen.
        chance: for each task the accuracy that needs no training, drawn as a line; none where it is not said.
        lowest: where the axes of accuracy begin, in %.
    """
    share_of = {row["method"]: row["share"] for rows in reversed(tasks.values()) for row in rows}
    methods = list(dict.fromkeys(row["method"] for rows in tasks.values() for row in rows))
    size = (4.2 * (1 + len(tasks)), 1 + 0.34 * len(methods) + 0.25 * title.count("\n"))
    figure, axes = plt.subplots(1, 1 + len(tasks), figsize=size, layout="constrained", sharey=True)
    places = range(len(methods))
    colours = [colour_of(name) for name in methods]
    shares = [100 * share_of[name] for name in methods]
    drawn = axes[0].barh(places, shares, color=colours)
    axes[0].bar_label(drawn, [f"{share:.2g}" if share < 99.5 else "100" for share in shares], padding=3, fontsize=10)
    axes[0].set(xscale="log", xlabel="% of the base model (log)", title="Trained parameters")
    axes[0].margins(x=0.2)
    axes[0].set_axisbelow(True)
    axes[0].set_yticks(places, methods)
    axes[0].invert_yaxis()
    for axis, (name, rows) in zip(axes[1:], tasks.items(), strict=True):
        by_method = {row["method"]: row for row in rows}
        for place, method in enumerate(methods):
            if method not in by_method:
                continue
            mean, spread = (100 * by_method[method][key] for key in ("mean", "spread"))
            axis.errorbar(mean, place, xerr=spread, color=colours[place], marker="o", markersize=8, capsize=4)
            beside = (105 + 0.02 * (105 - lowest), place)
            axis.annotate(f"{mean:.1f}", beside, ha="left", va="center", fontsize=10, annotation_clip=False)
        if name in chance:
            axis.axvline(100 * chance[name], color=COLOURS["base"], linestyle=":")
        axis.set(xlim=(lowest, 105), xlabel="test accuracy (%)", title=name)
    figure.suptitle(title)
    return figure


def draw_block() -> Figure:
    """The picture of this repository: a pre-norm block, and the four places where a method's tensors enter."""
    figure, axis = plt.subplots(figsize=(10.5, 6.4), layout="constrained")
    axis.set(xlim=(0, 12.6), ylim=(0, 8.2))
    axis.axis("off")
    axis.set_aspect("equal")
    frozen = {"facecolor": "#EEEEEE", "edgecolor": "#555555"}

    def box(x, y, width, height, text, colour=None, size=11):
        look = {"facecolor": "white", "edgecolor": colour, "linewidth": 2.2} if colour else frozen
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.04,rounding_size=0.12", **look))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=colour or "black")

    def arrow(start, end, colour="#555555", bend=0.0):
        style = f"arc3,rad={bend}"
        axis.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, connectionstyle=style)
        )

    box(0.3, 0.4, 1.9, 0.9, "embedding")
    box(0.3, 2.3, 1.9, 0.8, "norm")
    box(3.2, 1.9, 3.9, 2.0, "")
    axis.text(5.15, 3.62, "attention", ha="center", fontsize=11)
    box(3.4, 2.05, 1.05, 0.6, "$W_q$")
    box(4.62, 2.05, 1.05, 0.6, "$W_k$")
    box(5.84, 2.05, 1.05, 0.6, "$W_v$")
    axis.text(4.93, 3.24, r"softmax($Q K^\top / \sqrt{d_{head}}$) $V$,  then $W_o$", ha="center", fontsize=10)
    axis.text(8.0, 2.85, "+", fontsize=20, ha="center", va="center")
    box(0.3, 5.2, 1.9, 0.8, "norm")
    box(3.2, 4.9, 3.9, 1.4, "FFN\n$W_{down}$ gelu($W_{up}\\, x$)")
    axis.text(8.0, 5.6, "+", fontsize=20, ha="center", va="center")
    for start, end in (
        ((1.25, 1.35), (1.25, 2.25)), ((2.25, 2.7), (3.15, 2.7)), ((7.15, 2.85), (7.75, 2.85)),
        ((2.25, 5.6), (3.15, 5.6)), ((7.15, 5.6), (7.75, 5.6)), ((8.0, 5.95), (8.0, 7.3)),
    ):  # fmt: skip
        arrow(start, end)
    axis.plot([1.25, 1.25, 8.0], [1.75, 1.55, 1.55], color="#555555", linewidth=1.4)
    arrow((8.0, 1.55), (8.0, 2.55))
    axis.plot([8.0, 8.0, 1.25], [3.15, 4.45, 4.45], color="#555555", linewidth=1.4)
    arrow((1.25, 4.45), (1.25, 5.15))
    arrow((8.0, 4.45), (8.0, 5.3))
    axis.text(8.25, 7.0, "to the next block", fontsize=10, va="center")
    axis.text(8.25, 4.45, "residual stream", fontsize=10, va="center", color="#555555")

    box(3.2, 0.35, 3.4, 0.95, "prompt tuning\n$[P\\ ;\\ E(tokens)]$", COLOURS["prompt"])
    arrow((3.15, 0.85), (2.3, 0.85), COLOURS["prompt"])
    box(8.9, 1.05, 3.5, 1.0, "LoRA\n$W_0 x + (\\alpha / r)\\, B A x$", COLOURS["lora"])
    arrow((8.85, 1.45), (6.4, 2.05), COLOURS["lora"], -0.1)
    arrow((8.85, 1.25), (3.9, 2.05), COLOURS["lora"], -0.12)
    box(8.9, 2.75, 3.5, 1.0, "prefix tuning\n$[P_k\\ ;\\ K],\\ [P_v\\ ;\\ V]$", COLOURS["prefix"])
    arrow((8.85, 3.5), (6.55, 2.78), COLOURS["prefix"], 0.25)  # to what W_k and W_v give: the keys and the values
    arrow((8.85, 3.3), (5.3, 2.76), COLOURS["prefix"], 0.06)
    box(8.9, 5.05, 3.5, 1.1, "adapter\n$h + W_{up}\\, act(W_{down}\\, h)$", COLOURS["adapter"])
    arrow((8.85, 5.8), (7.4, 5.75), COLOURS["adapter"], 0.2)
    arrow((8.85, 5.2), (7.4, 3.05), COLOURS["adapter"], 0.0)
    axis.set_title("One frozen block (grey), and the four places where a method's tensors enter (coloured)")
    return figure
