"""Tables of what the memories recall, over checkpoints: the paper's three (section 4), or every circuit of any model.

Both have the columns of `series`, with one number in each row. Their metrics are those of `recall.READINGS` and these:

    frobenius_share   share of ||W||^2 along the ideal memory           effective_rank   (sum s^2)^2 / sum s^4
    kl                KL(bigram || softmax) of the feed-forward; chance = its value for uniform predictions
    spread            how much a score of this circuit varies over candidates: root mean square over queries of its standard
                      deviation, times the score scale (QK) or 1; for bases without a pairing

Candidates matter. With K fixed triggers, queries outside them were never trained. If outputs are never triggers, K queries
of the output memory are never trained. Sets therefore have names, and `matched_recall` compares memories at equal chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from birthlens.analysis.memories.circuits import (
    EARLY,
    INDUCTION_HEAD,
    PREV_TOKEN_HEAD,
    all_memories,
    feed_forward_kl,
    feed_forward_memory,
    output_memory,
    prev_token_memory,
    trigger_memory,
)
from birthlens.analysis.memories.layer_norms import folded
from birthlens.analysis.memories.memory import Array, AssociativeMemory, Basis
from birthlens.analysis.memories.recall import READINGS, Association, chance_level, frobenius_share, readings
from birthlens.analysis.memories.series import MetricSeries, SeriesTable
from birthlens.model.sites import Head
from birthlens.model.weights import Weights, stacked
from birthlens.shapes import Float
from birthlens.system import cores

if TYPE_CHECKING:
    import pandas as pd

BASES: tuple[Basis, ...] = ("raw", "dual")
CHUNK_BYTES = 80_000_000  # of weights, read at once: enough to hide Python's overhead, few enough to save memory

Checkpoints = Iterable[tuple[int, Weights]]


@dataclass(frozen=True)
class Probe:
    """A named memory over a stack of checkpoints, the candidate sets to read it with, and the scale of its scores."""

    name: str
    heads: tuple[Head, ...]
    memory: AssociativeMemory
    associations: tuple[Association, ...]
    scale: float

    def series(
        self, steps: Sequence[int], basis: Basis, metric: str, candidates: str, values: Array, chance: float, n: int
    ) -> MetricSeries:
        """Return a metric of this memory over steps; `values` may be a single number that holds at every step."""
        layer = self.memory.circuit.layer
        every = np.broadcast_to(values, len(steps)).astype(np.float64)
        head = ">".join(map(str, self.heads))
        return MetricSeries(steps, self.name, layer, head, basis, metric, candidates, every, chance, n)


def paper_probes(
    weights: Weights,
    triggers: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
) -> list[Probe]:
    """Return the paper's three memories, of one checkpoint or of stacked ones, with every candidate set that applies.

    `triggers` are the fixed triggers (None if they are random). `outputs` are the tokens that can be outputs (None if all
    can). Sets: "all"; "triggers" (queries and candidates); "triggers among all" and "outputs among all" (queries only);
    "first 64" positions, with a codebook of their own.
    """
    vocabulary = weights["W_E"].shape[-2]
    scale = weights.score_scale
    probes = []
    everything = Association.identity(vocabulary)
    narrowed = []
    if triggers is not None and len(triggers) > 1:
        narrowed.append(Association.identity(vocabulary, triggers, triggers, "triggers"))
        narrowed.append(Association.identity(vocabulary, triggers, None, "triggers among all"))
    written = [] if outputs is None else [Association.identity(vocabulary, outputs, None, "outputs among all")]
    context = weights["W_pos"].shape[-2] if "W_pos" in weights else 0
    if context > 2:  # with two positions there is no choice
        memory = prev_token_memory(weights, prev_token_head)
        probes.append(Probe("prev_token_memory", (prev_token_head,), memory, (Association.shift(context),), scale))
        if context > EARLY:
            memory = prev_token_memory(weights, prev_token_head, EARLY)
            shift = Association.shift(EARLY, f"first {EARLY}")
            probes.append(Probe("prev_token_memory", (prev_token_head,), memory, (shift,), scale))
    memory = trigger_memory(weights, induction_head, prev_token_head)
    probes.append(Probe("trigger_memory", (induction_head,), memory, (everything, *narrowed), scale))
    memory = output_memory(weights, induction_head)
    probes.append(Probe("output_memory", (induction_head,), memory, (everything, *narrowed, *written), 1.0))
    return probes


def memory_series(
    checkpoints: Checkpoints,
    triggers: Sequence[int] | None = None,
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
    outputs: Sequence[int] | None = None,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
    bases: Sequence[Basis] = BASES,
    ways: int | None = None,
) -> SeriesTable:
    """Read the paper's memories at every checkpoint, given as (step, weights).

    Columns as in the module. `matched_recall` is among `ways` candidates (default: the number of triggers, or 5).
    The feed-forward's `kl` needs `bigram` and a model with a linear feed-forward; it leaves out `triggers`.

    Each checkpoint is read in its own codebooks. `attrs["moving_codebooks"]` names those that training moves, because recall
    may then rise with a change of basis.

    Raises:
        BirthlensError: if there is no checkpoint, or the model lacks one of the heads.
    """
    wanted = ways or (len(triggers) if triggers is not None and len(triggers) > 1 else 5)
    found: list[MetricSeries] = []
    waiting: Iterable[list[MetricSeries]] = ()
    moving = Moving([prev_token_head])
    # BLAS threads slow down products this small, tenfold on a busy machine. Instead, each thread reads tables of its own.
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        for steps, weights in chunks(checkpoints):
            moving.watch(weights)
            probes = paper_probes(weights, triggers, outputs, prev_token_head, induction_head)
            parts = [part for probe in probes for part in _parts(steps, probe, bases, wanted)]
            if bigram is not None and f"L{weights.n_layers - 1}.W_F" in weights:
                parts.append(_kl(steps, weights, bigram, triggers or ()))
            started: Iterable[list[MetricSeries]] = pool.map(list, parts)
            found += chain.from_iterable(waiting)  # of the previous chunk, which was read while this one was loading
            waiting = started
        found += chain.from_iterable(waiting)
    return SeriesTable(found, {"moving_codebooks": moving.names})


def circuit_series(
    checkpoints: Checkpoints,
    heads: Sequence[Head] | None = None,
    bases: Sequence[Basis] = BASES,
    longest_path: int = 2,
    ways: int = 5,
    fold: bool = False,
) -> SeriesTable:
    """Read every head of any model in every basis (`circuits.all_memories`); `fold` folds its layer norms in first.

    Columns as in the module; `memory` is the circuit with its codebooks. Bases without a pairing have `spread` only.
    attrs["moving_codebooks"] as in `memory_series`; attrs["folded"] says whether layer norms were folded (`layer_norms`).

    Raises:
        BirthlensError: if there is no checkpoint, or no layer norm to fold.
    """
    series: list[MetricSeries] = []
    moving = Moving(heads)
    for step, weights in checkpoints:
        read = folded(weights) if fold else weights
        moving.watch(read)
        for found in all_memories(read, heads, longest_path=longest_path):
            scale = read.score_scale if found.kind == "QK" else 1.0
            pairs = () if found.association is None else (found.association,)
            probe = Probe(found.memory.name, found.heads, found.memory, pairs, scale)
            series += chain.from_iterable(_parts([step], probe, bases, ways))
            series += _spread(step, probe)
    return SeriesTable(series, {"moving_codebooks": moving.names, "folded": fold})


def best_circuits_table(readings: pd.DataFrame, most: int = 6) -> pd.DataFrame:
    """Select the circuits whose recall exceeds chance most at the last step, best first, from a `circuit_series` table.

    Circuits with a single query do not count. Columns: memory, step, value, chance, n, sorted by step within each memory.
    """
    import pandas as pd

    recalls = readings[(readings["metric"] == "recall") & (readings["basis"] == "raw") & (readings["n"] > 1)]
    last = recalls[recalls["step"] == recalls["step"].max()]
    excess = (last["value"] - last["chance"]).sort_values(ascending=False, kind="stable")
    best = list(last.loc[excess.index, "memory"].drop_duplicates()[:most])
    kept = recalls[recalls["memory"].isin(best)].drop_duplicates(["memory", "step"])
    order = kept["memory"].map({name: place for place, name in enumerate(best)})
    kept = kept.assign(order=order).sort_values(["order", "step"], kind="stable", ignore_index=True)
    return pd.DataFrame(kept[["memory", "step", "value", "chance", "n"]])


def chunks(checkpoints: Checkpoints) -> Iterator[tuple[list[int], Weights]]:
    """Yield steps and their weights a few checkpoints at a time, stacked."""
    iterator = iter(checkpoints)
    for step, first in iterator:
        count = max(1, CHUNK_BYTES // sum(tensor.nbytes for tensor in first.values()))
        chunk = [(step, first), *islice(iterator, count - 1)]
        yield [step for step, _ in chunk], stacked([weights for _, weights in chunk])


class Moving:
    """Finds codebooks that training moves, one checkpoint after the other; `heads` are those that remap tokens (None: all).

    Heads of the last layer remap nothing, because no later layer reads what they write.
    """

    def __init__(self, heads: Sequence[Head] | None = None) -> None:
        self.heads = heads
        self._first: Weights | None = None
        self._found: set[str] = set()

    def watch(self, weights: Weights) -> None:
        """Compare a checkpoint, or several stacked ones, with the first one seen."""
        first = self._first = weights if self._first is None else self._first
        layers = {head.layer for head in (first.heads if self.heads is None else self.heads)} - {first.n_layers - 1}
        behind = ["W_E", "W_pos", "W_U", *(f"L{layer}.{name}" for layer in layers for name in ("W_V", "W_O"))]
        moving = weights.moving
        for name in behind:
            if name in first and (name in moving or not np.array_equal(first[name], weights[name])):
                self._found.add(name)

    @property
    def names(self) -> list[str]:
        """The tensors behind the codebooks that differ between checkpoints, sorted."""
        return sorted(self._found)


def _parts(steps: Sequence[int], probe: Probe, bases: Sequence[Basis], ways: int) -> list[Iterator[MetricSeries]]:
    """List the parts of a memory's readings, in order; each is computed when it is first iterated, in any thread."""
    parts: list[Iterator[MetricSeries]] = []
    for association in probe.associations:
        parts += [_readings(steps, probe, association, basis, ways) for basis in bases]
        parts.append(_share(steps, probe, association))
    if probe.associations and probe.associations[0].name == "all":
        parts.append(_rank(steps, probe))
    return parts


