"""The report: what it says is what the run holds, for runs of every shape, and the command in it makes the run again."""

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from resealing import replace
from seeing_runs import KINDS, TINY, run, unfinished

from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.analysis.memories.order_tables import chosen_sets, onsets_table, standardised_scores_table
from birthlens.cli import seeing
from birthlens.config.presets import PRESETS, preset
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.labels import legible
from birthlens.runs.run import Run
from birthlens.training.recording import train_to_disk
from birthlens.viz.attention_frames import AttentionFrames
from birthlens.viz.html import circuitsvis_bundle, escape
from birthlens.viz.report import leads, report_page, write_report
from birthlens.viz.report.charts import Chart, Curve, Level, number
from birthlens.viz.report.charts import ticks as ticks_between
from birthlens.viz.report.command_of_run import command
from birthlens.viz.report.numbers import Facts

VOID = {"meta", "link", "input", "br", "line", "path"}


def group(pattern: str, text: str, place: int = 0, flags: int = 0) -> str:
    """The part of a text that a pattern, or one of its groups, matches."""
    found = re.search(pattern, text, flags)
    assert found is not None
    return found[place]


class Well(HTMLParser):
    """Checks that every element is closed in its turn, and keeps attributes and visible text."""

    def __init__(self, html: Any) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[Any] = []
        self.words: list[str] = []
        self.addresses: list[Any] = []
        self.feed(html)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: Any, attributes: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href"):
                self.addresses.append(value)

    def handle_startendtag(self, tag: Any, attributes: Any) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: Any) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: Any) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


def page_of(*runs: Any, causal: Any = False) -> Any:
    html = report_page(runs, causal)
    return html, Well(html.replace(circuitsvis_bundle(), ""))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_shape_have_a_report(kind: Any) -> None:
    html, parsed = page_of(run(kind), causal=kind in ("paper", "one_layer", "full", "no_triggers"))
    assert len(html.encode()) < 10_000_000
    assert parsed.addresses == ["data:,", "#main"]  # nothing to fetch
    for section in ("trained", "numbers", "birth", "memories", "causes", "attention", "made"):
        assert section in parsed.ids
    assert "Traceback" not in html and ">nan<" not in html.lower()


def test_the_key_numbers_are_the_runs_own() -> None:
    source = run()
    html, _ = page_of(source)
    metrics = source.metrics()
    accuracy = metrics[(metrics["metric"] == "in_context_accuracy") & (metrics["split"] == "held_out")]["value"].iloc[
        -1
    ]
    row = group(r'<th scope="row">in-context accuracy<small>.*?</th>(.*?)</tr>', html, place=1)
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells[:2] == [f"{accuracy:.3f}", f"{1 / len(source.statistics):.3f}"]
    table = memories_over(source, source.steps[-1:], bases=("raw",)).to_pandas().query("metric == 'recall'")
    for memory, said in (
        ("output_memory", "output memory, 64 tokens"),
        ("prev_token_memory", "previous-token memory, 23 positions"),
    ):
        value = table[(table["memory"] == memory) & (table["candidates"] == "all")]["value"].iloc[0]
        row = group(rf'<th scope="row">recall of the {said}</th>(.*?)</tr>', html, place=1)
        assert re.findall(r"<td>(.*?)</td>", row)[0] == f"{value:.3f}"


def test_curves_in_the_page_are_the_measured_ones() -> None:
    source = run()
    html, _ = page_of(source)
    figure = group(r"<figcaption>In-context accuracy</figcaption>.*?</figure>", html, flags=re.S)
    data = json.loads(group(r'<script type="application/json">(.*?)</script>', figure, place=1))
    rows = source.metrics().query("metric == 'in_context_accuracy'")
    assert data["series"][0]["steps"] == list(rows["step"])
    assert data["series"][0]["shown"] == [number(value) for value in rows["value"]]


