"""The scores of `birthlens scores` while a model trains, in any training loop.

The model is read through a copy (`model.live`), on sequences that are drawn once, so training is not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from birthlens.analysis.behaviour.head_scores import in_context_learning_table, scores_table, transfer_table
from birthlens.analysis.behaviour.head_weights import weight_scores_table
from birthlens.errors import BirthlensError
from birthlens.model.live import LiveModel
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import batch_of_tokens, check_tokens, repeated_tokens

if TYPE_CHECKING:
    import pandas as pd

Log = Callable[[int, Mapping[str, float]], object]

PROBES = ("heads", "in-context-learning", "transfer", "weights")
"""The kinds of `birthlens scores`; weights are the memories of a model of TransformerLens between its embeddings."""
COLUMNS = ["step", "probe", "layer", "head", "through", "score", "value", "chance", "n"]


class Monitor:
    """Scores a model at every `every`-th step of its training.

    `model` is a HookedTransformer, a TransformerBridge, or a causal language model of Transformers. `probes` are names of
    `PROBES`. `sequences` are token ids [batch, pos + 1] for heads and in-context-learning; by default `n` random sequences
    are repeated once. `log(step, values)` gets each measurement as a dictionary, by names such as "heads/L1H0/induction".

    Raises:
        BirthlensError: for a model that cannot be read, an unknown probe, and sequences that do not fit the model.

    Example:
        >>> from birthlens.config.model import ModelConfig
        >>> from birthlens.model.hooked import build
        >>> from birthlens.model.initialisation import initial_weights
        >>> model = build(initial_weights(ModelConfig(d_model=8), 5, 8, np.random.default_rng(0)))
        >>> monitor = Monitor(model, ["heads"], every=10)
        >>> [len(monitor.step(n)) if n % 10 == 0 else monitor.step(n) for n in (10, 11, 20)]
        [6, None, 6]
    """

    def __init__(
        self,
        model: object,
        probes: Sequence[str] = ("heads", "in-context-learning"),
        every: int = 100,
        sequences: object = None,
        n: int = 16,
        seed: int = 0,
        log: Log | None = None,
    ) -> None:
        if every < 1 or n < 1:
            raise BirthlensError(f"every = {every}, n = {n}: both must be at least 1.")
        if wrong := [probe for probe in probes if probe not in PROBES] or not probes:
            raise BirthlensError(f"probes = {wrong or '[]'}: valid are {', '.join(PROBES)}.")
        self._live = LiveModel(model)
        if "weights" in probes and self._live.hooked is None:
            raise BirthlensError(
                f"probes = weights: they are read from a model of TransformerLens, not from a {type(model).__name__}; save "
                "the model and use `birthlens scores DIRECTORY --kind weights`."
            )
        self.every = every
        self._probes = list(probes)
        self._n = n
        self._seed = seed
        self._log = log
        self._batch = self._drawn(sequences)
        self._tables: list[pd.DataFrame] = []
        self._last: int | None = None

    def step(self, n: int) -> pd.DataFrame | None:
        """Report how many updates have been made; return the measurements, or None if this step is not measured."""
        if n % self.every or n == self._last:
            return None
        self._last = n
        self._live.refresh()
        table = self._measured(n)
        self._tables.append(table)
        if self._log is not None:
            rows: list[Any] = list(table.itertuples())
            self._log(n, {_name(row): float(row.value) for row in rows})
        return table

    def table(self) -> pd.DataFrame:
        """Return everything measured so far: columns step, probe, layer, head, through, score, value, chance, n."""
        import pandas as pd

        return pd.concat(self._tables, ignore_index=True) if self._tables else pd.DataFrame(columns=COLUMNS)

    def trainer_callback(self) -> Any:
        """Return a callback for the Trainer of Transformers, which measures on its first process."""
        monitor = self

        class Callback(import_module("transformers").TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                self.on_step_end(args, state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if state.is_world_process_zero:
                    monitor.step(int(state.global_step))

        return Callback()

    def _drawn(self, sequences: object) -> TokenBatch:
        cfg = self._live.cfg
        if sequences is None:
            length = min(64, (cfg.n_ctx + 1) // 2)
            return repeated_tokens(self._n, length, cfg.d_vocab, np.random.default_rng([self._seed, 0]))
        ids = torch.as_tensor(sequences).cpu()
        if ids.dim() != 2 or ids.dtype.is_floating_point or ids.shape[1] < 4:
            raise BirthlensError(
                f"sequences = {list(ids.shape)} of {ids.dtype}: give ids [batch, pos + 1], 4 or more each."
            )
        batch = batch_of_tokens(ids.long())
        check_tokens(batch, cfg.d_vocab, cfg.n_ctx, "sequences")
        return batch

    def _measured(self, step: int) -> pd.DataFrame:
        import pandas as pd

        models: list[tuple[int, Any]] = [(step, self._live)]
        calls: dict[str, Callable[[], pd.DataFrame]] = {
            "heads": lambda: scores_table(models, self._batch),
            "in-context-learning": lambda: in_context_learning_table(models, self._batch).assign(
                score="late minus early loss", chance=0.0
            ),
            "transfer": lambda: transfer_table(models, np.random.default_rng([self._seed, 7]), self._n),
            "weights": lambda: weight_scores_table([(step, self._live.hooked)]),
        }
        tables = [calls[probe]().assign(probe=probe).reindex(columns=COLUMNS).astype(object) for probe in self._probes]
        table = pd.concat(tables, ignore_index=True)
        return table.astype({"step": int, "value": float, "chance": float, "n": int})


def _name(row: Any) -> str:
    """Format a row's name for loggers: probe, head (after the one it reads through), score."""
    head = [] if row.head is None or row.head != row.head else [str(row.head)]
    if row.through is not None and row.through == row.through:
        head = [f"{row.through}>{row.head}"]
    return "/".join([row.probe, *head, row.score])
