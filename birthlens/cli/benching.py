"""`birthlens bench`: time birthlens against plain code on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.options import device_option, given, refuse_idle
from birthlens.cli.streams import device_said, tell
from birthlens.cli.tables import show
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = ("start", "sampling", "step64", "step512", "full", "probes", "checkpoint", "interventions", "memory", "accuracy",
         "suite", "monitor", "clamps", "scaling", "ensemble", "ensemble-scaling")  # fmt: skip
ON_A_DEVICE = ("ensemble", "ensemble-scaling")
"""The cases that --device chooses, and that run on the CPU otherwise."""
ASKED_FOR = ("clamps", "scaling", *ON_A_DEVICE)
"""The cases that run only if they are named."""
SLOW = ("step512", "memory", "accuracy", "suite")
"""The cases that --quick leaves out."""


@click.command(epilog="Example: birthlens bench --quick --out bench.json")
@click.option("--quick", is_flag=True, help="Fewer rounds, no batch of 512, no whole trainings: under a minute.")
@click.option("--only", type=click.Choice(CASES), multiple=True, help="Run these cases only; may be repeated.")
@device_option
@click.option("--out", type=click.Path(dir_okay=False), help="Write rows, machine and versions as JSON.")
@click.option(
    "--from", "files", type=click.Path(), multiple=True, help="Measure nothing: take the rows from such a file."
)
@click.option("--into", "pages", type=click.Path(), multiple=True, help="Write tables into a Markdown page's blocks.")
def bench(
    quick: bool, only: tuple[str, ...], device: str, out: str | None, files: tuple[str, ...], pages: tuple[str, ...]
) -> None:
    """Measure birthlens against plain PyTorch, plain TransformerLens and plain Python on this machine.

    Each case runs in its own process, in which variants take turns (A B A B ...); read the ratios, not the milliseconds.
    'spread' is half the distance between the quartiles as a share of the median; 'measured' is the share of the work that
    was timed where a slow baseline is scaled up. clamps, scaling, ensemble and ensemble-scaling run only if they are named.
    With --device, the last two run there: ensembles against the same runs one at a time, in microseconds ('us') of a
    sequence and step, with the sampler's share and the share of the device's own peak.
    To write tables into a page, use --from bench.json --into README.md.
    """
    from birthlens.bench import pages as writing
    from birthlens.system import write_atomically

    if files:
        refuse_idle("--from measures nothing", "quick", "only", "device")
    texts = {page: _text(page) for page in pages}
    if files:
        report = writing.read(files)
        for case in dict.fromkeys(row["case"] for row in report["rows"]):
            _show([row for row in report["rows"] if row["case"] == case])
    else:
        place = "cpu"
        if given("device"):
            if others := [case for case in only if case not in ON_A_DEVICE]:
                raise BirthlensError(
                    f"only = {others[0]!r}: it runs on the CPU; with --device, give {' or '.join(ON_A_DEVICE)}."
                )
            place = device_said(device)
            only = only or ON_A_DEVICE
        report = _measured(quick, only, place)
    if out is not None:
        write_atomically(Path(out), (json.dumps(report, indent=1) + "\n").encode())
        tell(f"written to {out}", err=True)
    for page, text in texts.items():
        write_atomically(Path(page), writing.filled(text, report, page).encode())
        tell(f"tables written into {page}", err=True)


def _measured(quick: bool, only: tuple[str, ...], device: str) -> dict[str, Any]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    from birthlens.runs.files import versions

    facts = {**versions(), **_machine(), **_card(device)}
    tell("  ".join(f"{name} {value}" for name, value in facts.items()), err=True)
    rows: list[dict[str, Any]] = []
    chosen = [
        case for case in CASES if case in only or (not only and case not in ASKED_FOR and not (quick and case in SLOW))
    ]
    # A process of its own for each case: what an earlier one leaves behind in the allocator changes plain torch twofold.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["birthlens.model.hooked", "birthlens.bench.cases"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for case in chosen:
            try:
                found = pool.submit(_run, case, quick, device).result()
            except BrokenProcessPool:
                raise BirthlensError(
                    f"case {case!r} was killed, perhaps because memory ran out; try the others."
                ) from None
            rows += found
            _show(found)
    return {"machine": facts, "quick": quick, "rows": rows}


def _run(case: str, quick: bool, device: str) -> list[dict[str, Any]]:
    return _cases(quick, device)[case]()


def _card(device: str) -> dict[str, str]:
    """Name the GPU that is measured."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(device)}


def _show(rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    for case, table in pd.DataFrame(rows).groupby("case", sort=False):
        show(table.drop(columns="case").dropna(axis=1, how="all"), title=str(case))
        tell()


def _text(page: str) -> str:
    try:
        return Path(page).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BirthlensError(f"into = {page!r} cannot be read ({error}).") from None


def _cases(quick: bool, device: str) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    from birthlens.bench import cases, ensembles, whole_runs
    from birthlens.bench.scaling import scaling
    from birthlens.config.presets import preset
    from birthlens.config.run import RunConfig

    few = 3 if quick else 9
    small = "evaluation.batch_size=1"  # the trainers of a benchmark evaluate nothing
    paper = preset("paper", [small])
    paper64 = preset("paper", [small, "training.batch_size=64"])
    return {
        "start": lambda: cases.start_up(paper, few),
        "sampling": lambda: cases.sampling(paper, few),
        "step64": lambda: cases.training_step(paper64, few),
        "step512": lambda: cases.training_step(paper, 5),
        "full": lambda: cases.full_model_step(preset("paper-full", [small]), few),
        "probes": lambda: cases.weight_probes(paper, 200, 1 if quick else 5),
        "checkpoint": lambda: cases.checkpointing(RunConfig.parse({}, [small]), 3 if quick else 20),
        "interventions": lambda: cases.interventions(paper, 256, 2 if quick else 5),
        "memory": lambda: whole_runs.memory(["corpus.source=embedded", "training.batch_size=512"], "batch 512", 3),
        "accuracy": lambda: [
            *whole_runs.training(preset("paper"), "paper", goal=0.9),
            *whole_runs.training(preset("demo"), "demo"),
        ],
        "monitor": lambda: [
            *cases.monitoring(preset("paper-full", [small]), few),
            *cases.monitoring(preset("paper-full", [small, "training.batch_size=8"]), few),
        ],
        "clamps": lambda: cases.clamped_step(paper64, few),
        "suite": lambda: whole_runs.ablation_suite(paper, 100, 256),
        "scaling": lambda: scaling(few),
        "ensemble": lambda: ensembles.compared(device, ensembles.kind_of(device, quick), few),
        "ensemble-scaling": lambda: ensembles.scaled(device, ensembles.kind_of(device, quick), few),
    }


def _machine() -> dict[str, object]:
    import platform

    import scipy.linalg.cython_blas  # noqa: F401  scipy's BLAS is what the compiled step multiplies with
    from threadpoolctl import threadpool_info

    from birthlens.bench.scaling import matmul_peak
    from birthlens.system import cores

    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    kernels = {library["architecture"] for library in threadpool_info() if library.get("internal_api") == "openblas"}
    return {
        "processor": model,
        "cores": cores(),
        "sgemm_gflops": round(matmul_peak() / 1e9),
        "openblas": "/".join(sorted(kernels)) or "none",
    }