def test_a_number_is_spelled_the_same_wherever_it_stands() -> None:
    html = Chart("t", [Curve("model", [0, 9], [0.5, 0.9994957])]).html()
    data = json.loads(group(r'<script type="application/json">(.*?)</script>', html, place=1))
    assert data["series"][0]["shown"] == ["0.500", "0.999"]
    assert '<output data-series="0">0.999</output>' in html and "0.999 at step 9" in html


def test_a_level_has_the_colour_of_its_line_and_keys_are_pieces_of_the_lines() -> None:
    series = [Curve("a", [0, 9], [0.0, 1.0]), Curve("b", [0, 9], [0.0, 1.0], colour=3)]
    html = Chart(
        "t", series, [Level("chance, b", 0.2, 3), Level("floor", 0.5), Level("chance", 0.1, neutral=True)]
    ).html()
    picture, legend = html.split('<ul class="legend">')
    for kind in ("series c0", "series c3", "level c3", "level l1", "level n"):
        assert f'class="{kind}"' in picture and f'<line class="{kind}"' in legend


def test_a_run_keeps_its_colour_in_every_chart_of_a_comparison() -> None:
    html, _ = page_of(run("full"), run("other"), run("random"))
    charts = re.findall(r'<figure class="chart">.*?</figure>', html, re.S)
    for name, colour in (("full", 0), ("other", 1), ("random", 2)):
        keys = [re.search(rf'<line class="series c(\d)"[^>]*/></svg>{name} <output', chart) for chart in charts]
        assert {int(key[1]) for key in keys if key} == {colour}
    levels = {
        level
        for chart in charts
        for level in re.findall(r'<line class="level (\w+)" [^>]*/></svg>chance, other', chart)
    }
    assert levels <= {"c1"}


def test_the_trigger_memory_of_fixed_triggers_is_read_among_them() -> None:
    fixed, _ = page_of(run())
    assert "recall of the trigger memory, 3 triggers" in fixed and "recall of the trigger memory, 64" not in fixed
    drawn, _ = page_of(run("random"))
    assert "recall of the trigger memory, 64 tokens" in drawn


def edge_rows(changes: Any) -> Any:
    columns = ["step", "ablated", "role", "metric", "value", "change", "change_low", "change_high"]
    rows = [
        (9, f"embed->L{i}H0.q", "in_context", "accuracy", 0.0, c, c - 0.01, c + 0.01) for i, c in enumerate(changes)
    ]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(("others", "said"), [(0, ""), (1, ""), (3, "The 14 largest changes of 17 are listed.")])
def test_the_edges_listed_are_those_that_change_most_either_way(
    monkeypatch: pytest.MonkeyPatch, others: Any, said: Any
) -> None:
    from birthlens.viz.report import story

    changes = [0.5, *[-0.1] * 13, *[0.02] * others]
    monkeypatch.setattr(story, "edge_ablations_table", lambda *_, **__: edge_rows(changes[::-1]))
    table, sentence = story._edges(run())
    assert table.index("+0.500") < table.index("-0.100") and table.count("<small>+0.010 to +0.030") == (others == 1)
    assert ("are listed" in table) == (said != "") and said in table
    assert f"layer {13 + others} head 0 (+0.500)" in sentence
    assert "between heads" not in table and "->" not in table


def test_only_edges_between_heads_are_said_to_be_tested_with_several_heads() -> None:
    html, _ = page_of(run("full"), causal=True)
    assert "Only edges between heads are tested." in html
    said = leads.edges(edge_rows([0.0, 0.005]))
    assert "No edge matters: the 95 % interval of each of the 2 edges tested contains 0." in said


