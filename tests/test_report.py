"""The report: what it says is what the run holds, for runs of every shape, and the command in it makes the run again."""

import json
import math
import re
import shlex
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from seeing_runs import KINDS, TINY, run, unfinished

from birthlens.analysis.trajectory import memories_over
from birthlens.cli import seeing
from birthlens.config import RunConfig
from birthlens.errors import BirthlensError
from birthlens.presets import PRESETS, preset
from birthlens.report import report_page, write_report
from birthlens.report.charts import Chart, Series, _ticks
from birthlens.report.reproduce import command
from birthlens.runs import Run
from birthlens.web import circuitsvis_bundle

VOID = {"meta", "link", "input", "br", "line", "path"}


class Well(HTMLParser):
    """Checks that every element is closed in its turn, and keeps attributes and visible text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.words, self.addresses = [], [], [], []
        self.feed(html)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


def page_of(*runs, causal=False):
    html = report_page(runs, causal)
    return html, Well(html.replace(circuitsvis_bundle(), ""))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_shape_have_a_report(kind):
    html, parsed = page_of(run(kind), causal=kind in ("paper", "one_layer", "full", "no_triggers"))
    assert len(html.encode()) < 10_000_000
    assert parsed.addresses == ["data:,", "#main"]  # nothing to fetch
    for section in ("numbers", "birth", "memories", "causes", "attention", "made"):
        assert section in parsed.ids
    assert "Traceback" not in html and ">nan<" not in html.lower()


def test_the_key_numbers_are_the_runs_own():
    source = run()
    html, _ = page_of(source)
    metrics = source.metrics()
    accuracy = metrics[(metrics["metric"] == "in_context_accuracy") & (metrics["split"] == "held_out")]["value"].iloc[
        -1
    ]
    row = re.search(r'<th scope="row">in-context accuracy</th>(.*?)</tr>', html)[1]
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells[:2] == [f"{accuracy:.3f}", f"{1 / len(source.statistics):.3f}"]
    table = memories_over(source, source.steps[-1:], bases=("raw",)).query("metric == 'recall'")
    for memory, said in (("output_memory", "output memory"), ("prev_token_memory", "previous token memory")):
        value = table[(table["memory"] == memory) & (table["candidates"] == "all")]["value"].iloc[0]
        row = re.search(rf'<th scope="row">recall, {said}, all</th>(.*?)</tr>', html)[1]
        assert re.findall(r"<td>(.*?)</td>", row)[0] == f"{value:.3f}"


def test_curves_in_the_page_are_the_measured_ones():
    source = run()
    html, _ = page_of(source)
    figure = re.search(r"<figcaption>In-context accuracy</figcaption>.*?</figure>", html, re.S)[0]
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure)[1])
    rows = source.metrics().query("metric == 'in_context_accuracy'")
    assert data["series"][0]["steps"] == list(rows["step"])
    assert data["series"][0]["values"] == pytest.approx(list(rows["value"]), abs=1e-5)


def test_an_unfinished_run_says_so():
    html, _ = page_of(unfinished())
    assert "unfinished: step 6 of 12" in html and "--resume" in html


def test_what_cannot_be_shown_gives_its_reason(monkeypatch):
    from birthlens.report import story

    def fail(*_):
        raise BirthlensError("the <second> head is missing.")

    monkeypatch.setattr(story, "head_ablations_table", fail)
    html, parsed = page_of(run(), causal=True)
    assert "Not shown: the &lt;second&gt; head is missing." in html and "attention" in parsed.ids


def test_a_one_layer_model_has_heads_but_no_edges():
    html, _ = page_of(run("one_layer"), causal=True)
    assert "a model of one layer has no edge between heads" in html and "without a head" in html


def test_a_comparison_shows_every_run_and_what_differs():
    html, parsed = page_of(run(), run("other"), unfinished())
    assert "3 runs compared" in html and {"paper", "other", "unfinished"} <= set(parsed.words)
    settings = re.search(r'<section id="settings".*?</section>', html, re.S)[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', settings) == ["model.d_model", "seeds.init"]
    assert html.count("<pre") == 3


def test_runs_that_cannot_be_compared_by_memory_are_named():
    html, _ = page_of(run(), run("full"))
    assert "full: no two-layer simplified model" in html


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_preset_is_the_preset(name):
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
def test_the_command_makes_the_same_config(changes):
    config = RunConfig.parse({}, [f"{name}={json.dumps(value)}" for name, value in changes.items()])
    words = shlex.split(command(config, "some where"))
    assert words[:3] == ["birthlens", "train", "some where"]
    rest = words[3:]
    base = preset(rest[1], rest[2:]) if rest[:1] == ["--preset"] else RunConfig.parse({}, rest)
    assert base == config


def test_the_command_of_a_real_run_makes_its_config():
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
def test_charts_draw_any_series_inside_their_frame(points):
    points = sorted(points)
    html = Chart("<t>", [Series("s", [s for s, _ in points], [v for _, v in points])], [("level", 1.0)]).html()
    assert "&lt;t&gt;" in html and "nan" not in html.lower().replace("<svg", "")
    path = re.search(r'<path class="series c0" d="(.*?)"', html)[1]
    numbers = [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([-\d.]+ [-\d.]+)", path)]
    assert len(numbers) == sum(math.isfinite(v) for _, v in points)
    assert all(47 <= x <= 447 and 11 <= y <= 231 for x, y in numbers)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_few_and_inside(low, span):
    ticks = _ticks(low, low + span)
    assert 2 <= len(ticks) <= 6 and all(low - 1e-6 * span - 1e-9 <= t <= low + span * (1 + 1e-6) + 1e-9 for t in ticks)


def test_the_command_writes_a_page_and_refuses_others(tmp_path):
    out = tmp_path / "report.html"
    done = CliRunner().invoke(seeing.report, [str(run().path), "--quick", "--out", str(out)], catch_exceptions=False)
    assert done.output.strip() == str(out) and out.read_text().startswith("<!doctype html>")
    with pytest.raises(BirthlensError, match="must end in"):
        write_report([run()], tmp_path / "report.pdf")
    with pytest.raises(BirthlensError, match="does not exist"):
        CliRunner().invoke(seeing.report, [str(tmp_path / "no")], catch_exceptions=False)
    with pytest.raises(BirthlensError, match="at least one run"):
        report_page([])


def test_a_diverged_run_still_has_a_report(tmp_path):
    import shutil

    import numpy as np

    from birthlens.weights import load_tensors, save_tensors

    path = tmp_path / "diverged"
    shutil.copytree(run().path, path)
    file = path / "checkpoints" / "step_00000012.safetensors"
    tensors = load_tensors(file)
    save_tensors(file, {name: np.full_like(tensor, np.nan) for name, tensor in tensors.items()})
    html, parsed = page_of(Run(path))
    assert "diverged" in "".join(parsed.words) and "Not shown" in html
