"""Tables of what the memories recall, over checkpoints: the paper's three (section 4), or every circuit of any model.

Both tables are tidy, one number a row: step, memory, layer, head, basis ("raw", "dual"), metric (`readings.METRICS` and the
ones below), candidates (the name of the candidate set), value, chance (what a random table reads, NaN where that has no
meaning) and n (how many queries the mean is over, or entries of the matrix for metrics of the whole matrix).

    frobenius_share   share of ||W||^2 along the ideal memory           effective_rank   (sum s^2)^2 / sum s^4
    kl                KL(bigram || softmax) of the feed-forward; chance = its value for uniform predictions
    spread            how far a score of this circuit moves over candidates: root mean square over queries of its standard
                      deviation, times the score scale (QK) or 1; for bases that have no pairing

Candidates matter: with K fixed triggers, queries outside them were never trained, and outputs that are never triggers leave
K queries of the output memory untrained. Sets are therefore named, and `matched_recall` compares memories at one chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from birthlens.analysis.circuits import (
    INDUCTION_HEAD,
    PREV_TOKEN_HEAD,
    all_memories,
    feed_forward_kl,
    feed_forward_memory,
    output_memory,
    prev_token_memory,
    trigger_memory,
)
from birthlens.analysis.layer_norms import folded
from birthlens.analysis.memories import Array, AssociativeMemory, Basis, stacked
from birthlens.analysis.readings import METRICS, Association, chance_level, frobenius_share, readings
from birthlens.errors import BirthlensError
from birthlens.machine import cores
from birthlens.shapes import Float
from birthlens.sites import Head
from birthlens.weights import Weights

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["step", "memory", "layer", "head", "basis", "metric", "candidates", "value", "chance", "n"]
BASES: tuple[Basis, ...] = ("raw", "dual")
_CHUNK = 50  # checkpoints that are read at once: enough to drown Python's overhead, few enough to stay small

Checkpoints = Iterable[tuple[int, Weights]]
Row = tuple[int, str, int, str, str, str, str, float, float, int]


@dataclass(frozen=True)
class Probe:
    """One named memory over a stack of checkpoints, the sets of candidates to read it with, and the scale of its scores."""

    name: str
    head: str
    memory: AssociativeMemory
    associations: tuple[Association, ...]
    scale: float


def paper_probes(
    checkpoints: Sequence[Weights],
    triggers: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
) -> list[Probe]:
    """Return the paper's three memories, stacked, with every candidate set that makes sense.

    `triggers` are the fixed triggers (None where they are random), `outputs` the tokens that can be outputs where not all
    can. Sets: "all"; "triggers" (queries and candidates); "triggers among all" and "outputs among all" (queries only);
    "first 64" positions, a codebook of their own.
    """
    first, vocabulary = checkpoints[0], len(checkpoints[0]["W_E"])
    everything = Association.identity(vocabulary)
    narrowed = []
    if triggers is not None and len(triggers) > 1:
        narrowed.append(Association.identity(vocabulary, triggers, triggers, "triggers"))
        narrowed.append(Association.identity(vocabulary, triggers, None, "triggers among all"))
    written = [] if outputs is None else [Association.identity(vocabulary, outputs, None, "outputs among all")]
    scale, probes = first.score_scale, []
    context = len(first["W_pos"]) if "W_pos" in first else 0
    if context > 2:  # with two positions there is nothing to choose from
        for count, name in ((context, "all"), (64, "first 64")):
            if count <= context and not (name != "all" and count == context):
                memory = stacked([prev_token_memory(w, prev_token_head, count) for w in checkpoints])
                shift = Association.shift(count, name)
                probes.append(Probe("prev_token_memory", str(prev_token_head), memory, (shift,), scale))
    memory = stacked([trigger_memory(w, induction_head, prev_token_head) for w in checkpoints])
    probes.append(Probe("trigger_memory", str(induction_head), memory, (everything, *narrowed), scale))
    memory = stacked([output_memory(w, induction_head) for w in checkpoints])
    probes.append(Probe("output_memory", str(induction_head), memory, (everything, *narrowed, *written), 1.0))
    return probes


def memory_table(
    checkpoints: Checkpoints,
    triggers: Sequence[int] | None = None,
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
    outputs: Sequence[int] | None = None,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
    bases: Sequence[Basis] = BASES,
    ways: int | None = None,
) -> pd.DataFrame:
    """Read the paper's memories at every checkpoint, (step, weights) by (step, weights).

    Columns as in the module. `matched_recall` is among `ways` candidates, by default as many as there are triggers, else 5.
    The feed-forward's `kl` is there where `bigram` is given and the model has a linear feed-forward; it leaves `triggers`
    out.

    Each checkpoint is read in its own codebooks; `attrs["moving_codebooks"]` names those that training moves, so that it is
    stated where a recall may rise because its basis did.

    Raises:
        BirthlensError: where there is no checkpoint, or the model lacks one of the heads.
    """
    wanted = ways or (len(triggers) if triggers is not None and len(triggers) > 1 else 5)
    rows: list[Row] = []
    moving = Moving([prev_token_head])
    # Products this small lose to the waiting of BLAS threads, tenfold on a busy machine: each of ours reads its own tables.
    with threadpool_limits(1), ThreadPoolExecutor(cores()) as pool:
        for steps, weights in chunks(checkpoints):
            moving.watch(weights)
            probes = paper_probes(weights, triggers, outputs, prev_token_head, induction_head)
            parts = [part for probe in probes for part in _parts(steps, probe, bases, wanted)]
            rows += chain.from_iterable(pool.map(list, parts))
            if bigram is not None and f"L{weights[0].n_layers - 1}.W_F" in weights[0]:
                rows += _kl_rows(steps, weights, bigram, triggers or ())
    table = _table(rows)
    table.attrs["moving_codebooks"] = moving.names
    return table


def circuit_table(
    checkpoints: Checkpoints,
    heads: Sequence[Head] | None = None,
    bases: Sequence[Basis] = BASES,
    longest_path: int = 2,
    ways: int = 5,
    fold: bool = False,
) -> pd.DataFrame:
    """Read every head of any model in every basis (`circuits.all_memories`), with `fold` behind its layer norms.

    Columns as in the module; `memory` is the circuit with its codebooks. Bases without a pairing have `spread` alone.
    attrs["moving_codebooks"] as in `memory_table`; attrs["folded"] says whether layer norms were folded (`layer_norms`).

    Raises:
        BirthlensError: where there is no checkpoint, or no layer norm to fold.
    """
    rows: list[Row] = []
    moving = Moving(heads)
    for steps, weights in chunks(checkpoints):
        weights = [folded(single) for single in weights] if fold else weights
        moving.watch(weights)
        for step, single in zip(steps, weights, strict=True):
            for found in all_memories(single, heads, longest_path=longest_path):
                scale = single.score_scale if found.kind == "QK" else 1.0
                pairs = () if found.association is None else (found.association,)
                probe = Probe(found.memory.name, found.head, found.memory, pairs, scale)
                rows += chain.from_iterable(_parts([step], probe, bases, ways))
                rows += _spread_rows(step, found.memory, found.head, scale)
    table = _table(rows)
    table.attrs |= {"moving_codebooks": moving.names, "folded": fold}
    return table


def chunks(checkpoints: Checkpoints) -> Iterator[tuple[list[int], list[Weights]]]:
    """Yield steps and weights a few checkpoints at a time, to be stacked."""
    iterator = iter(checkpoints)
    while chunk := list(islice(iterator, _CHUNK)):
        yield [step for step, _ in chunk], [weights for _, weights in chunk]


class Moving:
    """Watches checkpoints go by for codebooks that training moves; `heads` are those that remap tokens (None: all).

    The last layer's heads remap nothing, as no later one reads what they write.
    """

    def __init__(self, heads: Sequence[Head] | None = None) -> None:
        self.heads = heads
        self._first: Weights | None = None
        self._found: set[str] = set()

    def watch(self, checkpoints: Sequence[Weights]) -> None:
        """Compare some more checkpoints with the first one seen."""
        first = self._first = checkpoints[0] if self._first is None else self._first
        layers = {head.layer for head in (first.heads if self.heads is None else self.heads)} - {first.n_layers - 1}
        behind = ["W_E", "W_pos", "W_U", *(f"L{layer}.{name}" for layer in layers for name in ("W_V", "W_O"))]
        for name in behind:
            if name in first and not all(np.array_equal(first[name], weights[name]) for weights in checkpoints):
                self._found.add(name)

    @property
    def names(self) -> list[str]:
        """The tensors behind the codebooks that are not the same in all checkpoints, sorted."""
        return sorted(self._found)


def _parts(steps: Sequence[int], probe: Probe, bases: Sequence[Basis], ways: int) -> list[Iterator[Row]]:
    """List the parts of a memory's rows, in their order; each is read when it is first asked, in whatever thread."""
    parts: list[Iterator[Row]] = []
    for association in probe.associations:
        parts += [_readings_rows(steps, probe, association, basis, ways) for basis in bases]
        parts.append(_share_rows(steps, probe, association))
    if probe.associations and probe.associations[0].name == "all":
        parts.append(_rank_rows(steps, probe))
    return parts


