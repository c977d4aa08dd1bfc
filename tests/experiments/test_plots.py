"""Figures: what was given is what is drawn, each axis is named, and each method has one colour."""

import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from minitransformer.training import History
from peft.experiments import plots
from peft.experiments.tasks import REAL_TEXT, TOY, UNTRAINED
from peft.method import Method


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def named(axis):
    return bool(axis.get_xlabel() and axis.get_ylabel() and axis.get_title())


@pytest.mark.parametrize("name", [*TOY, *(name for name in REAL_TEXT if name != UNTRAINED)])
def test_every_method_of_the_comparisons_has_the_colour_of_its_family(name):
    family = name.split()[0].lower()
    others = {"soft": "prompt", "gated": "prefix"} | dict.fromkeys(("houlsby", "pfeiffer", "parallel"), "adapter")
    others |= dict.fromkeys(("lora+", "rslora", "dora"), "lora") | dict.fromkeys(("bitfit", "ia3"), "inner")
    family = others.get(family, family)
    assert plots.colour_of(name) in ([plots.COLOURS[family]] if family in plots.COLOURS else plots.OTHERS)
    assert plots.colour_of("something else") not in plots.COLOURS.values()


def test_any_other_method_has_a_colour_of_its_own_without_a_line_here(monkeypatch):
    monkeypatch.setattr(Method, "registry", dict(Method.registry))
    known = [name for name in Method.registry if plots.colour_of(name) in plots.OTHERS]  # of no family
    grey = plots.colour_of("Steering n=4")

    class Steering(Method):
        def sites(self, modules):
            return []

        def wrap(self, name, module, model, generator):
            raise NotImplementedError

        def expected_parameters(self, config):
            return 0

    Method.registry["Turning"] = Steering
    names = [*known, "Steering", "Turning"][-len(plots.OTHERS) :]
    colours = [plots.colour_of(f"{name} n=4, 600 steps") for name in names]
    assert len({*colours, grey, *plots.COLOURS.values()}) == len(names) + 1 + len(plots.COLOURS)
    assert plots.colour_of("steerings") == grey  # whole words only


# What an eye without one kind of cone sees of linear RGB: Machado et al. 2009, table 1, severity 1.
EYES = {
    "all cones": np.eye(3),
    "no long-wave cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no middle-wave cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no short-wave cones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def lab(colour: str, eye) -> np.ndarray:
    """CIE 1976 L*a*b* (white D65) of an sRGB colour as that eye sees it: a distance of 2 is just noticeable."""
    srgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = to_xyz @ np.clip(np.array(eye) @ linear, 0, 1) / [0.9505, 1.0, 1.0888]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES.values(), ids=EYES.keys())
def test_any_two_families_differ_for_every_kind_of_colour_vision(eye):
    colours = [*plots.COLOURS.values(), *plots.OTHERS]
    seen = {colour: lab(colour, eye) for colour in colours}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)


def test_the_running_mean():
    assert plots.smoothed([2.0, 4.0, 6.0, 8.0], window=2) == pytest.approx([2.0, 3.0, 5.0, 7.0])
    assert plots.smoothed([5.0] * 40) == pytest.approx([5.0] * 40)


def test_training_curves():
    history = History(loss=[3.0, 2.0, 1.0], validation_step=[2, 3], validation_accuracy=[0.5, 0.75])
    figure = plots.plot_training({"LoRA a": history, "LoRA b": history, "prefix": history}, "three runs")
    loss, accuracy = figure.axes
    assert named(loss) and named(accuracy) and figure.get_suptitle() == "three runs"
    assert loss.lines[0].get_ydata() == pytest.approx([3.0, 2.5, 2.0])
    assert list(accuracy.lines[0].get_xdata()) == [2, 3]
    assert accuracy.lines[0].get_ydata() == pytest.approx([50, 75])
    looks = {(line.get_color(), line.get_linestyle()) for line in loss.lines}
    assert len(looks) == 3  # two runs of one colour differ in their dashes


def test_a_sweep_labels_every_point():
    axis = plots.plot_sweep((1, 4), (0.5, 0.875), "rank r", "Rank", "lora")
    assert axis.lines[0].get_ydata() == pytest.approx([50, 87.5])
    assert [text.get_text() for text in axis.texts] == ["50.0", "87.5"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "4"]
    assert axis.get_xlabel() == "rank r" and axis.get_title() == "Rank"


