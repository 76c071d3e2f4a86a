"""`birthlens demo`: train a run on the embedded text, probe it and write a report, in one command."""

from __future__ import annotations

from pathlib import Path

import click

from birthlens.cli.probing import overview, probed
from birthlens.cli.streams import tell
from birthlens.cli.tables import write
from birthlens.cli.training import follow


@click.command(epilog="Example: birthlens demo runs/demo")
@click.argument("out", type=click.Path(), default="runs/demo")
def demo(out: str) -> None:
    """Train the demo run into OUT, probe it, show when each memory was learned, and write a report.

    A finished demo run in OUT is reused, with its report; an interrupted run is continued.
    """
    from birthlens.config.presets import preset
    from birthlens.runs.run import load_run
    from birthlens.training.recording import check_resumable, resume, train_to_disk

    config = preset("demo")
    if (Path(out) / "run.json").exists():
        check_resumable(config, out)
        records = resume(out)
    else:
        records = train_to_disk(config, out)
    trained = follow(records, out)

    run = load_run(out)
    page = Path(out) / "report.html"
    probes = Path(out) / "memories.csv"
    table = probed(run, run.steps, "memories")
    overview(table[table["step"].isin(run.steps[:: max(1, len(run.steps) // 10)])])
    metrics = run.metrics()
    accuracy = metrics[(metrics["split"] == "held_out") & (metrics["metric"] == "in_context_accuracy")]
    reached = accuracy[accuracy["value"] > 0.9]["step"]
    tell(f"\nin-context accuracy {accuracy['value'].iloc[-1]:.3f} at step {accuracy['step'].iloc[-1]}", nl=False)
    tell(f", above 0.9 from step {reached.iloc[0]}" if len(reached) else "")
    write(table, str(probes))
    if trained or not page.exists():
        from birthlens.viz.report import write_report

        write_report([run], page)
    tell(f"run     {out}  (docs/format.md describes the files)")
    tell(f"probes  {probes}  ({len(table)} rows: every memory at every kept step)")
    tell(f"report  {page}  (open it in a browser)")
