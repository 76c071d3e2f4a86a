"""One self-contained HTML page that describes a run, or compares several runs.

    command_of_run  the command that repeats the run
    charts          line charts as inline SVG
    numbers         the table of key numbers, each with its chance level
    story           one run: what was trained, the birth, the memories, the causal evidence, the attention
    compare         several runs
    gallery_page    every figure of `birthlens plot`, on a page of its own

The page loads nothing from the network. Its script moves the shared step cursor; without it, all but the attention patterns
and the memory tables can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.viz.html import write_page


def write_report(runs: Sequence[Run], path: str | Path, causal: bool = True) -> Path:
    """Write the report of one run, or the comparison of several; `causal=False` leaves the interventions out.

    Raises:
        BirthlensError: without a run, or for a name that cannot be written.
    """
    return write_page(path, report_page(runs, causal))


def report_page(runs: Sequence[Run], causal: bool = True) -> str:
    """Return the report as one HTML document."""
    from birthlens.viz.report.compare import comparison
    from birthlens.viz.report.story import story

    if not runs:
        raise BirthlensError("runs = []: give at least one run to report on.")
    return story(runs[0], causal) if len(runs) == 1 else comparison(runs)
