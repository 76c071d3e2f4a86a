"""`birthlens ablate`: suites of ablations over checkpoints, here or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.many_runs import cluster_options, opened_pool
from birthlens.cli.options import device_option, refuse_idle
from birthlens.cli.probing import steps_option
from birthlens.cli.prompting import on_prompts
from birthlens.cli.streams import tell
from birthlens.cli.subjects import Subject, load, names, sample_options, working_folder
from birthlens.cli.tables import check_counts, deliver, format_option, out_option
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import pandas as pd

    from birthlens.tasks.batch import TokenBatch


@dataclass(frozen=True)
class Asked:
    """A suite and its subject, as plain data that a worker of a cluster can be sent."""

    subject: str
    steps: str
    suite: dict[str, Any]
    batch_size: int
    prompts: str | None
    device: str


@click.command(
    epilog="Example: birthlens ablate runs/demo --heads all --methods zero,mean --steps every:5 --out ablation.csv"
)
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@click.option("--heads", default="all", show_default=True, help="all, pairs, or addresses: L0H0,L0H1+L1H0.")
@click.option(
    "--methods",
    default="zero,mean,resample",
    show_default=True,
    help="Comma-separated; also mean_position, mean_role, ...",
)
@click.option("--components", is_flag=True, help="Also ablate feed-forwards and the token and position inputs.")
@click.option("--metrics", help="role.quantity, comma-separated; the default covers accuracy, loss and KL by role.")
@click.option(
    "--suite", "suite_file", type=click.Path(), help="A YAML or JSON description instead of the options above."
)
@click.option(
    "--prompts", type=click.Path(), help="Sentences or ids of your own with answers, as YAML or JSON (docs/how_to.md)."
)
@steps_option("last")
@sample_options(256)
@device_option
@cluster_options
@out_option
@format_option
def ablate(
    subject: str,
    heads: str,
    methods: str,
    components: bool,
    metrics: str | None,
    suite_file: str | None,
    prompts: str | None,
    steps: str,
    batch_size: int,
    seed: int,
    device: str,
    scheduler: str | None,
    slurm: str | None,
    out: str | None,
    style: str,
) -> None:
    """Ablate heads (and more) of a RUN or of a Hugging Face model directory, at its checkpoints.

    One row per step, case (what is ablated, and by which method; 'none' is the whole model) and metric by role of the
    token: value, change from the whole model, 95 % bootstrap intervals of both, and n, the number of positions.
    docs/tables.md explains every column.

    With --out, results are also written to OUT.suite/ as they come, with a manifest. The same command continues an
    interrupted suite without repeating finished work. On a cluster each checkpoint is one task, and OUT must be in a folder
    that all machines share.
    """
    from birthlens.analysis.interventions.suite import Suite
    from birthlens.reading import read_mapping

    if suite_file is not None:
        refuse_idle("the suite's file says this", "heads", "methods", "components", "metrics", "seed")
        suite = Suite.from_data(read_mapping(suite_file, "suite"))
    else:
        data: dict[str, Any] = {"heads": heads, "methods": names("methods", methods), "components": components}
        data |= {"seed": seed} | ({} if metrics is None else {"metrics": names("metrics", metrics)})
        suite = Suite.from_data(data)
    if prompts is not None:
        refuse_idle("--prompts says which sequences", "batch_size")
    if (scheduler or slurm) and out is None:
        raise BirthlensError(
            "out = None: the workers of a cluster write into OUT.suite; give --out in a shared folder."
        )
    loaded = load(subject, steps, suite.seed)
    asked = Asked(subject, steps, suite.to_data(), batch_size, prompts, device)
    with working_folder(out) as folder:
        if scheduler or slurm:
            with opened_pool(scheduler, slurm, str(folder)) as pool:
                assert pool is not None
                table = _measured_by(pool, asked, loaded.steps, folder.absolute())
        else:
            with loaded.progress() as advance:
                table = _measured(loaded, asked, folder, advance)
    deliver(check_counts(table, "role"), out, style)


def _measured(
    loaded: Subject, asked: Asked, folder: Path, advance: Callable[[int, float], None] | None = None
) -> pd.DataFrame:
    """Run a suite over the steps of a subject."""
    from birthlens.analysis.interventions.suite import Suite, execute

    suite = Suite.from_data(asked.suite)
    described = loaded.described
    wrong = None
    if asked.prompts is None:
        batch = loaded.batch(asked.batch_size, 0)
        reference: TokenBatch | None = loaded.batch(asked.batch_size, 1)
    else:
        given = loaded.prompts(asked.prompts)
        suite, batch, reference, wrong = on_prompts(suite, given)
        described = {**described, "prompts": [vars(prompt) for prompt in given]}
    loaded.use(asked.device, batch, 1 + len(suite.cases_for(loaded.sizes)))
    return execute(
        suite,
        loaded.models(),
        batch.to(loaded.device),
        None if reference is None else reference.to(loaded.device),
        folder,
        described,
        loaded.statistics,
        progress=advance,
        initial=None if loaded.run is None else loaded.run.weights(loaded.run.steps[0]),
        alternatives=None if wrong is None else wrong.to(loaded.device),
    )


def measure_step(asked: Asked, folder: Path) -> str:
    """Run a suite at the one step that is asked for, as a task of a pool; return why it failed, or an empty text."""
    try:
        _measured(load(asked.subject, asked.steps, int(asked.suite["seed"])), asked, folder)
    except BirthlensError as error:
        return str(error)
    return ""


def _measured_by(pool: Executor, asked: Asked, steps: list[int], folder: Path) -> pd.DataFrame:
    """Run a suite with a task for each step, and return the table that the workers have written.

    Raises:
        BirthlensError: if steps have failed; the others are on disk.
    """
    from concurrent.futures import as_completed

    from birthlens.analysis.interventions.suite import read_results

    prompts = None if asked.prompts is None else str(Path(asked.prompts).absolute())
    asked = replace(asked, subject=str(Path(asked.subject).absolute()), prompts=prompts)
    several = len(steps) > 1 or asked.steps != "all"
    tasks = {
        pool.submit(measure_step, replace(asked, steps=str(step)) if several else asked, folder): step for step in steps
    }
    failed = []
    for number, task in enumerate(as_completed(tasks), start=1):
        step = tasks[task]
        try:
            why = task.result()
        except Exception as error:  # pools of other libraries have errors of their own
            why = f"{type(error).__name__}: {error}"
        if why:
            failed.append(f"step {step}: {why}")
        tell(f"{number:4} of {len(tasks)} checkpoints: step {step} {'failed' if why else 'measured'}", err=True)
    if failed:
        raise BirthlensError(f"{len(failed)} of {len(tasks)} checkpoints failed; the first: {failed[0]}")
    return read_results(folder, steps)