def test_the_leads_are_the_runs_own() -> None:
    facts = Facts(run())
    accuracy = run().metrics().query("metric == 'in_context_accuracy' and split == 'held_out'").sort_values("step")
    assert f"is {accuracy['value'].iloc[-1]:.3f} at step 12" in leads.birth(facts)
    assert "2 layers with 1 head each (width 32)" in leads.trained(run()) and "3 triggers (" in leads.trained(run())
    assert "drawn for each sequence" in leads.trained(run("random"))
    assert "no token is a trigger" in leads.trained(run("no_triggers"))
    table = (
        memories_over(run(), bases=("raw",))
        .to_pandas()
        .query("metric == 'recall' and memory == 'output_memory' and candidates == 'all'")
    )
    passed = table[table["value"] > (1 + table["chance"]) / 2].sort_values("step")["step"]
    said = f"at step {passed.iloc[0]}" if len(passed) else "not yet"
    assert f"output memory (64 tokens) {said}" in leads.memories(facts)


def test_births_in_the_report_are_those_of_the_order_over_runs() -> None:
    onsets = chosen_sets(onsets_table(standardised_scores_table([run()])))
    assert leads.births(onsets) in leads.memories(Facts(run()))
    for row in onsets.to_dict("records"):
        said = "not yet" if math.isnan(row["onset"]) else f"at step {row['onset']:.0f}"
        assert said in leads.births(onsets)
    tied = pd.DataFrame(
        {"memory": ["output_memory", "trigger_memory", "prev_token_memory"], "onset": [10.0, 50.0, 50.0]}
    )
    assert leads.births(tied) == (
        "Births: the output memory at step 10, the trigger memory and the previous-token memory at step 50 (a tie)."
    )
    assert leads.births(tied.assign(onset=math.nan)).startswith("Births: not yet the output memory or")


def test_a_loss_worse_than_uniform_guessing_is_said() -> None:
    class Diverged(Facts):
        def series(self, metric: str, split: str = "held_out") -> tuple[list[int], list[float]]:
            return [0, 9], [4.0, 6264.0 if metric == "global_loss" else 0.5]

    assert "It is now above that of uniform guessing" in leads.birth(Diverged(run()))
    assert "uniform guessing" not in leads.birth(Facts(run("full")))


def test_the_lead_on_attention_names_who_looks_back_and_who_copies() -> None:
    back, copy = np.zeros((2, 1, 6, 6)), np.zeros((2, 1, 6, 6))
    for t in range(6):
        back[:, 0, t, max(0, t - 1)] = 1
        copy[:, 0, t, 1 if t == 4 else 0] = 1
    roles = (("trigger",), ("output",), (), (), ("in_context",), ())
    frames = AttentionFrames((0, 7), ("L0H0", "L1H0"), tuple("axbcad"), roles, np.concatenate([back, copy], 1))
    assert leads.attention(frames) == (
        "On this sequence, at step 7, L0H0 attends most to the previous token (1.00 of its attention on average); at "
        "repeated triggers, L1H0 attends most to what followed the trigger earlier (1.00)."
    )


def test_the_lead_on_heads_orders_them_by_what_their_loss_costs() -> None:
    rows = pd.DataFrame({"step": [0, 9, 9], "ablated": ["L0H0", "L0H0", "L1H0"], "change": [0.5, -0.2, -0.9]})
    assert leads.heads(rows) == (
        "Ablating one head at step 9 changes in-context accuracy by -0.900 without layer 1 head 0, "
        "-0.200 without layer 0 head 0."
    )
    assert leads.heads(rows.assign(change=0.0)).startswith("No head matters at step 9")


def test_a_comparison_says_when_each_run_learned() -> None:
    class Learned:
        headline = ("in_context", "in-context")

        def __init__(self, *values: Any) -> None:
            self.values = values

        def series(self, _: Any) -> Any:
            return [0, 5, 9], list(self.values)

    learned: list[Any] = [Learned(0, 0.95, 1), Learned(0, 0, 0.91), Learned(0, 0, 0)]
    said = leads.exceeded(["a", "b", "c"], learned)
    assert said == "0.9: a at step 5, b at step 9; not yet: c."
    assert "In-context accuracy first exceeds 0.9" in page_of(run(), run("other"))[0]


