"""Attention pictures: the data in the page is the model's own patterns, and no token can leave its place."""

import base64
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from seeing_runs import run, unfinished
from typed import present

import birthlens
from birthlens.cli import seeing
from birthlens.errors import BirthlensError
from birthlens.labels import legible
from birthlens.runs.evaluation import evaluation_batch
from birthlens.tasks.corpus import from_text
from birthlens.tasks.tokenizing import encoded
from birthlens.viz.attention_frames import LEVELS, ROLE_MARKS, AttentionFrames
from birthlens.viz.html import circuitsvis_bundle, script_json
from birthlens.viz.notebook import AttentionPicture, pictures_page, save_pictures, thinned

HOSTILE = [
    "</script><script>alert(1)</script>",
    "\"'`",
    "😀",
    "שלום",
    "\u202e",
    "<img src=x onerror=alert(2)>",
    "\n",
    "&amp;",
]


def hostile_picture(steps: Any = (0, 5)) -> Any:
    n = len(HOSTILE)
    patterns = np.tril(np.ones((len(steps), 1, n, n))) / np.arange(1, n + 1)[:, None]
    roles = (("trigger",), ("output", "in_context"), *[()] * (n - 2))
    return AttentionPicture(
        AttentionFrames(steps, ("L0H0",), tuple(map(legible, HOSTILE)), roles, patterns), "<b>hostile</b>"
    )


def data_of(html: Any) -> Any:
    return json.loads(present(re.search(r'<script type="application/json">(.*?)</script>', html, re.S))[1])


def test_the_page_holds_the_models_patterns_to_four_decimals() -> None:
    source = run()
    picture = birthlens.show_attention(source, step=12, row=2)
    batch = evaluation_batch(source, 8)
    with torch.no_grad():
        _, cache = source.model(12).run_with_cache(batch.tokens[2:3])
    data = data_of(picture.html())
    n = batch.tokens.shape[1]
    levels = np.frombuffer(base64.b64decode(data["patterns"]), "<u2").reshape(2, n * (n + 1) // 2) / LEVELS
    rows, columns = np.tril_indices(n)
    for layer in (0, 1):
        np.testing.assert_allclose(levels[layer], cache["pattern", layer][0, 0].numpy()[rows, columns], atol=5e-5)
    assert data["tokens"] == [legible(source.statistics.vocab[i]) for i in batch.tokens[2].tolist()]
    assert data["causal"] and data["heads"] == ["L0H0", "L1H0"] and data["steps"] == [12]


def test_roles_are_those_of_the_batch() -> None:
    source = run()
    batch = evaluation_batch(source, 8)
    frames = birthlens.show_attention(source, step=0, tokens=batch, row=1).frames
    for t, roles in enumerate(frames.roles):
        seen = int(batch.occurrence[1, t])
        assert ("trigger" in roles) == (seen == 1) and ("in_context" in roles) == (seen >= 2)
        assert ("output" in roles) == (t > 0 and int(batch.occurrence[1, t - 1]) > 0)
        assert ("absorbed" in roles) == bool(batch.absorbed[1, t])
    assert frames.marked[0] == "".join(ROLE_MARKS[role][0] for role in frames.roles[0]) + frames.tokens[0]


def test_a_text_of_ones_own_is_marked_by_the_fixed_triggers() -> None:
    source = run()
    triggers = {source.statistics.vocab[i] for i in source.trigger_ids}
    text = "to be or not to be"
    frames = birthlens.show_attention(source, step=-1, tokens=text).frames
    assert "".join(frames.tokens) == text.replace(" ", "␣")
    for t, character in enumerate(text):
        expected = [] if character not in triggers else ["in_context" if character in text[:t] else "trigger"]
        assert [role for role in frames.roles[t] if role in ("trigger", "in_context")] == expected


def test_any_transformerlens_model_can_be_shown() -> None:
    model = run("full").model(-1)
    ids = [3, 1, 4, 1, 5]
    picture = birthlens.show_attention(model, tokens=ids, labels=list("abcde"), heads=["L1H1"])
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    np.testing.assert_allclose(picture.frames.patterns[0, 0], cache["pattern", 1][0, 1].numpy(), atol=1e-6)
    assert picture.frames.tokens == ("a", "b", "c", "d", "e") and "bl-steps" not in picture.html()


@pytest.mark.parametrize("kind", ["full", "one_layer", "rotary", "random", "no_triggers"])
def test_runs_of_every_shape_can_be_shown(kind: Any) -> None:
    source = run(kind)
    frames = birthlens.show_attention(source, "every:2").frames
    model = source.config.model
    assert len(frames.heads) == model.n_layers * model.n_heads and frames.steps == (0, 6, 12)
    assert birthlens.show_attention(unfinished()).frames.steps == (0, 3, 6)


def test_twenty_steps_of_64_tokens_take_a_quarter_of_a_megabyte() -> None:
    patterns = np.tril(np.random.default_rng(0).random((20, 2, 64, 64)))
    frames = AttentionFrames(tuple(range(20)), ("L0H0", "L1H0"), ("x",) * 64, ((),) * 64, patterns)
    assert len(json.dumps(frames.payload())) < 260_000
    assert len(pictures_page([AttentionPicture(frames, "t")]).encode()) < 2_500_000


def test_hostile_tokens_stay_text() -> None:
    page = pictures_page([hostile_picture()]).replace(circuitsvis_bundle(), "")
    assert page.count("<script") == page.count("</script")  # nothing opens or closes an element of its own
    assert "alert(1)</script>" not in page and "<img" not in page and "<b>hostile" not in page
    assert data_of(page)["tokens"][0] == HOSTILE[0] and data_of(page)["tokens"][4] == "U+202E"


def test_the_notebook_frame_is_self_contained_and_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    html = hostile_picture()._repr_html_()
    assert html.startswith("<iframe srcdoc=") and html.count("<") == 2  # the frame and its end: all else is escaped
    assert "default-src" in html and "unpkg" not in html


def test_two_pictures_share_one_copy_of_the_scripts(tmp_path: Path) -> None:
    page = save_pictures([hostile_picture(), hostile_picture()], tmp_path / "two.html").read_text()
    names = re.findall(r'<figure class="bl-attention" id="([^"]+)"', page)
    assert len(set(names)) == 2
    assert page.count(circuitsvis_bundle()) == 1 and page.count("</figure>") == 2


@given(st.text())
def test_json_in_a_script_keeps_every_text_and_ends_no_element(text: Any) -> None:
    spelled = script_json([text])
    assert json.loads(spelled) == [text] and not set("<>&") & set(spelled)


@given(st.text(max_size=6))
def test_legible_text_has_nothing_invisible(text: Any) -> None:
    shown = legible(text)
    assert shown and not any(c.isspace() or not c.isprintable() for c in shown)


@given(st.lists(st.integers(0, 999), min_size=1, unique=True).map(sorted), st.integers(2, 30))
def test_thinned_steps_keep_both_ends(steps: Any, most: Any) -> None:
    kept = thinned(steps, most)
    assert kept[0] == steps[0] and kept[-1] == steps[-1] and len(kept) <= max(most, 1) and set(kept) <= set(steps)
    assert len(steps) > most or kept == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 7}, "step = 7 is not kept"),
        ({"heads": ["L5H0"]}, "head = L5H0 does not exist in this model; valid heads are L0H0, L1H0"),
        ({"row": 900, "tokens": "batch"}, "row = 900: the batch has rows 0 to 3"),
        ({"tokens": "~~"}, "text holds"),
        ({"tokens": [999]}, "are not ids"),
        ({"tokens": [[1, 2, 3], [4, 5, 6]]}, "tokens have shape .2, 3.: give the ids of one sequence"),
        ({"tokens": [0] * 99}, "the run's context has room for 1 to 24"),
        ({"length": 0}, "length = 0: show at least 1 position"),
        ({"length": -5}, "length = -5"),
        ({"labels": ["a"]}, "give labels only with a model"),
    ],
)
def test_what_cannot_be_shown_is_named(arguments: Any, message: Any) -> None:
    if arguments.get("tokens") == "batch":
        arguments = {**arguments, "tokens": evaluation_batch(run(), 4)}
    with pytest.raises(BirthlensError, match=message):
        birthlens.show_attention(run(), **arguments)