def _readings(
    steps: Sequence[int], probe: Probe, association: Association, basis: Basis, ways: int
) -> Iterator[MetricSeries]:
    drawn = min(ways, int(association.choices.min()))
    values = readings(probe.memory, association, basis, probe.scale, drawn)
    for metric in READINGS:
        chance = chance_level(metric, association, drawn)
        yield probe.series(steps, basis, metric, association.name, values[metric], chance, len(association.queries))


def _share(steps: Sequence[int], probe: Probe, association: Association) -> Iterator[MetricSeries]:
    width = probe.memory.circuit.width
    values = frobenius_share(probe.memory, association)
    chance = 1 / (width[0] * width[1])
    count = len(association.queries)
    yield probe.series(steps, "raw", "frobenius_share", association.name, values, chance, count)


def _rank(steps: Sequence[int], probe: Probe) -> Iterator[MetricSeries]:
    # A Gaussian d x d' matrix has a participation ratio of d d' / (d + d'), from its first two Marchenko-Pastur moments.
    circuit = probe.memory.circuit
    d_in, d_out = probe.memory.circuit.width
    chance = d_in * d_out / (d_in + d_out) if circuit.left.shape[-1] >= min(d_in, d_out) else float("nan")
    yield probe.series(steps, "raw", "effective_rank", "all", circuit.effective_rank(), chance, d_in * d_out)


def _spread(step: int, probe: Probe) -> Iterator[MetricSeries]:
    memory = probe.memory
    queries = np.arange(len(memory.inputs))
    candidates = np.arange(len(memory.outputs))
    variance = np.concatenate([scores.var(-1) for _, _, scores in memory.blocks(queries, candidates)])
    value = np.asarray(probe.scale * np.sqrt(variance.mean()))
    yield probe.series([step], "raw", "spread", "all", value, float("nan"), len(queries))


def _kl(steps: Sequence[int], weights: Weights, bigram: Array, leave_out: Sequence[int]) -> Iterator[MetricSeries]:
    probe = Probe("feed_forward_memory", (), feed_forward_memory(weights), (), 1.0)
    scores = probe.memory.scores()
    name = "all but triggers" if len(leave_out) else "all"
    values, uniform = (feed_forward_kl(table, bigram, leave_out) for table in (scores, np.zeros(scores.shape[-2:])))
    yield probe.series(steps, "raw", "kl", name, values, float(uniform), len(bigram) - len(set(leave_out)))
