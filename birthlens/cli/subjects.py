"""What the causal commands are asked about: a run at some steps, or a model from a directory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.streams import device_said
from birthlens.errors import BirthlensError
from birthlens.labels import shown

if TYPE_CHECKING:
    from birthlens.analysis.interventions.ablation import Models
    from birthlens.analysis.interventions.corruptions import Pair
    from birthlens.model.components import Sizes
    from birthlens.model.series import Series
    from birthlens.runs.run import Run
    from birthlens.tasks.batch import TokenBatch
    from birthlens.tasks.corpus import BigramStatistics
    from birthlens.tasks.prompts import Encode, Prompt

_FRESH = 2**40 + 1  # index of batches that neither training nor its evaluation ever drew


def sample_options(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add `--batch-size` and `--seed`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        size = click.option(
            "--batch-size", type=click.IntRange(min=1), default=default, show_default=True, help="Number of sequences."
        )
        seed = click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Seed of the data and of random draws.",
        )
        return size(seed(function))

    return decorate


def names(option: str, text: str) -> list[str]:
    """Read comma-separated names; raise BirthlensError if there are none."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise BirthlensError(f"--{option} = {text!r} names nothing; give one or more, separated by commas.")
    return found


@dataclass
class Subject:
    """A run at some steps, or a series of models from directories, as the tables want it.

    `opened` holds the model of the first step until it is asked for: its config is needed before, and it is read once.
    Models run on `device`, which `use` chooses.
    """

    path: str
    seed: int
    steps: list[int]
    run: Run | None = None
    series: Series | None = None
    cfg: Any = None
    opened: list[Any] = field(default_factory=list)
    device: str = "cpu"

    def use(self, device: str, sequences: TokenBatch, passes: int = 1) -> None:
        """Take the device of `--device`; `auto` counts the operations of so many passes over the sequences at each step."""
        operations = None
        if device == "auto":
            operations = 2 * self._parameters() * sequences.tokens.numel() * passes * len(self.steps)
        self.device = device_said(device, operations=operations)

    def _parameters(self) -> int:
        if self.run is None:
            return sum(parameter.numel() for parameter in self.opened[0].parameters())
        weights = self.run.weights(self.steps[0])
        return sum(weights[name].size for name in weights)

    @property
    def described(self) -> dict[str, object]:
        """The subject in a manifest."""
        if self.run is None:
            return {"model": str(Path(self.path).resolve())}
        return {"run": str(Path(self.path).resolve()), "config": self.run.config.to_data()}

    @property
    def sizes(self) -> Sizes:
        """The config that tells the model's layers and heads."""
        return self.run.config.model if self.run is not None else self.cfg

    @property
    def statistics(self) -> BigramStatistics | None:
        """The global bigrams, if they are known."""
        return None if self.run is None else self.run.statistics

    @property
    def triggers(self) -> list[int] | None:
        """The fixed triggers, if there are any."""
        ids = None if self.run is None else self.run.trigger_ids
        return None if ids is None else ids.tolist()

    def models(self, advance: Callable[[int, float], None] | None = None) -> Models:
        """Yield each checkpoint; `advance` is called when the caller has finished with one."""
        for step, model in self._of_series() if self.run is None else self.run.checkpoints(self.steps):
            yield step, model
            if advance is not None:
                advance(step, 1.0)

    def _of_series(self) -> Models:
        from birthlens.model.hooked import load_pretrained
        from birthlens.model.hooks import moved

        assert self.series is not None
        for step in self.steps:
            directory = self.series.directories[step]
            model = moved(self.opened.pop() if self.opened else load_pretrained(directory), self.device)
            for name in ("n_layers", "n_heads", "d_model", "d_vocab"):
                if getattr(model.cfg, name) != getattr(self.cfg, name):
                    raise BirthlensError(
                        f"{directory} (step {step}) has {name} = {getattr(model.cfg, name)}, step {self.steps[0]} has "
                        f"{getattr(self.cfg, name)}; the models of a series have one shape."
                    )
            yield step, model
            # The caller's loop still names this model while the next one is read; its weights are released before.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.new_empty(0)

    def batch(self, n: int, index: int) -> TokenBatch:
        """Draw sequences of the run's task, or repeated random tokens for a model from a directory."""
        if self.run is not None:
            return self.run.task.batch(n, self.seed, _FRESH + index)
        import numpy as np

        from birthlens.tasks.positions import repeated_tokens

        length = min(64, (int(self.cfg.n_ctx) + 1) // 2)
        return repeated_tokens(n, length, int(self.cfg.d_vocab), np.random.default_rng([self.seed, index]))

    def corruption(self, given: str | None, preferred: str) -> str:
        """Return the corruption that was given, or else the preferred one, or the first that the task defines."""
        assert self.run is not None
        defined = self.run.task.corruptions
        if given is None and not defined:
            raise BirthlensError(f"{self.path}: its task defines no corruption, so there is nothing to patch from.")
        return given if given is not None else preferred if preferred in defined else defined[0]

    def pair(self, corruption: str, n: int) -> Pair:
        """Draw a clean and a corrupted batch of the run's task."""
        import numpy as np

        from birthlens.analysis.interventions.corruptions import task_pair

        assert self.run is not None
        return task_pair(self.run.task, corruption, self.batch(n, 0), np.random.default_rng([self.seed, 11]))

    def prompts(self, file: str) -> list[Prompt]:
        """Read a file of prompts, whose text needs the tokenizer of the run or of the first model directory."""
        from birthlens.tasks.prompts import read_prompts

        encode, encode_answer = self._encoders()
        d_vocab = len(self.run.statistics) if self.run is not None else int(self.cfg.d_vocab)
        return read_prompts(file, encode, encode_answer, d_vocab, self.path)

    def encoded(self, text: str) -> list[int]:
        """Return the ids of a text."""
        encode, _ = self._encoders()
        if encode is None:
            raise BirthlensError(f"text = {shown(text, 40)}: {self.path} has no tokenizer; give ids by --prompts.")
        return encode(text)

    def _encoders(self) -> tuple[Encode, Encode] | tuple[None, None]:
        """Return two functions from text to ids, with special tokens at the start and without; None without a tokenizer."""
        if self.run is not None:
            from birthlens.tasks.tokenizing import encoded

            statistics = self.run.statistics
            return (lambda text: encoded(statistics, text),) * 2
        from birthlens.model.directory import load_tokenizer

        assert self.series is not None
        tokenizer = load_tokenizer(self.series.directories[self.steps[0]])
        if tokenizer is None:
            return None, None
        return tokenizer.encode, lambda text: tokenizer.encode(text, add_special_tokens=False)

    @contextmanager
    def progress(self) -> Iterator[Callable[[int, float], None]]:
        """Show a progress bar over steps and within the current one; nothing if the output is not a terminal."""
        import sys

        if not sys.stderr.isatty():
            yield lambda step, share: None
            return
        fine = 100
        with click.progressbar(length=fine * len(self.steps), label="steps", file=sys.stderr) as bar:
            done: dict[int, int] = {}

            def advance(step: int, share: float) -> None:
                bar.update(round(fine * share) - done.get(step, 0))
                done[step] = round(fine * share)

            yield advance

    def note(self, out: str | None, command: str, pair: Pair, interventions: object, **asked: Any) -> None:
        """Write OUT.manifest.json beside a table that is written: what was asked, on what, versions and seeds."""
        from birthlens.analysis.interventions.suite_results import manifest, write_manifest

        if out is not None:
            options: Mapping[str, Any] = {"steps": self.steps, "seed": self.seed, **asked}
            described = manifest(
                {command: options, "interventions": interventions},
                self.described,
                {"clean": pair.clean, "corrupted": pair.corrupted},
            )
            write_manifest(Path(f"{out}.manifest.json"), described)


def load(path: str, steps: str, seed: int) -> Subject:
    """Open a run, a model from a directory, or a series of models."""
    from birthlens.model.series import Series, series_at

    series = series_at(path)
    if series is None and not _holds_model(path):
        return load_run(path, steps, seed)
    if series is None:
        if steps not in ("last", "all"):
            raise BirthlensError(f"steps = {steps!r}: a model directory has one state only; leave --steps out.")
        series = Series(Path(path), {0: Path(path)})
    from birthlens.model.hooked import load_pretrained

    chosen = series.select(steps)
    model = load_pretrained(series.directories[chosen[0]])
    return Subject(path, seed, chosen, None, series, model.cfg, [model])


def load_run(path: str, steps: str, seed: int) -> Subject:
    """Open a run."""
    from birthlens.runs import run as runs

    if _holds_model(path):
        raise BirthlensError(
            f"run = {path!r} is a directory with a Hugging Face model; this command takes a run, whose task says what "
            "to corrupt. patch and edges take --prompts with corrupted versions instead."
        )
    run = runs.load_run(path)
    return Subject(path, seed, run.select(steps), run)


@contextmanager
def working_folder(out: str | None) -> Iterator[Path]:
    """Yield the directory of a suite's results: OUT.suite, or a temporary one."""
    if out is not None:
        yield Path(f"{out}.suite")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def holds_models(path: str) -> bool:
    """Return whether a path is a model directory or a series of them, rather than a run."""
    from birthlens.model.series import series_at

    return _holds_model(path) or series_at(path) is not None


def _holds_model(path: str) -> bool:
    return not (Path(path) / "run.json").exists() and (Path(path) / "config.json").exists()
