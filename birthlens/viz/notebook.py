"""Attention patterns in notebooks and in files: circuitsvis's heat map with legible, marked tokens, small
pictures of all heads, and a slider over steps.

Nothing is fetched when a picture is shown. In Jupyter each picture is in a frame of its own, so its scripts cannot conflict
with those of the page or of another picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from birthlens.errors import BirthlensError
from birthlens.labels import counted
from birthlens.model.sites import Head
from birthlens.runs.run import Run, load_run
from birthlens.tasks.batch import TokenBatch
from birthlens.viz.attention_frames import ROLE_MARKS, AttentionFrames, model_frames, run_frames, series_frames
from birthlens.viz.html import asset, circuitsvis_bundle, escape, page, script_json, write_page

if TYPE_CHECKING:
    from birthlens.model.hooked import HookedModel


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPicture:
    """An attention picture: shown by Jupyter, saved as one self-contained HTML file, or put on a page with others."""

    frames: AttentionFrames
    title: str

    def html(self, number: int = 0) -> str:
        """Return the picture as HTML for a page that ends with `scripts()`; `number` distinguishes equal pictures."""
        data = script_json({**self.frames.payload(), "alt": self.alt})
        name = f"bl-{sha256(data.encode()).hexdigest()[:10]}-{number}"
        frames = self.frames
        last = len(frames.steps) - 1
        slider = f"""
<label class="bl-slide">step <output class="bl-step">{frames.steps[-1]}</output>
<input class="bl-steps" type="range" min="0" max="{last}" step="1" value="{last}" aria-label="checkpoint"></label>"""
        options = "".join(f"<option>{escape(head)}</option>" for head in frames.heads)
        n = len(frames.tokens)
        thumbs = "".join(
            f'<button type="button" class="bl-thumb"><canvas width="{n}" height="{n}" aria-hidden="true"></canvas>'
            f"<span>{escape(head)}</span></button>"
            for head in frames.heads
        )
        return f"""<figure class="bl-attention" id="{name}" aria-label="{escape(self.title)}">