def _readings_rows(
    steps: Sequence[int], probe: Probe, association: Association, basis: Basis, ways: int
) -> Iterator[Row]:
    layer, name, count = probe.memory.circuit.layer, association.name, len(association.queries)
    drawn = min(ways, int(association.choices.min()))
    values = readings(probe.memory, association, basis, probe.scale, drawn)
    for metric in METRICS:
        chance = chance_level(metric, association, drawn)
        for step, value in _each(steps, values[metric]):
            yield step, probe.name, layer, probe.head, basis, metric, name, value, chance, count


def _share_rows(steps: Sequence[int], probe: Probe, association: Association) -> Iterator[Row]:
    circuit, name, count = probe.memory.circuit, association.name, len(association.queries)
    chance = 1 / (circuit.width[0] * circuit.width[1])
    for step, value in _each(steps, frobenius_share(probe.memory, association)):
        yield step, probe.name, circuit.layer, probe.head, "raw", "frobenius_share", name, value, chance, count


def _rank_rows(steps: Sequence[int], probe: Probe) -> Iterator[Row]:
    # A Gaussian d x d' matrix has a participation ratio of d d' / (d + d'), by its first two Marchenko-Pastur moments.
    circuit, (d_in, d_out) = probe.memory.circuit, probe.memory.circuit.width
    chance = d_in * d_out / (d_in + d_out) if circuit.left.shape[-1] >= min(d_in, d_out) else float("nan")
    for step, value in _each(steps, circuit.effective_rank()):
        yield step, probe.name, circuit.layer, probe.head, "raw", "effective_rank", "all", value, chance, d_in * d_out


