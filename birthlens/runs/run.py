"""A run opened for reading: its config, its task, its metrics, and the weights at any kept step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from birthlens.config.model import parameter_shapes
from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights, load_tensors
from birthlens.runs.files import checkpoint_file, kept_steps, read_header, read_metrics, read_tables
from birthlens.tasks.corpus import BigramStatistics

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens import HookedTransformer

    from birthlens.tasks.task import Task

Array = np.ndarray


class Run:
    """Read a run: its config, its task, its metrics and the weights at any kept step.

    Raises:
        BirthlensError: where the directory holds no run, a newer or damaged one, or lacks a step; the file is named.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        try:
            self.config = RunConfig.parse(self.header["config"])
        except BirthlensError as error:
            raise BirthlensError(f"{self.path / 'run.json'} holds a config that cannot be read: {error}") from None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self.steps)} checkpoints, last step {self.steps[-1]})"

    @property
    def steps(self) -> list[int]:
        """Steps whose weights are kept, ascending; read from the directory each time, so a live run grows."""
        return kept_steps(self.path)

    @property
    def finished(self) -> bool:
        """Whether training reached its last step."""
        return self.steps[-1] >= self.config.training.steps

    @cached_property
    def _tables(self) -> dict[str, Array]:
        return read_tables(self.path, len(self.header["vocab"]))

    @cached_property
    def statistics(self) -> BigramStatistics:
        """The global chain that the run was trained on."""
        return BigramStatistics(tuple(self.header["vocab"]), self._tables["unigram"], self._tables["bigram"])

    @property
    def trigger_ids(self) -> Array | None:
        """Ids of the fixed triggers, or None where each sequence draws its own."""
        return self._tables.get("triggers")

    @property
    def triggers(self) -> list[int] | None:
        """The same as a list of numbers."""
        return None if self.trigger_ids is None else self.trigger_ids.tolist()

    @cached_property
    def task(self) -> Task:
        """The task, ready to sample batches."""
        from birthlens.tasks.kinds import task_of

        return task_of(self.config.task, self.statistics)

    @cached_property
    def constants(self) -> dict[str, Array]:
        """Parameters that training never moves."""
        return self._load(self.path / "constants.safetensors")

    def checkpoint(self, step: int) -> dict[str, Array]:
        """Return the trained parameters at a kept step."""
        file = checkpoint_file(self.path, step)
        if not file.exists():
            raise BirthlensError(f"step = {step} is not kept in {self.path}; kept steps are {_listing(self.steps)}.")
        tensors = self._load(file)
        if missing := [name for name in self._trained if name not in tensors]:
            raise BirthlensError(f"{file} lacks {', '.join(missing)}; the run is damaged.")
        return tensors

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config.model, len(self.header["vocab"]), self.config.task.context)

    @cached_property
    def _trained(self) -> tuple[str, ...]:
        return self.config.trained

    def _load(self, file: Path) -> dict[str, Array]:
        tensors = load_tensors(file)
        for name, tensor in tensors.items():
            if name in self._shapes and tensor.shape != self._shapes[name]:
                raise BirthlensError(
                    f"{file} has {name} of shape {tensor.shape}, not {self._shapes[name]}; the run is damaged, train again."
                )
        return tensors

    def weights(self, step: int) -> Weights:
        """Return all weights at a kept step; a negative step counts from the end (-1 is the last)."""
        if step < 0:
            step = self.select(str(step))[0]
        tensors = self.constants | self.checkpoint(step)
        missing = [name for name in self._shapes if name not in tensors]
        if missing:
            raise BirthlensError(f"{checkpoint_file(self.path, step)} lacks {', '.join(missing)}; the run is damaged.")
        return Weights(self.config.model, tensors)

    def checkpoints(self, steps: Iterable[int] | None = None) -> Iterator[tuple[int, Weights]]:
        """Yield (step, weights) lazily, for the given steps or for all."""
        for step in self.steps if steps is None else steps:
            yield step, self.weights(step)

    def stacked(self, names: Iterable[str], steps: Iterable[int] | None = None) -> dict[str, Array]:
        """Return parameters as arrays with a leading step axis; constants are repeated without a copy."""
        steps, names = list(self.steps if steps is None else steps), list(names)
        moving = [self.checkpoint(step) for step in steps]
        out: dict[str, Array] = {}
        for name in names:
            if name in self.constants:
                constant = self.constants[name]
                out[name] = np.broadcast_to(constant, (len(steps), *constant.shape))
            elif moving and name in moving[0]:
                out[name] = np.stack([tensors[name] for tensors in moving])
            else:
                valid = ", ".join(self._shapes)
                raise BirthlensError(f"{name!r} is no parameter of this run; valid names are {valid}.")
        return out

    def model(self, step: int = -1) -> HookedTransformer:
        """Return the HookedTransformer at a kept step, ready for hooks."""
        from birthlens.model.hooked import build

        return build(self.weights(step), n_ctx=self.config.task.context)

    def metrics(self) -> pd.DataFrame:
        """Return what training measured: columns step, split ('train' or 'held_out'), metric, value, n."""
        import pandas as pd

        return pd.DataFrame(read_metrics(self.path), columns=["step", "split", "metric", "value", "n"])

    def select(self, text: str) -> list[int]:
        """Read a choice of kept steps: 'all', 'last', 'every:N' (of the kept ones), or a list such as '0,100,-1'."""
        steps = self.steps
        if text == "all":
            return steps
        if text == "last":
            return steps[-1:]
        try:
            if text.startswith("every:"):
                if (every := int(text.removeprefix("every:"))) < 1:
                    raise BirthlensError(f"steps = {text!r}: take every N-th kept step with N at least 1.")
                return steps[::every]
            wanted = [int(part) for part in text.split(",")]
            chosen = list(dict.fromkeys(steps[step] if step < 0 else step for step in wanted))
        except BirthlensError:
            raise
        except (ValueError, IndexError):
            raise BirthlensError(f"steps = {text!r}: write all, last, every:N, or a list such as 0,100,-1.") from None
        for step in chosen:
            if step not in steps:
                raise BirthlensError(f"step = {step} is not kept in {self.path}; kept steps are {_listing(steps)}.")
        return chosen


def load_run(path: str | Path) -> Run:
    """Open a run for reading."""
    return Run(path)


def _listing(steps: list[int]) -> str:
    if len(steps) <= 12:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:6]))}, ..., {', '.join(map(str, steps[-3:]))} ({len(steps)} in all)"