<figcaption>{escape(self.title)}</figcaption>
<div class="bl-controls">{slider if last else ""}
<label>head <select class="bl-head">{options}</select></label>
</div>
<div class="bl-strip" role="group" aria-label="tokens; arrow keys move the query">{_strip(frames)}</div>
<p class="bl-reading" role="status"></p>
{_legend(frames)}
<div class="bl-thumbs" role="group" aria-label="heads; arrow keys choose">{thumbs}</div>
<p class="bl-scale"><span class="bl-shown"></span>, rows attend to columns:
<span class="bl-ends">0 <span class="bl-ramp"></span> 1</span></p>
<div class="bl-heads" id="{name}-heads"></div>
<script type="application/json">{data}</script>
<script>document.addEventListener("DOMContentLoaded", () => birthlens.attention("{name}"));</script>
</figure>"""

    @property
    def alt(self) -> str:
        """The heat map in words; the page adds its head and step."""
        return (
            f"Rows are {len(self.frames.tokens)} tokens, columns the tokens that each attends to. The line above the map "
            "says what the chosen token attends to."
        )

    def save(self, path: str | Path) -> Path:
        """Write the picture as one self-contained HTML file."""
        return save_pictures([self], path)

    def __repr__(self) -> str:
        frames = self.frames
        size = (
            f"{counted(len(frames.steps), 'step')}, {counted(len(frames.heads), 'head')}, {len(frames.tokens)} tokens"
        )
        return (
            f"AttentionPicture({self.title!r}: {size}; show it in a notebook, or write it with .save('attention.html'))"
        )

    def _repr_html_(self) -> str:
        document = escape(pictures_page([self]))
        grow = "this.style.height = this.contentDocument.documentElement.scrollHeight + 20 + 'px'"
        return (
            f'<iframe srcdoc="{document}" title="{escape(self.title)}" style="width: 100%; height: 60rem; border: 0" '
            f'onload="setTimeout(() => {{ {grow} }}, 400)"></iframe>'
        )


def show_attention(
    source: Run | HookedModel | str | Path,
    step: int | str | Sequence[int] | None = None,
    tokens: object = None,
    row: int = 0,
    heads: Sequence[str | Head] | None = None,
    labels: Sequence[str] | None = None,
    length: int = 64,
    title: str | None = None,
    device: str = "cpu",
) -> AttentionPicture:
    """Show the attention pattern of every head on one sequence.

    `source` is a run (or its path) or any TransformerLens model. For a run, `step` is a kept step, several of them, or a
    choice such as "every:5". With more than one step the picture has a slider; by default it has up to twenty steps.
    `tokens` are a TokenBatch (of which `row` is shown), a text, or the ids of one sequence; by default a held-out
    sequence of the run's task. For a model, `tokens` are ids and `labels` their text. The first `length` positions are
    shown. A run computes on `device`, a model where it is.

    Raises:
        BirthlensError: for steps, heads or tokens that do not exist, or a model without tokens.

    Example:
        >>> import birthlens  # doctest: +SKIP
        >>> birthlens.show_attention("runs/demo", step="every:5", heads=["L1H0"]).save("attention.html")  # doctest: +SKIP
    """
    chosen = None if heads is None else [Head.parse(head) if isinstance(head, str) else head for head in heads]
    if isinstance(source, str | Path):
        source = load_run(source)
    if isinstance(source, Run):
        if labels is not None:
            raise BirthlensError("labels = ...: a run has labels for its tokens; give labels only with a model.")
        frames = run_frames(source, _steps(source, step), tokens, row, chosen, length, device)
        return AttentionPicture(frames, title or f"Attention in {source.path.name}")
    if tokens is None or isinstance(tokens, str):
        raise BirthlensError("tokens = None: give the ids to run the model on (a list, or a tensor of one sequence).")
    if step is not None:
        raise BirthlensError(f"step = {step!r}: a model has no checkpoints; leave it out, or show a run.")
    ids = tokens
    if isinstance(tokens, TokenBatch):
        if not 0 <= row < len(tokens):
            raise BirthlensError(f"row = {row}: the batch has rows 0 to {len(tokens) - 1}.")
        ids = tokens.tokens[row]
    frames = model_frames(source, ids, labels, chosen, length)
    return AttentionPicture(frames, title or "Attention")


def series_pictures(
    models: Iterable[tuple[int, HookedModel]],
    sequences: Sequence[object],
    heads: Sequence[str | Head] | None = None,
    length: int = 64,
    name: str = "a series",
) -> list[AttentionPicture]:
    """Show the attention patterns of a series of models on sequences of ids: a picture each, with a slider over steps."""
    chosen = None if heads is None else [Head.parse(head) if isinstance(head, str) else head for head in heads]
    frames = series_frames(models, sequences, chosen, length)
    numbers = [f", prompt {n}" if len(frames) > 1 else "" for n in range(1, len(frames) + 1)]
    return [AttentionPicture(one, f"Attention in {name}{number}") for one, number in zip(frames, numbers, strict=True)]


def pictures_page(pictures: Sequence[AttentionPicture], title: str = "Attention") -> str:
    """Return one HTML document with several pictures; it contains the scripts only once."""
    body = "\n".join(picture.html(number) for number, picture in enumerate(pictures))
    return page(title, f"<main>\n{body}\n</main>", asset("page.css") + asset("attention.css"), scripts())


def save_pictures(pictures: Sequence[AttentionPicture], path: str | Path) -> Path:
    """Write several pictures to one self-contained HTML file."""
    return write_page(path, pictures_page(pictures, pictures[0].title if len(pictures) == 1 else "Attention"))


def scripts() -> str:
    """Return the scripts that a page with pictures needs once, after the pictures."""
    return f"<script>\n{circuitsvis_bundle()}\n</script>\n<script>\n{asset('attention.js')}\n</script>"


def thinned(steps: Sequence[int], most: int) -> list[int]:
    """Keep at most `most` steps, evenly spaced, including both ends.

    Example:
        >>> thinned(range(0, 101, 10), 4)
        [0, 30, 70, 100]
    """
    kept = list(steps)
    if len(kept) <= most:
        return kept
    return [kept[round(i * (len(kept) - 1) / (most - 1))] for i in range(most)]


def _steps(run: Run, step: int | str | Sequence[int] | None) -> list[int]:
    if step is None:
        return thinned(run.steps, 20)
    if isinstance(step, str):
        return run.select(step)
    return run.select(",".join(map(str, [step] if isinstance(step, int) else step)))


def _strip(frames: AttentionFrames) -> str:
    tokens = []
    for token, roles in zip(frames.tokens, frames.roles, strict=True):
        marks = "".join(f'<span class="bl-mark bl-of-{role}">{ROLE_MARKS[role][0]}</span>' for role in roles)
        said = ", ".join(ROLE_MARKS[role][1] for role in roles)
        classes = " ".join(["bl-token", *(f"bl-{role}" for role in roles)])
        label = escape(f"{token}, {said}" if said else token)
        tokens.append(
            f'<button type="button" class="{classes}" tabindex="-1" title="{label}">'
            f"{marks}<bdi>{escape(token)}</bdi></button>"
        )
    return "".join(tokens)


def _legend(frames: AttentionFrames) -> str:
    present = {role for roles in frames.roles for role in roles}
    if not present:
        return ""
    items = "".join(
        f'<li><span class="bl-of-{role}">{mark}</span> {escape(said)}</li>'
        for role, (mark, said) in ROLE_MARKS.items()
        if role in present
    )
    return f'<ul class="bl-legend" aria-label="marks">{items}</ul>'
