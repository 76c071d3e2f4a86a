"""What the experiments share: options, the grid of a script, a table of results, a printed summary.

A script NAME.py has its grid in configs/NAME.yaml (overrides of the tier's base; cases; axes; seeds). It writes
results/NAME.csv, and NAME.json with its provenance: command, grid, seeds, code, versions, date. Runs are shared with
`birthlens reproduce`: a matching run on disk is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from birthlens.claims.claim import Statistic
from birthlens.claims.grids import grid_table, over_seeds_table
from birthlens.claims.tiers import TIERS
from birthlens.config.differences import overrides
from birthlens.config.run import RunConfig
from birthlens.reading import read_mapping
from birthlens.runs.files import commit, versions
from birthlens.runs.provenance import code_digest
from birthlens.training.grid import Grid
from birthlens.training.workers import workers

HERE = Path(__file__).parent


def options(script: str, doc: str | None, tiers: bool = True, **numbers: int) -> argparse.Namespace:
    """Parse the options that all experiments have; `tiers` adds the option of tiers, `numbers` adds further ones."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if tiers:
        parser.add_argument("--tier", choices=sorted(TIERS), default="laptop")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the experiment's own")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce/runs"))
    parser.add_argument("--processes", type=int, help="number of processes (default: one for each core)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{Path(script).stem}.csv")
    parser.set_defaults(script=Path(script).name, grid=None)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after them
    return arguments


def grid_of(script: str, arguments: argparse.Namespace) -> Grid:
    """Read the grid of a script, with the tier's config as base."""
    tree = read_mapping(HERE / "configs" / f"{Path(script).stem}.yaml", "sweep")
    tree["overrides"] = [*TIERS[arguments.tier].base, *tree.get("overrides", [])]
    arguments.grid = Grid.parse(tree, arguments.seeds)
    return arguments.grid


def ask(
    script: str, doc: str | None, statistic: Statistic, **settings: object
) -> tuple[argparse.Namespace, pd.DataFrame]:
    """Train, measure, write and print; return the options and the table (case, seed, quantity, value)."""
    arguments = options(script, doc)
    table = grid_table(grid_of(script, arguments), statistic, arguments.runs, settings, arguments.processes)
    tell(arguments, table)
    return arguments, table


def follow(
    script: str, doc: str | None, cases: Mapping[str, Sequence[str]], statistic: Statistic, **settings: object
) -> tuple[argparse.Namespace, pd.DataFrame]:
    """Train the cases of a claim (overrides of the laptop tier's base), and go on as `ask`; a claim has five seeds."""
    arguments = options(script, doc, tiers=False)
    tier = TIERS["laptop"]
    arguments.grid = Grid(tier.config, cases, range(arguments.seeds or tier.seeds))
    table = grid_table(arguments.grid, statistic, arguments.runs, settings, arguments.processes)
    tell(arguments, table)
    return arguments, table


def curve(table: pd.DataFrame, case: str, name: str) -> pd.Series:
    """Return the means over seeds of the quantities "NAME, step N" of a case, by step."""
    rows = table[(table["case"] == case) & table["quantity"].str.startswith(f"{name}, step ")]
    steps = rows["quantity"].str.extract(r"step (\d+)$")[0].astype(int)
    return rows.groupby(steps)["value"].mean()


def joined(
    function: Callable[..., pd.DataFrame], jobs: Iterable[tuple[object, ...]], processes: int | None
) -> pd.DataFrame:
    """Call a function of a script on every tuple of arguments, on all cores, and stack the tables that it returns."""
    with workers(processes) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        return pd.concat([future.result() for future in futures], ignore_index=True)


def tell(arguments: argparse.Namespace, table: pd.DataFrame, **parts: pd.DataFrame) -> None:
    """Write tables (`keep`) and print their means over seeds with 95 % intervals."""
    keep(arguments, table, None, **parts)
    for each in (table, *parts.values()):
        summary = over_seeds_table(each)
        summary["shown"] = [f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]" for row in summary.itertuples()]
        wide = summary.pivot(index="quantity", columns="case", values="shown")
        print(wide.loc[summary["quantity"].unique(), summary["case"].unique()].to_string())


def keep(
    arguments: argparse.Namespace, table: pd.DataFrame | None, grid: Grid | None = None, **parts: pd.DataFrame
) -> None:
    """Write a table as rounded CSV, its parts as NAME_part.csv, and their provenance as JSON."""
    out, grid = arguments.out, grid or arguments.grid
    named = {out.with_stem(f"{out.stem}_{part}"): found for part, found in parts.items()}
    for path, found in (named if table is None else {out: table, **named}).items():
        found.round(4).to_csv(path, index=False)
    drawn = [] if grid is None else list(grid.seeds or ())
    seeds = drawn if table is None or "seed" not in table else sorted(map(int, set(table["seed"])))
    out.with_suffix(".json").write_text(json.dumps(made_by(arguments, seeds, grid), indent=1) + "\n", encoding="utf-8")


def _without_places(words: Sequence[str]) -> list[str]:
    """Drop the options for places of files and the number of processes, because the results do not depend on them."""
    kept: list[str] = []
    skip = False
    for word in words:
        placed = word.partition("=")[0] in ("--runs", "--out", "--processes")
        if not (placed or skip):
            kept.append(word)
        skip = placed and "=" not in word
    return kept


def made_by(arguments: argparse.Namespace, seeds: Sequence[int], grid: Grid | None) -> dict[str, object]:
    """Return a table's provenance: the command, the grid as overrides of the default config, seeds, code, versions, date."""
    said = _without_places(sys.argv[1:])
    made: dict[str, object] = {"command": shlex.join(["python", f"analyses/{arguments.script}", *said])}
    if grid is not None:
        cases = {case: list(words) for case, words in grid.cases.items()}
        made["grid"] = {"base": overrides(RunConfig(), grid.base), "cases": cases}
    made["seeds"] = list(seeds)
    made["code"] = code_digest("__main__")
    return {**made, "versions": versions(), "commit": commit(), "date": datetime.now(UTC).date().isoformat()}