@pytest.mark.parametrize("n_prefix", [0, 2])
def test_an_attention_map_has_a_panel_for_each_head_and_marks_the_prefix(n_prefix):
    weights = np.full((3, 4, n_prefix + 4), 1 / (n_prefix + 4))
    figure = plots.plot_attention(weights, ["where", "is", "mary", "?"], "layer 0", n_prefix)
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["head 0", "head 1", "head 2"]
    assert np.array_equal(panels[1].images[0].get_array(), weights[1])
    labels = [label.get_text() for label in panels[0].get_xticklabels()]
    assert labels == [*["P1", "P2"][:n_prefix], "where", "is", "mary", "?"]


def test_the_comparison_draws_every_method_once():
    rows = [
        {"method": "LoRA q,v r=4", "share": 0.01, "mean": 0.9, "spread": 0.02},
        {"method": "LoRA all r=4", "share": 0.03, "mean": 0.95, "spread": 0.01},
        {"method": "full fine-tuning", "share": 1.0, "mean": 1.0, "spread": 0.0},
    ]
    figure = plots.plot_comparison(rows, "a title", chance=0.5, chance_label="guessing")
    (axis,) = figure.axes
    assert named(axis) and axis.get_xscale() == "log"
    points = {c.get_label(): c.lines[0] for c in axis.containers}
    assert {name: (line.get_xdata()[0], line.get_ydata()[0]) for name, line in points.items()} == {
        row["method"]: (100 * row["share"], 100 * row["mean"]) for row in rows
    }
    assert points["LoRA q,v r=4"].get_marker() != points["LoRA all r=4"].get_marker()
    assert "guessing" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_tasks_side_by_side_share_their_methods():
    """What is drawn stands where the records say, on each task, in whatever order its rows come."""
    rows = [
        {"method": "LoRA q,v r=4", "share": 0.01, "mean": 0.9, "spread": 0.02},
        {"method": "full fine-tuning", "share": 1.0, "mean": 0.95, "spread": 0.01},
    ]
    other = [{**row, "mean": row["mean"] - 0.3} for row in reversed(rows)]
    figure = plots.plot_tasks({"One": rows, "Other": other}, "a title", {"One": 0.5, "Other": 0.1})
    share, *accuracies = figure.axes
    assert all(axis.get_xlabel() and axis.get_title() for axis in figure.axes) and share.get_xscale() == "log"
    assert [label.get_text() for label in share.get_yticklabels()] == ["LoRA q,v r=4", "full fine-tuning"]
    assert [bar.get_width() for bar in share.patches] == [1.0, 100.0]
    assert share.yaxis_inverted()
    for axis, expected, chance in zip(accuracies, ([90, 95], [60, 65]), (50, 10), strict=True):
        points = [container.lines[0] for container in axis.containers]
        assert [float(line.get_xdata()[0]) for line in points] == pytest.approx(expected)
        assert [float(line.get_ydata()[0]) for line in points] == [0, 1]
        assert [line.get_color() for line in points] == [plots.COLOURS["lora"], plots.COLOURS["full"]]
        segments = [container.lines[2][0].get_segments()[0] for container in axis.containers]
        assert [segment[1][0] - segment[0][0] for segment in segments] == pytest.approx([4, 2])  # both ways
        assert [text.get_text() for text in axis.texts] == [f"{value:.1f}" for value in expected]
        assert axis.lines[-1].get_xdata()[0] == pytest.approx(chance)
    assert figure.get_suptitle() == "a title"


@pytest.mark.parametrize("lowest", [0.0, 70.0])
def test_the_axes_of_accuracy_begin_where_they_are_told_to_and_the_numbers_stand_right_of_them(lowest):
    rows = [{"method": "LoRA q,v r=4", "share": 0.01, "mean": 0.9, "spread": 0.02}]
    axis = plots.plot_tasks({"One": rows}, "a title", {"One": 0.5}, lowest).axes[1]
    assert axis.get_xlim() == (lowest, 105)
    left = axis.transData.transform(axis.texts[0].xy)[0]
    right_edge, width = axis.bbox.x1, axis.bbox.width
    assert right_edge < left < right_edge + 0.05 * width


def test_the_picture_of_the_block_names_the_four_methods():
    texts = " ".join(text.get_text() for text in plots.draw_block().axes[0].texts)
    for method in ("prompt tuning", "LoRA", "prefix tuning", "adapter"):
        assert method in texts


def test_the_style_is_set_for_all_figures_that_follow():
    with matplotlib.rc_context():
        plots.use_style()
        assert plt.rcParams["figure.facecolor"] == "white" and plt.rcParams["font.size"] >= 11
