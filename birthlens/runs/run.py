"""A run opened for reading: its config, its task, its metrics, and the weights at any kept step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from birthlens.config.model import parameter_shapes
from birthlens.config.run import RunConfig
from birthlens.config.schedule import chosen_steps, not_kept
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights, check_tensors, load_tensors
from birthlens.runs.files import CONSTANTS, HEADER, RESUME, TABLES, checkpoint_file, checkpoint_name, kept_steps
from birthlens.runs.header import check_of, read_header, seal_of, steps_of
from birthlens.runs.lineage import Parent as Parent
from birthlens.runs.metrics import COLUMNS, read_metrics
from birthlens.runs.state import check_state, read_state
from birthlens.runs.tables import read_tables, statistics_in
from birthlens.tasks.corpus import BigramStatistics

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedTransformer
    from birthlens.tasks.task import Task

Array = np.ndarray
_log = logging.getLogger("birthlens")


class Run:
    """Read a run: its config, its task, its metrics and the weights at any kept step.

    Every file is checked against its digest when it is read, and its content against the config. Runs of format 1 have no
    digests; a warning says so, and `verified` is False.

    Raises:
        BirthlensError: if the directory contains no run, a newer or damaged one, or lacks a step; the message names the
        file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        try:
            config = RunConfig.parse(self.header["config"])
            steps = steps_of(self.header)
            self.config = config if steps is None else config.changed(training=config.training.changed(steps=steps))
        except BirthlensError as error:
            raise BirthlensError(f"{self.path / HEADER} holds a config that cannot be read: {error}") from None
        if not self.verified:
            _log.warning(f"{self.path} has format 1, which has no digests: its files are read unverified.")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self.steps)} checkpoints, last step {self.steps[-1]})"

    @property
    def parent(self) -> Parent | None:
        """The origin of a fork; None for a run that started at step 0."""
        found = self.header.get("parent")
        return None if found is None else Parent.read(self.path, found)

    @property
    def lineage(self) -> list[Parent]:
        """The origin of a fork, then that of the run it was forked from, and so on, as far as the runs still exist."""
        found: list[Parent] = []
        parent = self.parent
        while parent is not None:
            found.append(parent)
            places = [one.path.resolve() for one in found]
            gone = not (parent.path / HEADER).exists() or places[-1] in (*places[:-1], self.path.resolve())
            parent = None if gone else Run(parent.path).parent
        return found

    @property
    def steps(self) -> list[int]:
        """The steps whose weights are kept, ascending; read from the directory each time, so they grow in a live run."""
        return kept_steps(self.path)

    @property
    def verified(self) -> bool:
        """Whether the format has digests, against which every file is checked when it is read."""
        return seal_of(self.header) is not None

    @property
    def finished(self) -> bool:
        """Whether training reached its last step."""
        return self.steps[-1] >= self.config.training.steps

    @cached_property
    def _tables(self) -> dict[str, Array]:
        return read_tables(self.path, self.header, self.config)

    @cached_property
    def statistics(self) -> BigramStatistics:
        """The global chain that the run was trained on."""
        return statistics_in(self._tables, tuple(self.header["vocab"]))

    @property
    def trigger_ids(self) -> Array | None:
        """Ids of the fixed triggers, or None if each sequence draws its own."""
        return self._tables.get("triggers")

    @property
    def triggers(self) -> list[int] | None:
        """The same ids as a list."""
        return None if self.trigger_ids is None else self.trigger_ids.tolist()

    @cached_property
    def task(self) -> Task:
        """The task, ready to sample batches."""
        from birthlens.tasks.kinds import task_of

        task = task_of(self.config.task, self.statistics)
        if _listed(task.fixed_triggers) != _listed(self.trigger_ids):
            raise BirthlensError(
                f"{self.path / TABLES} has triggers {_listed(self.trigger_ids)}, the task {_listed(task.fixed_triggers)}; "
                "the run is damaged."
            )
        return task

    @cached_property
    def constants(self) -> dict[str, Array]:
        """Parameters that training never moves."""
        shapes = {name: shape for name, shape in self._shapes.items() if name not in self._moving}
        return self._load(self.path / CONSTANTS, CONSTANTS, shapes)

    def checkpoint(self, step: int) -> dict[str, Array]:
        """Return the parameters that training moves, at a kept step."""
        file = checkpoint_file(self.path, step)
        if not file.exists():
            raise not_kept(step, self.steps, self.path)
        return self._load(file, checkpoint_name(step), {name: self._shapes[name] for name in self._moving})

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the state from which training continues: the optimiser's tensors, and notes with at least the `step`."""
        state = read_state(self.path, self.header)
        plain = self.parent is None and not self.config.training.clamps
        check_state(self.path, self.config, self._shapes, state, self.rows() if plain else None)
        return state

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config.model, len(self.header["vocab"]), self.config.task.context)

    @cached_property
    def _moving(self) -> tuple[str, ...]:
        return self.config.moving

    def _load(self, file: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        tensors = load_tensors(file, check_of(self.header, name))
        check_tensors(file, tensors, shapes)
        return tensors

    def weights(self, step: int) -> Weights:
        """Return all weights at a kept step; a negative step counts from the end (-1 is the last)."""
        if step < 0:
            step = self.select(str(step))[0]
        return Weights(self.config.model, self.constants | self.checkpoint(step))

    def checkpoints(self, steps: Iterable[int] | None = None) -> Iterator[tuple[int, Weights]]:
        """Yield (step, weights) lazily, for the given steps or for all."""
        for step in self.steps if steps is None else steps:
            yield step, self.weights(step)

    def stacked(self, names: Iterable[str], steps: Iterable[int] | None = None) -> dict[str, Array]:
        """Return parameters as arrays with a leading step axis; constants are repeated without copying."""
        steps = list(self.steps if steps is None else steps)
        names = list(names)
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
                raise BirthlensError(f"{name!r} is not a parameter of this run; valid names are {valid}.")
        return out

    def model(self, step: int = -1) -> HookedTransformer:
        """Return the HookedTransformer at a kept step, ready for hooks."""
        from birthlens.model.hooked import build

        return build(self.weights(step), n_ctx=self.config.task.context)

    def metrics(self) -> pd.DataFrame:
        """Return the measurements of training: columns step, split ('train' or 'held_out'), metric, value, n."""
        import pandas as pd

        return pd.DataFrame(self.rows(), columns=list(COLUMNS))

    def rows(self) -> list[dict[str, Any]]:
        """Return the same measurements as a list of mappings."""
        seal = seal_of(self.header)
        end = None
        if seal is not None and (self.path / RESUME).exists():
            end = read_state(self.path, self.header)[1]["metrics"]  # read first: training may append meanwhile
        return read_metrics(self.path, seal, end)

    def select(self, text: str) -> list[int]:
        """Parse a choice of kept steps: 'all', 'last', 'every:N' (of the kept ones), or a list such as '0,100,-1'."""
        return chosen_steps(text, self.steps, self.path)


def load_run(path: str | Path) -> Run:
    """Open a run for reading."""
    return Run(path)


def _listed(ids: Array | None) -> list[int]:
    return [] if ids is None else ids.tolist()
