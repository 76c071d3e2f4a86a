"""Figures: what stands on the axes is what stands in the table, in every format, without touching the caller's style."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from seeing_runs import run

from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.cli import seeing
from birthlens.errors import BirthlensError
from birthlens.runs.evaluation import evaluation_batch
from birthlens.tasks.predictors.scores import reference_table
from birthlens.viz import figures
from birthlens.viz.attention_frames import AttentionFrames, run_frames
from birthlens.viz.figures import gallery
from birthlens.viz.figures.style import COLOURS, ENDINGS
from birthlens.viz.figures.tick_labels import printable


def texts(figure: Any) -> Any:
    """All text of a figure, legends and ticks included."""
    return [t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_text()]


def cells_of(figure: Figure, panel: int = 0) -> np.ndarray:
    """The values of a map, NaN where it is blank."""
    return np.ma.filled(np.ma.asarray(figure.axes[panel].images[0].get_array(), dtype=float), np.nan)


def legend_of(figure: Figure) -> list[str]:
    """The texts of the first panel's legend."""
    legend = figure.axes[0].get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def overlaps(figure: Any) -> Any:
    """Pairs of visible texts whose boxes cover each other by more than two pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [
        (t, t.get_window_extent(renderer).padded(-2)) for t in figure.findobj(mpl.text.Text) if t.get_text().strip()
    ]
    boxes = [
        (t, box) for t, box in boxes if t.get_visible() and t not in outside(figure) and min(box.width, box.height) > 0
    ]
    return [(a.get_text(), b.get_text()) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]


def cut_off(figure: Any) -> Any:
    """Visible texts that reach over the edge of the figure."""
    FigureCanvasAgg(figure).draw()
    shown = [t for t in figure.findobj(mpl.text.Text) if t.get_text().strip() and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown if t not in outside(figure)]
    width, height = figure.bbox.size
    return [text for text, b in boxes if min(b.x0, b.y0) < -1 or b.x1 > width + 1 or b.y1 > height + 1]


def outside(figure: Any) -> Any:
    """Labels of ticks beyond the ends of their axis, which exist but are not drawn."""
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    ends = [(axis, sorted(axis.get_view_interval())) for axis in axes]
    return {
        label
        for axis, (low, high) in ends
        for tick in axis.get_major_ticks()
        for label in (tick.label1, tick.label2)
        if not low <= tick.get_loc() <= high
    }


def drawn_lines(ax: Any) -> Any:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def test_training_curves_show_the_metrics_and_the_references() -> None:
    source, table = run(), run().metrics()
    references = reference_table(source.task, evaluation_batch(source, 8), ("uniform", "bigram", "bayes"))
    figure = figures.training_curves(table, references)
    titles = [ax.get_title("left") for ax in figure.axes]
    assert titles == ["in-context loss", "global loss", "in-context accuracy", "global accuracy"]
    rows = table[(table["split"] == "held_out") & (table["metric"] == "in_context_loss")].sort_values("step")
    assert drawn_lines(figure.axes[0])["model"] == (list(rows["step"]), list(rows["value"]))
    levels = {np.asarray(line.get_ydata())[0] for line in figure.axes[0].get_lines() if line.get_label() != "model"}
    chosen = references[(references["role"] == "in_context") & (references["metric"] == "loss")]
    assert levels == set(chosen["value"])
    assert {"model", "uniform", "bigram", "Bayes-optimal", "step"} <= set(texts(figure))
    assert overlaps(figure) == []


def test_the_birth_is_loss_accuracy_and_the_three_memories_in_one_row() -> None:
    source = run()
    figure = gallery.draw(source, "birth", source.steps)
    assert [ax.get_title("left") for ax in figure.axes] == [
        "In-context loss",
        "In-context accuracy",
        "Recall of the three memories",
    ]
    rows = source.metrics().query("split == 'held_out' and metric == 'in_context_accuracy'").sort_values("step")
    accuracy = drawn_lines(figure.axes[1])
    assert accuracy["model"] == (list(rows["step"]), list(rows["value"]))
    assert accuracy["uniform: 0.0156"][1] == [1 / 64, 1 / 64]
    recalls = memories_over(source, bases=("raw",)).to_pandas().query("metric == 'recall'")
    wanted = recalls.query("memory == 'trigger_memory' and candidates == 'triggers'")
    assert drawn_lines(figure.axes[2])["trigger memory (n = 3 triggers)"] == (
        list(wanted["step"]),
        list(wanted["value"]),
    )
    rows = [(step, "held_out", f"in_context_{name}", value)
            for name, values in (("accuracy", (0, 0.95, 1)), ("loss", (4, float("nan"), 1)))
            for step, value in zip((0, 5, 9), values, strict=True)]  # fmt: skip
    metrics = pd.DataFrame(rows, columns=["step", "split", "metric", "value"])
    references = pd.DataFrame(
        [("bayes", "in_context", "accuracy", 1.0)], columns=["predictor", "role", "metric", "value"]
    )
    line = drawn_lines(figures.birth_panels(metrics, references).axes[1])["accuracy > 0.9: step 5"]
    assert line[0] == [5, 5]
    assert len(gallery.draw(run("full"), "birth", [0, 12]).axes) == 2
    with pytest.raises(BirthlensError, match="no in-context accuracy"):
        gallery.draw(run("no_triggers"), "birth", [0, 12])


def test_references_agree_with_counting() -> None:
    source = run()
    batch = evaluation_batch(source, 8)
    table = reference_table(source.task, batch, ("uniform", "unigram")).set_index(["predictor", "role", "metric"])[
        "value"
    ]
    n = len(source.statistics)
    assert table["uniform", "all", "accuracy"] == pytest.approx(1 / n)
    assert table["uniform", "all", "loss"] == pytest.approx(np.log(n))
    commonest = source.statistics.unigram.argmax()
    assert table["unigram", "all", "accuracy"] == pytest.approx(float((batch.targets == commonest).double().mean()))


def test_recall_curves_have_a_panel_a_memory_and_dotted_chance() -> None:
    table = memories_over(run(), bases=("raw",)).to_pandas()
    figure = figures.recall_curves(table)
    assert [ax.get_title("left") for ax in figure.axes] == ["output memory", "trigger memory", "previous-token memory"]
    rows = table[
        (table["memory"] == "trigger_memory") & (table["metric"] == "recall") & (table["candidates"] == "triggers")
    ]
    lines = drawn_lines(figure.axes[1])
    assert lines["triggers (n = 3)"] == (list(rows["step"]), list(rows["value"]))
    dotted = [np.asarray(line.get_ydata())[0] for line in figure.axes[1].get_lines() if line.get_linestyle() == ":"]
    assert dotted == pytest.approx([1 / len(run().statistics), 1 / 3])
    assert overlaps(figure) == []


def test_a_ledger_stacks_to_one_and_keeps_the_small_cells_together() -> None:
    shares = {
        "previous": 0.4,
        "cell a": 0.2,
        "cell b": 0.15,
        "cell c": 0.1,
        "cell d": 0.05,
        "cell e": 0.04,
        "residual": 0.06,
    }
    rows = [(step, "M", name, "association" if name == "previous" else "residual" if name == "residual" else "cell", share)
            for step in (0, 10) for name, share in shares.items()]  # fmt: skip
    rows += [(20, "M", "previous", "association", float("nan"))]
    figure = figures.ledger_areas(pd.DataFrame(rows, columns=["step", "matrix", "family", "kind", "share"]))
    labels = legend_of(figure)
    assert labels == ["residual", "the 2 smaller cells", "cell c", "cell b", "cell a", "previous"]
    paths = [path for collection in figure.axes[0].collections for path in collection.get_paths()]
    top = max(np.asarray(path.vertices)[:, 1].max() for path in paths)
    assert top == pytest.approx(1.0)


def test_a_ledger_of_one_step_is_a_bar_and_of_zeros_is_refused() -> None:
    columns = ["step", "matrix", "family", "kind", "share"]
    rows = [(7, "M", "previous", "association", 0.6), (7, "M", "residual", "residual", 0.4)]
    figure = figures.ledger_areas(pd.DataFrame(rows, columns=columns))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["7"]
    tops = [np.asarray(c.get_paths()[0].vertices)[:, 1].max() for c in figure.axes[0].collections]
    assert tops == pytest.approx([0.6, 1.0])
    assert len(gallery.draw(run(), "ledger", [12]).axes[0].collections) > 1
    with pytest.raises(BirthlensError, match="every matrix is still zero"):
        figures.ledger_areas(pd.DataFrame([(0, "M", "residual", "residual", float("nan"))], columns=columns))


def test_lines_of_a_timeline_differ_without_colour_and_the_axis_names_the_role() -> None:
    rows = [(step, f"head {n}", "in_context", "accuracy", n) for n in range(6) for step in (0, 10)]
    figure = figures.timeline(pd.DataFrame(rows, columns=["step", "case", "role", "metric", "value"]))
    assert len({str(line._dash_pattern) for line in figure.axes[0].get_lines()}) == 6  # type: ignore[attr-defined]
    assert figure.axes[0].get_ylabel() == "in-context accuracy"


def test_edges_that_all_change_nothing_are_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from birthlens.analysis.interventions import causal_tables as evidence

    rows = [(step, "e", "in_context", "accuracy", 0.0, 0.0, 0.0, 0.0) for step in (0, 3)]
    columns = ["step", "ablated", "role", "metric", "value", "change", "change_low", "change_high"]
    monkeypatch.setattr(evidence, "edge_ablations_table", lambda *_, **__: pd.DataFrame(rows, columns=columns))
    assert "no edge matters" in gallery.draw(run(), "edges", [0, 3]).axes[0].get_title("left")


def test_a_timeline_colours_what_moves_and_greys_the_rest() -> None:
    rows = [(step, f"head {n}", "accuracy", -n * step / 100, -n * step / 100 - 0.01, -n * step / 100 + 0.01)
            for n in range(5) for step in (0, 10, 20)]  # fmt: skip
    columns = ["step", "case", "metric", "change", "change_low", "change_high"]
    figure = figures.timeline(pd.DataFrame(rows, columns=columns), value="change", most=2)
    assert legend_of(figure) == ["head 3", "head 4"]
    assert len(figure.axes[0].collections) == 2  # bands
    assert drawn_lines(figure.axes[0])["head 4"] == ([0, 10, 20], [0, -0.4, -0.8])


def test_heatmaps_put_each_value_into_its_cell() -> None:
    table = pd.DataFrame([("b", 10, 1.0), ("a", 2, 2.0), ("b", 2, 3.0)], columns=["kind", "size", "value"])
    figure = figures.heatmap(table, "size", "kind")
    image = cells_of(figure)
    np.testing.assert_array_equal(image, [[3.0, 1.0], [2.0, np.nan]])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["2", "10"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["b", "a"]


def test_a_sweep_averages_seeds_and_a_map_refuses_doubles() -> None:
    table = pd.DataFrame([(1, 1, 0.2), (1, 1, 0.4), (2, 1, 1.0)], columns=["x", "y", "value"])
    figure = gallery.draw_table(table, "sweep", x="x", y="y")
    np.testing.assert_allclose(cells_of(figure), [[0.3, 1.0]])
    with pytest.raises(BirthlensError, match="several rows share one x and y"):
        figures.heatmap(table, "x", "y")


def test_rows_that_differ_in_a_column_nobody_chose_are_refused_until_one_is_chosen() -> None:
    roles = (("in_context", 1.0), ("all", 2.0))
    rows = [(step, "L0H0", role, "accuracy", value) for step in (0, 10) for role, value in roles]
    table = pd.DataFrame(rows, columns=["step", "case", "role", "metric", "value"])
    said = r"share one case and step; they differ in role\. Choose one with --option role="
    with pytest.raises(BirthlensError, match=said):
        gallery.draw_table(table, "timeline")
    figure = gallery.draw_table(table, "timeline", role="all")
    assert drawn_lines(figure.axes[0])["L0H0"] == ([0, 10], [2.0, 2.0])
    with pytest.raises(BirthlensError, match="option role = 'x': the column role holds in_context, all"):
        gallery.draw_table(table, "timeline", role="x")


def test_a_sweep_averages_seeds_but_no_other_setting() -> None:
    rows = [(1, 0.1, 64, seed, 0.2 * seed) for seed in (1, 2)] + [(1, 0.1, 128, 1, 0.9)]
    table = pd.DataFrame(rows, columns=["model.d_model", "rate", "task.context", "seeds.init", "accuracy"])
    axes = {"x": "model.d_model", "y": "rate", "value": "accuracy"}
    with pytest.raises(BirthlensError, match=r"they differ in task\.context"):
        gallery.draw_table(table, "sweep", **axes)
    figure = gallery.draw_table(table, "sweep", **axes, **{"task.context": "64"})
    np.testing.assert_allclose(cells_of(figure), [[0.3]])


def test_a_head_has_the_colour_of_its_place_in_the_table() -> None:
    rows = [(step, name, size * step) for name, size in (("L0H0", 0.1), ("L1H0", -0.9)) for step in (0, 10)]
    figure = figures.timeline(pd.DataFrame(rows, columns=["step", "case", "value"]))
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    assert [colours["L0H0"], colours["L1H0"]] == list(COLOURS[:2])


def test_weight_patching_has_a_panel_for_each_matrix_with_the_models_step_upwards() -> None:
    rows = [("A", 0, 0, 0.1), ("A", 5, 0, 0.2), ("A", 0, 5, 0.3), ("A", 5, 5, 0.4)]
    table = pd.DataFrame(rows, columns=["matrix", "from_step", "to_step", "value"]).assign(metric="accuracy")
    figure = figures.weight_patching_map(table)
    np.testing.assert_allclose(cells_of(figure), [[0.3, 0.4], [0.1, 0.2]])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["5", "0"]
    with pytest.warns(DeprecationWarning, match="transplant_map is now called weight_patching_map"):
        renamed = figures.transplant_map(table)
    np.testing.assert_array_equal(cells_of(renamed), cells_of(figure))


def test_steps_under_narrow_panels_do_not_run_together() -> None:
    steps = [0, 40, 60, 80, 100, 120, 160, 220, 300]
    rows = [(m, a, b, 0.5) for m in "ABC" for a in steps for b in steps]
    table = pd.DataFrame(rows, columns=["matrix", "from_step", "to_step", "value"]).assign(metric="accuracy")
    figure = figures.weight_patching_map(table)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for ax in figure.axes[:3]:
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in ax.get_xticklabels()]
        assert len(boxes) == 9
        assert min(right.x0 - left.x1 for left, right in pairwise(boxes)) > 4


def test_attention_maps_hide_the_future() -> None:
    frames = run_frames(run(), [0, 12], length=10)
    figure = figures.attention_maps(frames)
    image = cells_of(figure, 1)
    assert np.isnan(image[np.triu_indices(10, 1)]).all()
    np.testing.assert_allclose(np.nansum(image, 1), 1, atol=1e-5)
    assert [ax.get_title("left") for ax in figure.axes[:4]] == [
        "L0H0, step 0",
        "L0H0, step 12",
        "L1H0, step 0",
        "L1H0, step 12",
    ]


@pytest.mark.parametrize("kind", gallery.RUN_FIGURES)
def test_every_kind_draws_a_run_without_overlapping_labels(kind: Any) -> None:
    figure = gallery.draw(run(), kind, run().steps)
    assert figure.axes
    assert overlaps(figure) == [] and cut_off(figure) == []


def scores_of(memory: str, labels: list[str]) -> pd.DataFrame:
    """Return a score table that is 1 on the diagonal, in the columns of `score_tables.memory_scores_table`."""
    rows, columns = np.indices((len(labels), len(labels))).reshape(2, -1)
    places = {"row": rows, "column": columns, "centred": (rows == columns).astype(float)}
    return pd.DataFrame(
        {"memory": memory, "input": np.take(labels, rows), "output": np.take(labels, columns), **places}
    )


@pytest.mark.parametrize("width", [1, 3, 40])
def test_labels_of_any_length_and_number_neither_meet_nor_take_the_room_of_the_map(width: Any) -> None:
    for count in (3, 12, 24, 60):
        names = [f"{'W' * width}{n}" for n in range(count)]
        numbers = list(map(str, range(count)))
        table = pd.concat([scores_of("tokens", names), scores_of("positions", numbers)], ignore_index=True)
        figure = figures.memory_heatmaps(table)
        assert overlaps(figure) == [] and cut_off(figure) == []
        box = figure.axes[0].get_window_extent()
        assert box.width > 0.8 * figure.dpi and box.height > 1.2 * figure.dpi
        shown = [label.get_text() for label in figure.axes[1].get_xticklabels()]
        assert shown[0] == "0" and len(shown) >= min(count, 6)
        assert {int(b) - int(a) for a, b in pairwise(shown)} <= {int(shown[1])}
    frames = AttentionFrames(
        (0,), ("L0H0",), (f"token {'W' * width}",) * 24, ((),) * 24, np.tril(np.ones((1, 1, 24, 24)))
    )
    figure = figures.attention_maps(frames)
    assert overlaps(figure) == [] and cut_off(figure) == []
    assert figure.axes[0].get_window_extent().width > figure.dpi


def test_attention_of_many_heads_is_no_strip_and_says_what_its_marks_mean() -> None:
    figure = gallery.draw(run("full"), "attention", [0, 12])
    assert {"▷ trigger, first time", "◆ output of a trigger"} <= set(texts(figure))
    frames = AttentionFrames((0, 5), tuple(f"L{i // 4}H{i % 4}" for i in range(8)), ("a", "b"), ((), ()),
                             np.tril(np.ones((2, 8, 2, 2))))  # fmt: skip
    figure = figures.attention_maps(frames)
    assert overlaps(figure) == [] and cut_off(figure) == []
    width, height = figure.get_size_inches()
    assert 0.5 < width / height < 2
    titles = [ax.get_title("left") for ax in figure.axes[:16]]
    assert titles == [f"{head}, step {step}" for step in (0, 5) for head in frames.heads]


@pytest.mark.parametrize("kind", ["birth", "behaviour", "recall", "ablation", "edges", "attention"])
def test_models_of_other_shapes_draw_too(kind: Any) -> None:
    for name in ("full", "one_layer", "rotary"):
        source = run(name)
        if kind == "recall" and name != "rotary":
            continue
        assert gallery.draw(source, kind, source.steps[-2:]).axes


def test_a_kind_that_a_model_cannot_show_says_why() -> None:
    with pytest.raises(
        BirthlensError, match="belong to the two-layer simplified model; this run is a full model of 2 layers"
    ):
        gallery.draw(run("full"), "memories", [0])


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_are_what_their_ending_says_and_the_same_each_time(tmp_path: Path, ending: Any) -> None:
    table = pd.DataFrame([(1, 1, 0.2)], columns=["x", "y", "value"])
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    first, second = (
        figures.save(figures.heatmap(table, "x", "y"), tmp_path / f"{n}{ending}").read_bytes() for n in "ab"
    )
    assert first.startswith(start) and first == second


def test_the_callers_style_stays_as_it_was() -> None:
    before = dict(mpl.rcParams)
    figures.recall_curves(memories_over(run(), [0], bases=("raw",)).to_pandas())
    assert dict(mpl.rcParams) == before


def test_labels_the_font_lacks_are_spelled_by_their_code_points() -> None:
    assert printable("a␣⏎▶") == "a␣⏎▶"
    assert printable("漢$") == r"U+6F22\$"


def test_plot_draws_runs_and_saved_tables(tmp_path: Path) -> None:
    out = tmp_path / "recall.svg"
    done = CliRunner().invoke(
        seeing.plot, [str(run().path), "--kind", "recall", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0 and done.output.strip() == str(out) and b"<svg" in out.read_bytes()
    saved = tmp_path / "sweep.csv"
    pd.DataFrame([(1, 1, 0.2), (2, 1, 0.4)], columns=["d", "rate", "value"]).to_csv(saved, index=False)
    out = tmp_path / "sweep.png"
    arguments = [str(saved), "--kind", "sweep", "--out", str(out), "--option", "x=d", "--option", "y=rate"]
    assert CliRunner().invoke(seeing.plot, arguments, catch_exceptions=False).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "recall", "--out", "a.gif"], "must end in .png, .svg, .pdf"),
        (["--kind", "sweep", "--out", "a.png"], "of a run there are birth, behaviour"),
        (["--kind", "recall", "--out", "nowhere/a.png"], "does not exist; make it first"),
        (["--kind", "recall", "--out", "a.png", "--option", "x=1"], "options are for tables"),
        (["--kind", "recall", "--out", "a.png", "--steps", "7"], "step = 7 is not kept"),
    ],
)
def test_plot_refuses_what_it_cannot_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, message: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BirthlensError, match=message):
        CliRunner().invoke(seeing.plot, [str(run().path), *arguments], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_table_says_which_options_and_columns_it_lacks(tmp_path: Path) -> None:
    table = pd.DataFrame([(1, 1, 0.2)], columns=["x", "y", "value"])
    with pytest.raises(BirthlensError, match="say which column is x and which is y"):
        gallery.draw_table(table, "sweep")
    with pytest.raises(BirthlensError, match="option colour = 'red': kind sweep has x, y, value, metric, title"):
        gallery.draw_table(table, "sweep", colour="red")
    with pytest.raises(BirthlensError, match="lacks the columns matrix, from_step"):
        gallery.draw_table(table, "weight-patching")
    with pytest.raises(BirthlensError, match="cannot be read"):
        gallery.read_table(tmp_path / "missing.csv")


def test_options_are_read_as_what_they_are() -> None:
    rows = [(step, f"head {n}", n) for n in range(3) for step in (0, 10)]
    table = pd.DataFrame(rows, columns=["step", "case", "value"])
    figure = gallery.draw_table(table, "timeline", most="2", reference="0.5")
    assert legend_of(figure) == ["head 1", "head 2"]
    cells = pd.DataFrame([(1, 1, 0.2)], columns=["x", "y", "value"])
    figure = gallery.draw_table(cells, "heatmap", x="x", y="y", limits="-1,1", numbers="no")
    assert figure.axes[0].images[0].get_clim() == (-1, 1) and not figure.axes[0].texts
    for kind, options, message in (
        ("timeline", {"most": "x"}, "option most = 'x': it must be a whole number"),
        ("heatmap", {"x": "step", "y": "case", "limits": "1"}, "it must be two numbers"),
        ("heatmap", {"x": "step", "y": "case", "numbers": "2"}, "it must be yes or no"),
        ("curves", {"references": "x"}, "kind curves has roles, split"),
    ):
        with pytest.raises(BirthlensError, match=message):
            gallery.draw_table(table, kind, **options)


@pytest.mark.parametrize(
    ("kind", "columns", "options"),
    [
        ("timeline", ["step", "case", "value"], {}),
        ("heatmap", ["x", "y", "value"], {"x": "x", "y": "y"}),
        ("sweep", ["x", "y", "value"], {"x": "x", "y": "y"}),
        ("curves", ["step", "split", "metric", "value"], {}),
        ("ledger", ["step", "matrix", "family", "kind", "share"], {}),
        ("weight-patching", ["matrix", "from_step", "to_step", "metric", "value"], {}),
        ("recall", ["step", "memory", "basis", "metric", "candidates", "chance", "n", "value"], {}),
    ],
)
def test_text_where_numbers_belong_is_named(kind: Any, columns: Any, options: Any) -> None:
    table = pd.DataFrame([(1,) * (len(columns) - 1) + ("foo",)], columns=columns)
    with pytest.raises(BirthlensError, match=f"column '{columns[-1]}' holds 'foo'; to be drawn it must hold numbers"):
        gallery.draw_table(table, kind, **options)


def test_a_figure_that_thins_its_steps_says_so(tmp_path: Path) -> None:
    source, out = run(), str(tmp_path / "a.png")
    done = CliRunner().invoke(
        seeing.plot, [str(source.path), "--kind", "attention", "--out", out], catch_exceptions=False
    )
    assert "attention draws 4 of the 5 steps: 0, 3, 9, 12; choose others with --steps." in done.stderr
    assert done.stdout.strip() == out
    done = CliRunner().invoke(seeing.plot, [str(source.path), "--kind", "recall", "--out", out], catch_exceptions=False)
    assert done.stderr == ""


def test_the_old_name_of_a_kind_draws_the_same_and_says_so(tmp_path: Path) -> None:
    rows = [("A", 0, 0, 0.1), ("A", 5, 0, 0.2), ("A", 0, 5, 0.3), ("A", 5, 5, 0.4)]
    table = pd.DataFrame(rows, columns=["matrix", "from_step", "to_step", "value"]).assign(metric="accuracy")
    table.to_csv(tmp_path / "table.csv")
    drawn = {}
    for kind in ("weight-patching", "transplant"):
        out = tmp_path / f"{kind}.svg"
        words = [str(tmp_path / "table.csv"), "--kind", kind, "--out", str(out)]
        done = CliRunner().invoke(seeing.plot, words, catch_exceptions=False)
        assert ("the kind transplant is now called weight-patching" in done.stderr) == (kind == "transplant")
        drawn[kind] = out.read_bytes()
    assert drawn["transplant"] == drawn["weight-patching"]


def test_the_command_knows_the_kinds() -> None:
    assert tuple(gallery.RUN_FIGURES) == seeing.RUN_KINDS
    for kind in seeing.TABLE_KINDS:
        assert f"\n    {kind} " in str(seeing.plot.help), kind
    assert tuple(gallery.TABLE_FIGURES) == seeing.TABLE_KINDS


def test_one_step_is_drawn_as_a_point_and_values_that_are_missing_are_refused() -> None:
    table = pd.DataFrame({"step": [40], "case": ["L0H0"], "metric": ["loss"], "value": [0.5]})
    ax = figures.timeline(table).axes[0]
    assert [line.get_marker() for line in ax.lines if np.size(line.get_xdata()) == 1] == ["o"]
    assert list(ax.get_xticks()) == [40]
    with pytest.raises(BirthlensError, match="column 'value' holds no value in any row"):
        figures.timeline(table.assign(value=float("nan")))