def test_memory_tables_have_labels_a_scale_and_their_step() -> None:
    html, _ = page_of(run())
    table = group(r'<figure class="table">.*?</figure>', html, flags=re.S)
    assert '<figcaption>output memory <small>at step <span class="at">12</span></small></figcaption>' in table
    rows = re.findall(r'<span style="top:([\d.]+)%">(.*?)</span>', table)
    labels = [legible(token) for token in run().statistics.vocab]
    assert [label for _, label in rows] == [escape(label) for label in labels[:: 64 // len(rows)]]
    assert float(rows[1][0]) == pytest.approx(100 * (64 // len(rows) + 0.5) / 64, abs=0.01)
    bound = json.loads(group(r'<script type="application/json">(.*?)</script>', table, place=1))["bound"]
    assert f'<p class="scale">{-bound:.3g} <span class="ramp"></span> {bound:.3g}</p>' in table


def test_an_unfinished_run_says_so() -> None:
    html, _ = page_of(unfinished())
    assert "Unfinished: step 6 of 12" in html and "--resume" in html


def test_what_cannot_be_shown_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from birthlens.viz.report import story

    def fail(*_: Any) -> None:
        raise BirthlensError("the <second> head is missing.")

    monkeypatch.setattr(story, "head_ablations_table", fail)
    html, parsed = page_of(run(), causal=True)
    assert "Not shown: the &lt;second&gt; head is missing." in html and "attention" in parsed.ids


def test_a_one_layer_model_has_heads_but_no_edges() -> None:
    html, _ = page_of(run("one_layer"), causal=True)
    assert "a one-layer model has no edges between heads" in html and "when a head is ablated" in html


def test_a_comparison_shows_every_run_and_what_differs() -> None:
    html, parsed = page_of(run(), run("other"), unfinished())
    assert "3 runs compared" in html and {"paper", "other", "unfinished"} <= set(parsed.words)
    settings = group(r'<section id="settings".*?</section>', html, flags=re.S)
    assert re.findall(r'<th scope="row">(.*?)</th>', settings) == ["model.d_model", "seeds.init"]
    assert html.count("<pre") == 3


def test_runs_that_cannot_be_compared_by_memory_are_named() -> None:
    html, _ = page_of(run(), run("full"))
    assert "full: not a two-layer simplified model" in html


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_preset_is_the_preset(name: Any) -> None:
    assert command(preset(name), "runs/x") == f"birthlens train runs/x --preset {name}"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "task.context": st.integers(2, 99),
            "task.triggers": st.sampled_from(["fixed", "random"]),
            "task.no_repeat": st.booleans(),
            "optimiser.learning_rate": st.floats(1e-5, 1),
            "optimiser.betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(list),
            "training.trained": st.sampled_from([None, ["L0.W_K"], ["L0.W_K", "L1.W_O"]]),
            "checkpoints.steps": st.lists(st.integers(0, 9), max_size=3),
            "seeds.init": st.integers(0, 2**40),
        },
    )
)
def test_the_command_makes_the_same_config(changes: Any) -> None:
    config = RunConfig.parse({}, [f"{name}={json.dumps(value)}" for name, value in changes.items()])
    words = shlex.split(command(config, "some where"))
    assert words[:3] == ["birthlens", "train", "some where"]
    rest = words[3:]
    base = preset(rest[1], rest[2:]) if rest[:1] == ["--preset"] else RunConfig.parse({}, rest)
    assert base == config


def test_the_command_of_a_real_run_makes_its_config() -> None:
    words = shlex.split(command(run().config, "x"))[3:]
    base = preset(words[1], words[2:]) if words[0] == "--preset" else RunConfig.parse({}, words)
    assert base == run().config == RunConfig.parse({}, TINY)


@given(
    st.lists(
        st.tuples(st.integers(0, 10_000), st.floats(-1e3, 1e3) | st.just(math.nan)),
        min_size=1,
        unique_by=lambda p: p[0],
    )
)
def test_charts_draw_any_series_inside_their_frame(points: Any) -> None:
    points = sorted(points)
    html = Chart("<t>", [Curve("s", [s for s, _ in points], [v for _, v in points])], [Level("level", 1.0)]).html()
    assert "&lt;t&gt;" in html and "nan" not in html.lower().replace("<svg", "")
    path = group(r'<path class="series c0" d="(.*?)"', html, place=1)
    numbers = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([-\d.]+ [-\d.]+)", path)]
    assert len(numbers) == sum(math.isfinite(v) for _, v in points)
    assert all(47 <= x <= 447 and 11 <= y <= 231 for x, y in numbers)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_few_and_inside(low: Any, span: Any) -> None:
    ticks = ticks_between(low, low + span)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-6 * span - 1e-9 <= t <= low + span * (1 + 1e-6) + 1e-9 for t in ticks)


