"""`birthlens bench`: this machine, this build, against plain code, interleaved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.tables import show

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = ("start", "sampling", "step64", "step512", "full", "probes", "checkpoint", "interventions", "scaling")


@click.command(epilog="Example: birthlens bench --quick --out bench.json")
@click.option("--quick", is_flag=True, help="Fewer rounds and no batch of 512: under a minute.")
@click.option("--only", type=click.Choice(CASES), multiple=True, help="Run these cases only; may be repeated.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write rows, machine and versions as JSON.")
def bench(quick: bool, only: tuple[str, ...], out: str | None) -> None:
    """Measure birthlens against plain PyTorch, plain TransformerLens and plain Python on this machine.

    Variants take turns (A B A B ...); read the ratios, not the milliseconds. 'spread' is half the distance between the
    quartiles as a share of the median. The scaling table runs only when asked for (--only scaling).
    """
    import pandas as pd

    from birthlens.run_files import versions

    facts = {**versions(), **_machine()}
    click.echo("  ".join(f"{name} {value}" for name, value in facts.items()), err=True)
    rows: list[dict[str, Any]] = []
    for name, run in _cases(quick).items():
        if (only and name not in only) or (not only and name == "scaling"):
            continue
        found = run()
        rows += found
        table = pd.DataFrame(found)
        show(table.drop(columns=["case"]) if "case" in table else table, title=found[0].get("case", name))
        click.echo()
    if out is not None:
        from birthlens.disk import write_atomically

        report = {"machine": facts, "quick": quick, "rows": rows}
        write_atomically(Path(out), (json.dumps(report, indent=1) + "\n").encode())
        click.echo(f"written to {out}", err=True)


def _cases(quick: bool) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    from birthlens.bench import cases
    from birthlens.bench.scaling import scaling

    few = 3 if quick else 9
    found: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "start": lambda: cases.start_up(few),
        "sampling": lambda: cases.sampling(512, few),
        "step64": lambda: cases.training_step(64, few),
        "step512": lambda: cases.training_step(512, 5),
        "full": lambda: cases.full_model_step(64, few),
        "probes": lambda: cases.weight_probes(200, 2 if quick else 5),
        "checkpoint": lambda: cases.checkpointing(20),
        "interventions": lambda: cases.interventions(2 if quick else 5),
        "scaling": lambda: scaling(few),
    }
    if quick:
        found = {name: case for name, case in found.items() if name != "step512"}
    return found


def _machine() -> dict[str, object]:
    import os
    import platform

    from birthlens.bench.scaling import matmul_peak

    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": model, "cores": cores, "sgemm_gflops": round(matmul_peak() / 1e9)}
