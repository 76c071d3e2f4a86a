"""`birthlens train`, and the progress of a training on the screen."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from birthlens.cli.options import given, how_options, refuse_idle
from birthlens.cli.streams import device_said, tell
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    from birthlens.config.run import RunConfig
    from birthlens.training.loop import StepRecord


@click.command(epilog="Example: birthlens train runs/clean --preset laptop task.cycles=clean training.steps=400")
@click.argument("out", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--preset", "preset_name", help="demo, laptop, paper or paper-full.")
@click.option("--config", "config_file", type=click.Path(), help="A YAML or JSON file with a config.")
@click.option("--corpus", "corpus_file", type=click.Path(), help="A UTF-8 text, or counts as .json or .csv.")
@click.option("--resume", "resuming", is_flag=True, help="Continue the run in OUT from its last checkpoint.")
@click.option(
    "--log",
    "logger",
    type=click.Choice(["tensorboard", "wandb"]),
    help="Also log to this service (needs the extra of the same name).",
)
@click.option("--show-config", is_flag=True, help="Print the config as YAML and train nothing.")
@how_options
def train(
    out: str,
    overrides: tuple[str, ...],
    preset_name: str | None,
    config_file: str | None,
    corpus_file: str | None,
    resuming: bool,
    logger: str | None,
    show_config: bool,
    device: str,
    precision: str,
    sampler: str,
) -> None:
    """Train a model into the new directory OUT, with checkpoints.

    Without --preset or --config, the defaults are used, which are the paper's settings. --show-config lists all keys.
    With --resume, training.steps=N makes a run longer, even a finished one.
    """
    if resuming:
        refuse_idle("run.json in OUT holds the config of a run", "show_config")
        refuse_idle("--resume takes its config from the run", "preset_name", "config_file", "corpus_file")
        from birthlens.training.recording import resume

        refuse_idle("--resume keeps the precision and the sampler of the run", "precision", "sampler")
        place = chosen_device(device, None) if given("device") else None
        follow(resume(out, _more_steps(overrides), place), out, logger)
        return
    config = _config(preset_name, config_file, corpus_file, overrides)
    if show_config:
        refuse_idle("--show-config trains nothing", "logger", "device", "precision", "sampler")
        from birthlens.config.comments import commented

        tell(commented(config), nl=False)
        return
    from birthlens.devices import Execution
    from birthlens.training.recording import train_to_disk

    how = Execution(chosen_device(device, [config]), precision, sampler)
    follow(train_to_disk(config, out, how), out, logger)


def chosen_device(text: str, configs: Sequence[RunConfig] | None) -> str:
    """Return the device of `--device` for training."""
    from birthlens.training.footprint import trained_tokens

    return device_said(text, None if configs is None else trained_tokens(configs))


def _more_steps(overrides: tuple[str, ...]) -> int | None:
    """Read training.steps=N, all that may be set when a run is continued."""
    if not overrides:
        return None
    key, _, value = overrides[-1].partition("=")
    if len(overrides) > 1 or key != "training.steps" or not (value.isascii() and value.isdigit() and len(value) < 10):
        raise BirthlensError(
            f"{' '.join(overrides)}: a run is continued under its own config; only training.steps=N may be given, to go on "
            "longer. `birthlens fork` starts a run with other settings from a step of this one."
        )
    return int(value)


def _config(
    preset_name: str | None, config_file: str | None, corpus_file: str | None, overrides: tuple[str, ...]
) -> RunConfig:
    from birthlens.config.presets import preset
    from birthlens.config.run import RunConfig
    from birthlens.reading import read_mapping

    if preset_name and config_file:
        raise BirthlensError(f"--preset {preset_name} and --config {config_file} cannot be used together; give one.")
    tree = read_mapping(config_file, "config") if config_file else {}
    if preset_name:
        tree = preset(preset_name).to_data()
    if corpus_file:
        if twice := [override for override in overrides if override.startswith(("corpus.path=", "corpus.source="))]:
            raise BirthlensError(
                f"{twice[0]}: --corpus {corpus_file} says where the text is; leave one of the two out."
            )
        source = "counts" if Path(corpus_file).suffix in (".json", ".csv") else "text"
        tree["corpus"] = {"source": source, "path": str(Path(corpus_file).resolve())}
    return RunConfig.parse(tree, overrides)


def follow(records: Iterable[StepRecord], out: str, logger: str | None = None) -> bool:
    """Run the training to its end, with a progress bar on a terminal; return whether any step was trained."""
    from birthlens.training.loggers import log_to

    log = log_to(logger, Path(out)) if logger else None
    last = None
    accuracy = None
    losses: dict[str, float] = {}
    skipped = 0
    with _Bar(sys.stderr.isatty()) as bar, _log_on_stderr():
        for record in records:
            last = record
            skipped += record.step > 0 and record.loss is None
            for row in record.metrics:
                if row["split"] == "held_out" and row["metric"].endswith("_loss"):
                    losses[row["metric"].removesuffix("_loss")] = row["value"]
                if row["metric"] == "in_context_accuracy":
                    accuracy = row["value"]
            bar.update(record, accuracy)
            if log is not None:
                log(record)
    if last is None:
        tell(f"{out}: already finished, nothing to train", err=True)
        return False
    reached = "" if accuracy is None else f", in-context accuracy {accuracy:.3f}"
    tell(f"{out}: {last.step} steps{reached}", err=True)
    uniform = math.log(last.weights["W_E"].shape[0])
    worse = ", ".join(f"{role} {loss:.4g}" for role, loss in losses.items() if loss > uniform)
    if worse:
        tell(
            f"{out}: note: the held-out loss is above that of uniform guessing ({uniform:.3f} nats) on positions of these "
            f"roles: {worse}",
            err=True,
        )
    if skipped:
        tell(
            f"{out}: {skipped} of {last.step} updates were skipped because their batches held no in-context target; "
            "use a larger training.batch_size or task.context, or a smaller task.offset",
            err=True,
        )
    return True


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Show what the package logs, one line for each message."""
    import logging

    log = logging.getLogger("birthlens")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("birthlens: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _Bar:
    """A progress bar with loss, accuracy and remaining time; shown on a terminal only."""

    def __init__(self, visible: bool) -> None:
        self.visible = visible

    def __enter__(self) -> _Bar:
        if self.visible:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  in-context accuracy {task.fields[accuracy]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=None, loss="-", accuracy="-")
        return self

    def update(self, record: StepRecord, accuracy: float | None) -> None:
        if self.visible:
            self._progress.update(
                self._task,
                total=record.trainer.config.training.steps,
                completed=record.step,
                loss="-" if record.loss is None else f"{record.loss:.3f}",
                accuracy="-" if accuracy is None else f"{accuracy:.3f}",
            )

    def __exit__(self, *_: object) -> None:
        if self.visible:
            self._progress.stop()