def test_the_command_writes_a_page_and_refuses_others(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = CliRunner().invoke(seeing.report, [str(run().path), "--quick", "--out", str(out)], catch_exceptions=False)
    assert done.output.strip() == str(out) and out.read_text().startswith("<!doctype html>")
    with pytest.raises(BirthlensError, match="must end in"):
        write_report([run()], tmp_path / "report.pdf")
    with pytest.raises(BirthlensError, match="does not exist"):
        CliRunner().invoke(seeing.report, [str(tmp_path / "no")], catch_exceptions=False)
    with pytest.raises(BirthlensError, match="at least one run"):
        report_page([])


def test_a_report_names_weights_that_are_not_finite_and_shows_nothing_of_them(tmp_path: Path) -> None:
    import shutil

    import numpy as np

    from birthlens.model.weights import load_tensors

    path = tmp_path / "diverged"
    shutil.copytree(run().path, path)
    name = "checkpoints/step_00000012.safetensors"
    tensors = load_tensors(path / name)
    replace(path, name, {name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()})
    page, _ = page_of(Run(path))
    assert "step_00000012.safetensors has numbers in L0.W_K that are not finite" in page
    assert "Not shown" in page


def test_a_value_on_its_own_is_visible_in_a_chart_and_values_that_are_all_zero_have_an_axis() -> None:
    page = Chart(
        "lone", [Curve("a", [0, 5, 10], [math.nan, 0.5, math.nan]), Curve("b", [0, 5, 10], [0.0, 0.0, 0.0])]
    ).html()
    paths = re.findall(r'<path class="series[^"]*" d="([^"]*)"', page)
    assert re.fullmatch(r"M[\d.]+ [\d.]+h6", paths[0]) and paths[1].count("L") == 2
    assert [float(tick) for tick in re.findall(r'text-anchor="end">([^<]*)<', page)] == [0, 0.2, 0.4, 0.6]
    flat = Chart("flat", [Curve("a", [0, 10], [0.0, 0.0])]).html()
    assert [float(tick) for tick in re.findall(r'text-anchor="end">([^<]*)<', flat)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_page_has_the_terms_and_the_approximate_floor_of_its_task(tmp_path: Path) -> None:
    words = ["task.kind=markov", "task.rows=sinkhorn", "task.context=12", "model.d_model=8", "model.n_layers=1"]
    words += [
        "training.steps=2",
        "training.batch_size=4",
        "training.loss=all",
        "evaluation.batch_size=16",
        "checkpoints.every=1",
    ]
    for _ in train_to_disk(RunConfig.parse({}, words), tmp_path / "run"):
        pass
    page = report_page([Run(tmp_path / "run")], causal=False)
    text = re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", page, flags=re.DOTALL))
    terms = group(r"<dl>.*?</dl>", page, flags=re.DOTALL)
    assert "trigger" not in terms and "corpus" not in terms
    assert "A history that occurred before in the sequence" in terms and "<dt>Bayes-optimal (approximate)</dt>" in terms
    # The floor is a line of both charts, beside its name in the terms.
    assert text.count("Bayes-optimal (approximate)") >= 3
