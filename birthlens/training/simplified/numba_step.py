"""The training step of the simplified model on compiled kernels (Numba): the fastest path of this package.

Sequences are divided into parts, whose number depends only on the size of the batch. Each part has its own gradient sums,
which are added in a fixed order, so the result has the same bits for any number of threads. The compiled code is cached on
disk, and a process of its own compiles it (`compiled_apart`), so only the first step on a machine waits for that.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch

from birthlens.config.model import ModelConfig, trained_by_default
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.training.simplified.folding import (
    Array,
    Batch,
    FoldedStep,
    Needs,
    StepOutcome,
    Sums,
    Tables,
    single_threaded_blas,
)

if TYPE_CHECKING:
    from birthlens.training.simplified.buffers import Scratch

_MAX_PARTS = 16
_SEQUENCES_PER_PART = 16


def obstacle() -> str | None:
    """Return why the kernels cannot be used in this environment, or return None if they can."""
    try:
        import birthlens.training.simplified.kernels  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: Numba finds no directory for its cache
        return f"the compiled kernels cannot be loaded ({error})"
    return None


def available() -> bool:
    """Return whether Numba and its dependencies can be loaded."""
    return obstacle() is None


class FusedStep(FoldedStep):
    """The folded step on compiled kernels; see `FoldedStep` for the interface.

    `threads` defaults to torch's number (`torch.set_num_threads`, OMP_NUM_THREADS, or the cores); the result has the
    same bits for any number. Use one object from one thread at a time.

    Raises:
        BirthlensError: as in `FoldedStep`, and if Numba cannot be loaded.
    """

    def __init__(
        self, weights: Mapping[str, Array], score_scale: float, trained: Sequence[str], threads: int | None = None
    ) -> None:
        if reason := obstacle():
            raise BirthlensError(f"FusedStep: {reason}; install numba and scipy, or use SimplifiedStep.")
        if threads is not None and threads < 1:
            raise BirthlensError(f"threads = {threads}: it must be 1 or more, or None for all cores.")
        from birthlens.training.simplified import buffers, kernels

        compiled_apart()
        super().__init__(weights, score_scale, trained, pos_multiple=kernels.KEYS)
        self.threads = threads or torch.get_num_threads()
        self._run_sequences = kernels.run_sequences
        self._fill = buffers.fill
        sizes = len(self._codebook), self.d_model, self.d_vocab
        self._model = buffers.new_tables(*sizes)
        self._sums = [buffers.new_sums(*sizes) for _ in range(_MAX_PARTS)]
        self._scratch: SimpleQueue[Scratch] = SimpleQueue()
        for _ in range(self.threads):
            self._scratch.put(buffers.new_scratch(self.n_pos, self.d_model, self.d_vocab))

    def _run(self, batch: Batch, tables: Tables, needs: Needs, *, logits: bool) -> tuple[StepOutcome, Sums]:
        n = len(batch.targets)
        outcome = StepOutcome(
            losses=np.zeros(n, np.float32),
            predictions=np.zeros(n, np.int64),
            logits=np.zeros((n if logits else 0, self.d_vocab), np.float32),
        )
        batch = batch._replace(tokens=np.ascontiguousarray(batch.tokens, np.uint32))
        # The longest sequences come first and are divided in turn, so that all parts take about the same time.
        order = np.argsort(-np.diff(batch.starts), kind="stable")
        n_parts = min(_MAX_PARTS, max(1, len(order) // _SEQUENCES_PER_PART))
        sums = self._sums[:n_parts]

        def run(part: int) -> None:
            scratch = self._scratch.get()
            try:
                for total in sums[part]:
                    total.fill(0)
                sequences = np.ascontiguousarray(order[part::n_parts])
                self._run_sequences(sequences, batch, self._model, needs, scratch, outcome, sums[part])
            finally:
                self._scratch.put(scratch)

        self._fill(self._model, tables)
        with single_threaded_blas():
            in_turn = map if self.threads == 1 else _pool(self.threads, os.getpid()).map
            list(in_turn(run, range(n_parts)))
        for part in sums[1:]:
            for total, term in zip(sums[0], part, strict=True):
                total += term
        return outcome, sums[0]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Keep one pool of each size; a forked process has none of its parent's threads, so it needs its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"birthlens-{process}")


_COMPILING = "BIRTHLENS_COMPILES"
"""The environment variable that tells a process that it is the one that compiles."""


@cache
def compiled_apart() -> bool:
    """Let another process compile the kernels where their code is not in Numba's cache; return whether it is there now.

    A process that compiles calls its functions one by one, while code from the cache has them in one piece, and the last
    bits of sums differ. With code from the cache in every process, a run has the same bits in all of them.
    """
    import numba

    from birthlens.training.simplified import kernels

    if os.environ.get(_COMPILING):
        return False
    source = Path(kernels.__file__)
    known = (source.stat().st_mtime_ns, source.stat().st_size, numba.__version__, sys.version, np.__version__)
    stamp = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    folder = Path(kernels.run_sequences.stats.cache_path)
    marker = folder / f"kernels.{stamp}.compiled"
    if marker.exists() and any(folder.glob("kernels.run_sequences-*.nbi")):
        return True
    program = "from birthlens.training.simplified.numba_step import compile_kernels; compile_kernels()"
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    environment = {**os.environ, _COMPILING: "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    if done.returncode == 0:
        with suppress(OSError):  # a cache that cannot be written is never used, so that every process compiles
            marker.touch()
    return done.returncode == 0


def compile_kernels() -> None:
    """Compile the kernels, by one step of a tiny model."""
    config = ModelConfig(d_model=8)
    weights = initial_weights(config, 4, 8, np.random.default_rng(0))
    step = FusedStep(dict(weights), weights.score_scale, trained_by_default(config), threads=1)
    tokens = np.zeros((1, 8), dtype=np.int64)
    step.loss_and_gradients(tokens, tokens, np.ones(tokens.shape, dtype=bool))