def _spread_rows(step: int, memory: AssociativeMemory, head: str, scale: float) -> Iterator[Row]:
    queries, candidates = np.arange(len(memory.inputs)), np.arange(len(memory.outputs))
    variance = np.concatenate([scores.var(-1) for _, scores in memory.blocks(queries, candidates)])
    value = scale * float(np.sqrt(variance.mean()))
    yield step, memory.name, memory.circuit.layer, head, "raw", "spread", "all", value, float("nan"), len(queries)


def _kl_rows(
    steps: Sequence[int], checkpoints: Sequence[Weights], bigram: Array, leave_out: Sequence[int]
) -> Iterator[Row]:
    memory = stacked([feed_forward_memory(weights) for weights in checkpoints])
    scores = memory.scores()
    uniform = float(feed_forward_kl(np.zeros(scores.shape[-2:]), bigram, leave_out))
    name = "all but triggers" if len(leave_out) else "all"
    for step, value in _each(steps, feed_forward_kl(scores, bigram, leave_out)):
        count = len(bigram) - len(set(leave_out))
        yield step, "feed_forward_memory", memory.circuit.layer, "", "raw", "kl", name, value, uniform, count


def _each(steps: Sequence[int], values: Array) -> Iterator[tuple[int, float]]:
    return zip(steps, np.broadcast_to(values, len(steps)).tolist(), strict=True)


def _table(rows: Sequence[Row]) -> pd.DataFrame:
    import pandas as pd

    if not rows:
        raise BirthlensError("There is no checkpoint to read; give at least one (step, weights).")
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["step", "memory"], kind="stable", ignore_index=True)
