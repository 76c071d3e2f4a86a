"""`birthlens reproduce` and `birthlens sweep`: commands that train many runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.options import how_options, refuse_idle
from birthlens.cli.streams import tell
from birthlens.cli.tables import format_option, show, show_rows, write
from birthlens.cli.training import chosen_device
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from birthlens.claims.scorecard import Scorecard
    from birthlens.config.run import RunConfig
    from birthlens.training.sweep import Outcome


processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Number of processes; by default one per core, each with one thread.",
)


def cluster_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--scheduler` and `--slurm`."""
    scheduler = click.option(
        "--scheduler", help="Address of a Dask scheduler whose workers do the training (extra: cluster)."
    )
    slurm = click.option(
        "--slurm",
        type=click.Path(),
        help="A YAML file with parameters for submitit, whose jobs do the training (extra: slurm).",
    )
    return scheduler(slurm(function))


@dataclass(frozen=True)
class Means:
    """How runs are trained: what the options of `training_options` say."""

    processes: int | None
    device: str
    precision: str
    sampler: str
    scheduler: str | None
    slurm: str | None
    bundle: int | None


def training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `Means`, which the function gets as `means`."""

    @wraps(function)
    def gathered(*args: Any, **options: Any) -> Any:
        means = Means(**{field.name: options.pop(field.name) for field in fields(Means)})
        return function(*args, means=means, **options)

    bundle = click.option(
        "--bundle",
        type=click.IntRange(min=1),
        help="Runs in each task of a cluster. [default: 1; 64 if trained together]",
    )
    return processes_option(how_options(cluster_options(bundle(gathered))))


@click.command(epilog="Example: birthlens reproduce order-fixed two-layers --tier laptop")
@click.argument("claims", nargs=-1, metavar="[CLAIM|all]...")
@click.option("--tier", default="laptop", show_default=True, help="laptop (minutes) or paper (hours).")
@click.option(
    "--paper",
    default="birth",
    show_default=True,
    help="The paper whose claims to check if no CLAIM is given: birth, noise, sinks, markov, facts, associative, or all.",
)
@click.option(
    "--out",
    default="runs/reproduce",
    show_default=True,
    type=click.Path(),
    help="The folder of runs, measurements and scorecard.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds, instead of the tier's.")
@click.option("--list", "listing", is_flag=True, help="List the claims and run nothing.")
@processes_option
@cluster_options
@format_option
def reproduce(
    claims: tuple[str, ...],
    tier: str,
    paper: str,
    out: str,
    seeds: int | None,
    listing: bool,
    processes: int | None,
    scheduler: str | None,
    slurm: str | None,
    style: str,
) -> None:
    """Check CLAIMs, by default all of one paper: train the missing runs, measure, and judge.

    Writes scorecard.csv, scorecard.json and scorecard.html into --out. Results of other claims stay there if the same
    code made them. The same command continues an interrupted reproduction. Results of another config, text or code are
    not reused. A claim that fails is a result (exit status 0); a run or a statistic that could not be computed is a
    failure (exit status 1).
    """
    from birthlens.claims.catalogue import claims_named
    from birthlens.claims.tiers import tier_named

    if claims and "all" not in claims:
        refuse_idle("the claims are named", "paper")
    if listing:
        refuse_idle("--list runs nothing", "tier", "out", "seeds", "processes", "scheduler", "slurm", "style")
    if scheduler or slurm:
        refuse_idle("the workers of a cluster train", "processes")
    chosen = claims_named(claims, paper)
    scale = tier_named(tier)
    if listing:
        show_rows(["paper", "claim", "sentence"], [[claim.paper, claim.id, claim.sentence] for claim in chosen])
        return
    from birthlens.claims.reproduction import reproduce
    from birthlens.claims.scorecard import Result, scorecard_table
    from birthlens.viz.report.scorecard import write_scorecard_page

    page = Path(out) / "scorecard.html"
    results = list[Result]()

    def draw(card: Scorecard) -> None:
        write_scorecard_page(page, card)

    with continued_by_repeating(f"; what was judged so far is in {page}"), opened_pool(scheduler, slurm, out) as pool:
        for number, event in enumerate(reproduce(chosen, scale, out, processes, seeds, draw, pool), start=1):
            if isinstance(event, Result):
                results.append(event)
                anew = sum(bool(one.again) for one in event.measured)
                why = f" ({anew} of {len(event.measured)} seeds {event.again})" if anew else ""
                tell(f"{event.verdict:12} {event.claim.id}{why}", err=True)
            else:
                say_outcome(event, number)
    results.sort(key=lambda result: [claim.id for claim in chosen].index(result.claim.id))
    table = scorecard_table(results)
    short = ["verdict", "claim", "quantity", "wanted", "holds", "value", "low", "high", "seeds", "cpu_seconds"]
    show(table if style != "table" else table[short].fillna(""), style)
    tell(f"written to {page} and, as a table, scorecard.csv", err=True)
    problems = [f"{result.claim.id}: {problem}" for result in results for problem in result.problems]
    for problem in problems:
        tell(f"birthlens: {problem}", err=True)
    if problems:
        sys.exit(1)


@click.command(epilog="Example: birthlens sweep grid.yaml --out runs/grid")
@click.argument("grid", type=click.Path())
@click.option("--out", default="runs/sweep", show_default=True, type=click.Path(), help="The folder of the runs.")
@click.option("--seeds", type=click.IntRange(min=1), help="Number of seeds, instead of the file's.")
@training_options
@format_option
def sweep(grid: str, out: str, seeds: int | None, means: Means, style: str) -> None:
    """Train every case and seed of GRID, a YAML or JSON file, and list where each run is.

    Keys of the file: preset, overrides, cases (name -> overrides), axes (section.key -> values), seeds. Finished runs of
    the same config are reused, and unfinished ones are continued. On a GPU, runs of the same shape are trained together.
    The table, which is also written to sweep.csv in --out, has the settings in which the runs differ, their results, and
    their cost; `birthlens plot` draws it.
    """
    from birthlens.analysis.behaviour.sweep_results import sweep_results_table
    from birthlens.training.grid import Grid
    from birthlens.training.sweep import run_path

    configs = Grid.load(grid, seeds).configs()
    every = list(configs.values())
    found = {}
    with continued_by_repeating(), how_to_train(every, out, means) as train:
        for number, outcome in enumerate(train(every), start=1):
            found[outcome.path] = outcome
            say_outcome(outcome, number)
    table = sweep_results_table({key: (config, found[run_path(config, out)]) for key, config in configs.items()})
    write(table, str(Path(out) / "sweep.csv"))
    show(table, style)
    if failed := [outcome.message for outcome in found.values() if outcome.state == "failed"]:
        raise BirthlensError(f"{len(failed)} of {len(found)} runs failed; the first: {failed[0]}")


@contextmanager
def how_to_train(
    configs: Sequence[RunConfig], out: str, means: Means
) -> Iterator[Callable[[Sequence[RunConfig]], Iterator[Outcome]]]:
    """Return the function that trains runs as the options say.

    Raises:
        BirthlensError: for options that do nothing together.
    """
    from birthlens.devices import Execution, check_text
    from birthlens.training.sweep import sweep

    if means.scheduler or means.slurm:
        refuse_idle("the workers of a cluster train", "processes")
        check_text(means.device)
        device = means.device
    else:
        refuse_idle("it needs --scheduler or --slurm", "bundle")
        device = chosen_device(means.device, list(configs))
    execution = Execution(device, means.precision, means.sampler)
    with opened_pool(means.scheduler, means.slurm, out) as pool:
        yield lambda wanted: sweep(wanted, out, means.processes, execution, pool, means.bundle)


@contextmanager
def opened_pool(scheduler: str | None, slurm: str | None, out: str) -> Iterator[Executor | None]:
    """Open the pool of `--scheduler` or `--slurm`; None if neither is given."""
    from birthlens.training.pools import dask_pool, slurm_pool

    if scheduler and slurm:
        raise BirthlensError(f"--scheduler {scheduler} and --slurm {slurm} cannot be used together; give one.")
    if scheduler:
        with dask_pool(scheduler) as (pool, dashboard):
            tell(f"birthlens: the dashboard of {scheduler} is at {dashboard}", err=True)
            yield pool
    elif slurm:
        with slurm_pool(slurm, Path(out) / ".jobs") as pool:
            yield pool
    else:
        yield None


@contextmanager
def continued_by_repeating(more: str = "") -> Iterator[None]:
    """Print how to continue when the command is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        tell(f"birthlens: interrupted; run the same command again to continue{more}.", err=True)
        sys.exit(130)


def say_outcome(outcome: Outcome, number: int) -> None:
    """Print on the error stream what happened to a run."""
    what = outcome.message
    if outcome.state != "failed":
        what = f"{outcome.path} ({outcome.cpu_seconds:.1f} s of CPU time){what and ' ' + what}"
    tell(f"{number:4} {outcome.state:9} {what}", err=True)
