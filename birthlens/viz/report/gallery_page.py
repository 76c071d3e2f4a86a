"""The gallery: one page with every figure that `birthlens plot` draws of a run, each with the command that draws it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from birthlens.runs.run import Run
from birthlens.viz.figures.dark import darken
from birthlens.viz.figures.gallery import RUN_FIGURES, draw
from birthlens.viz.figures.style import STYLE
from birthlens.viz.html import escape, write_page
from birthlens.viz.report.page import document, section

DPI = 150


def write_gallery(
    run: Run, path: str | Path, steps: Sequence[int] | None = None, told: Callable[[str], None] | None = None
) -> Path:
    """Draw every figure of a run into one self-contained page; if a figure is unavailable, the page says why.

    Each figure is included twice, for light and for dark screens. `told` is called with the name of each before it is drawn.

    Raises:
        BirthlensError: for a name that does not end in .html, or a directory that does not exist.
    """
    chosen = list(run.steps if steps is None else steps)
    sections = []
    for kind, function in RUN_FIGURES.items():
        if told is not None:
            told(kind)

        def body(kind: str = kind) -> str:
            return _pictures(draw(run, kind, chosen), kind, run)

        lead = (function.__doc__ or "").splitlines()[0]
        sections.append(section(kind, kind.replace("-", " ").capitalize(), body, lead))
    subtitle = f"Every figure of birthlens plot, at {len(chosen)} steps, each with its command."
    return write_page(path, document(f"Gallery of {run.path.name}", subtitle, chosen[-1:], sections))


def _pictures(figure: Figure, kind: str, run: Run) -> str:
    light = _png(figure)
    dark = _png(darken(figure))
    width = round(figure.get_size_inches()[0] * 96)
    command = f"birthlens plot {run.path.name} --kind {kind} --out {kind}.svg"
    return (
        f'<figure class="picture"><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(kind)}" style="width:{width}px;max-width:100%;height:auto"></picture>'
        f"<figcaption><code>{escape(command)}</code></figcaption></figure>"
    )


def _png(figure: Figure) -> str:
    """Return a picture as a data URL."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={}, facecolor=figure.get_facecolor())
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