def test_models_need_ids_and_have_no_steps() -> None:
    model = run().model(0)
    with pytest.raises(BirthlensError, match="give the ids"):
        birthlens.show_attention(model)
    with pytest.raises(BirthlensError, match="give at least one id"):
        birthlens.show_attention(model, tokens=[])
    two = [[1, 2, 3], [4, 5, 6]]
    for several in (two, torch.tensor(two), np.array(two)):
        with pytest.raises(BirthlensError, match=r"tokens have shape \[2, 3\]: give the ids of one sequence"):
            birthlens.show_attention(model, tokens=several)
    assert len(birthlens.show_attention(model, tokens=two[:1]).frames.tokens) == 3
    with pytest.raises(BirthlensError, match="ids are whole numbers"):
        birthlens.show_attention(model, tokens=[0.5, 1.0])
    for text in ([["a"]], [[1], [2, 3]], [None]):
        with pytest.raises(BirthlensError, match="as a list of whole numbers"):
            birthlens.show_attention(model, tokens=text)
    with pytest.raises(BirthlensError, match=r"tokens = \[999\] are not ids"):
        birthlens.show_attention(model, tokens=[1, 999])
    with pytest.raises(BirthlensError, match="the model's context has room for 1 to"):
        birthlens.show_attention(model, tokens=[1] * 99)
    with pytest.raises(BirthlensError, match="row = 4: the batch has rows 0 to 3"):
        birthlens.show_attention(model, tokens=evaluation_batch(run(), 4), row=4)
    with pytest.raises(BirthlensError, match="length = 0"):
        birthlens.show_attention(model, tokens=[1, 2], length=0)
    with pytest.raises(BirthlensError, match="a model has no checkpoints"):
        birthlens.show_attention(model, step=3, tokens=[1, 2])
    with pytest.raises(BirthlensError, match="labels = 1 strings; give one for each of 2"):
        birthlens.show_attention(model, tokens=[1, 2], labels=["a"])


def test_patterns_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BirthlensError, match="diverged"):
        AttentionFrames((0,), ("L0H0",), ("a",), ((),), np.full((1, 1, 1, 1), np.nan))


def test_a_text_is_spelt_in_the_vocabulary() -> None:
    assert encoded(from_text("ab"), "ba") == [1, 0]


def test_the_command_writes_one_page(tmp_path: Path) -> None:
    out = tmp_path / "attention.html"
    arguments = [str(run().path), "--steps", "0,-1", "--text", "to be", "--heads", "L1H0", "--out", str(out)]
    assert CliRunner().invoke(seeing.attention, arguments, catch_exceptions=False).output.strip() == str(out)
    assert data_of(out.read_text())["heads"] == ["L1H0"]
    with pytest.raises(BirthlensError, match="must end in"):
        CliRunner().invoke(
            seeing.attention, [str(run().path), "--out", str(tmp_path / "a.png")], catch_exceptions=False
        )


def test_the_repr_of_a_picture_is_one_short_line() -> None:
    said = repr(birthlens.show_attention(run(), step="last"))
    assert len(said) < 200 and "\n" not in said and "1 step, 2 heads, 24 tokens" in said
