"""Print tables aligned, as CSV or as JSON, and write them to files in the format of their ending.

A `SeriesTable` becomes a pandas table only where that is needed; CSV is written without pandas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.analysis.memories.series import SeriesTable

FORMATS = ("table", "csv", "json")
ENDINGS = (".csv", ".json", ".parquet")


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--format table|csv|json`."""
    return click.option(
        "--format", "style", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print."
    )(function)


def out_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--out FILE`, checked before any work is done."""
    return click.option(
        "--out", type=click.Path(dir_okay=False), callback=_checked, help="Write .csv, .parquet or .json."
    )(function)


def show(table: pd.DataFrame | SeriesTable, style: str = "table", title: str | None = None) -> None:
    """Print a table."""
    if style == "csv":
        click.echo(_csv(table), nl=False)
    elif style == "json":
        click.echo(_frame(table).to_json(orient="records", indent=1, force_ascii=False))
    else:
        frame = _frame(table)
        rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
        show_rows(list(map(str, frame.columns)), rows, title)


def show_rows(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print rows of text as an aligned table; numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    if title:
        click.echo(click.style(title, bold=True))
    for number, row in enumerate([header, *rows]):
        cells = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        line = "  ".join(cells).rstrip()
        click.echo(click.style(line, underline=True) if number == 0 else line)


def write(table: pd.DataFrame | SeriesTable, out: str) -> None:
    """Write a table to a file, atomically, in the format of its ending."""
    import io

    from birthlens.system import write_atomically

    path = Path(out)
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        _frame(table).to_parquet(buffer, index=False)
        data = buffer.getvalue()
    elif path.suffix == ".json":
        data = (_frame(table).to_json(orient="records", indent=1, force_ascii=False) + "\n").encode()
    else:
        data = _csv(table).encode()
    write_atomically(path, data)


def deliver(table: pd.DataFrame | SeriesTable, out: str | None, style: str, title: str | None = None) -> None:
    """Write the table where a file is named, else print it."""
    if out is None:
        show(table, style, title)
    else:
        write(table, out)
        click.echo(f"{len(table)} rows written to {out}", err=True)


def _csv(table: pd.DataFrame | SeriesTable) -> str:
    from birthlens.analysis.memories.series import SeriesTable

    return table.to_csv() if isinstance(table, SeriesTable) else table.to_csv(index=False)


def _frame(table: pd.DataFrame | SeriesTable) -> pd.DataFrame:
    from birthlens.analysis.memories.series import SeriesTable

    return table.to_pandas() if isinstance(table, SeriesTable) else table


def _checked(context: click.Context, parameter: click.Parameter, out: str | None) -> str | None:
    if out is not None:
        path = Path(out)
        if path.suffix not in ENDINGS:
            raise BirthlensError(f"out = {out!r}: the name must end in {', '.join(ENDINGS)}.")
        if not path.parent.is_dir():
            raise BirthlensError(f"out = {out!r}: the directory {str(path.parent)!r} does not exist; make it first.")
    return out


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if value != value:
            return "-"
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("-", "chance")
    return True
