"""Print tables aligned, as CSV or as JSON, and write them to files in the format of their ending.

A `SeriesTable` becomes a pandas table only where that is needed; CSV is written without pandas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.streams import note, tell
from birthlens.errors import BirthlensError
from birthlens.labels import neutral

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.analysis.memories.series import SeriesTable

FORMATS = ("table", "csv", "json", "spreadsheet")
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What spreadsheets take for the beginning of a formula, full-width forms included."""
_STEERING = re.compile(r"[\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
"""Characters that JSON may hold as they are, and that could steer a terminal or hide text."""
ENDINGS = (".csv", ".json", ".parquet")


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--format table|csv|json|spreadsheet`."""
    return click.option(
        "--format",
        "style",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="How to print; spreadsheet is CSV without formulas.",
    )(function)


def out_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--out FILE`, checked before any work is done."""
    return click.option(
        "--out", type=click.Path(dir_okay=False), callback=_checked, help="Write .csv, .parquet or .json."
    )(function)


def show(table: pd.DataFrame | SeriesTable, style: str = "table", title: str | None = None) -> None:
    """Print a table."""
    if style in ("csv", "spreadsheet"):
        show_csv(_csv(table, style))
    elif style == "json":
        tell(_json(table))
    else:
        frame = _frame(table)
        rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
        show_rows(list(map(str, frame.columns)), rows, title)


def show_rows(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print rows of text as an aligned table; numbers to the right."""
    header = [neutral(cell) for cell in header]
    rows = [[neutral(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    if title:
        click.echo(click.style(neutral(title), bold=True))
    for number, row in enumerate([header, *rows]):
        cells = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric, strict=True)]
        line = "  ".join(cells).rstrip()
        click.echo(click.style(line, underline=True) if number == 0 else line)


def show_csv(text: str) -> None:
    """Print CSV: exactly to a file or a pipe, and without control characters on a terminal."""
    import sys

    if sys.stdout.isatty():
        tell(text, nl=False)
    else:
        sys.stdout.write(text)


def without_formulas(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: an apostrophe comes before = + - @ and their like.

    Example:
        >>> without_formulas("=1+1"), without_formulas("-3"), without_formulas(-3)
        ("'=1+1", '-3', -3)
    """
    if not isinstance(cell, str):
        return cell
    cell = neutral(cell.replace("\t", " ").replace("\r", " "))
    return f"'{cell}" if cell.lstrip().startswith(_FORMULA) and not _is_number(cell) else cell


def write(table: pd.DataFrame | SeriesTable, out: str, style: str = "csv") -> None:
    """Write a table to a file, atomically, in the format of its ending; `style` may be spreadsheet for .csv."""
    import io

    from birthlens.system import write_atomically

    path = Path(out)
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        _frame(table).to_parquet(buffer, index=False)
        data = buffer.getvalue()
    elif path.suffix == ".json":
        data = (_json(table) + "\n").encode()
    else:
        data = _csv(table, style).encode()
    write_atomically(path, data)


def check_counts(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the table; name on the error stream the groups of `column` that have no observation at all (n = 0).

    Raises:
        BirthlensError: if no group has any.
    """
    counts = table.groupby(column, sort=False)["n"].max()
    empty = ", ".join(str(group) for group in counts.index[counts == 0])
    if len(counts) and (counts == 0).all():
        raise BirthlensError(f"{column} = {empty}: the sequences hold nothing to count; use more or longer ones.")
    if empty:
        note(f"{column} = {empty}: n = 0 in these sequences; use more or longer ones.")
    return table


def deliver(table: pd.DataFrame | SeriesTable, out: str | None, style: str, title: str | None = None) -> None:
    """Write the table where a file is named, else print it."""
    if out is None:
        show(table, style, title)
    else:
        write(table, out, style)
        tell(f"{len(table)} rows written to {out}", err=True)


def _csv(table: pd.DataFrame | SeriesTable, style: str) -> str:
    from birthlens.analysis.memories.series import SeriesTable

    if style == "spreadsheet":
        return _frame(table).map(without_formulas).rename(columns=without_formulas).to_csv(index=False)
    return table.to_csv() if isinstance(table, SeriesTable) else table.to_csv(index=False)


def _json(table: pd.DataFrame | SeriesTable) -> str:
    return escaped_json(_frame(table).to_json(orient="records", indent=1, force_ascii=False))


def escaped_json(text: str) -> str:
    """Write as escapes what stands in JSON and could steer a terminal."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


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
        return f"{value:z.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("-", "chance")
    return True
