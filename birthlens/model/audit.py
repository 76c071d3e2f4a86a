"""What is suspicious about the labels of a series of checkpoints, and how strongly.

Series are known to be published with checkpoints under wrong steps. A finding has a strength from 0 to 1:

    equal           two steps hold the same weights: 1
    order           a step lies elsewhere on the path through the weights. With d the distance of two checkpoints, a step
                    costs d(before, it) + d(it, after) - d(before, after); the strength is the share of that cost that the
                    best other place would save
    initialisation  gains and biases are constants in an untrained model: the share of them that are none at step 0, or
                    that are in a later step
    foreign         a step is less similar to its neighbours (cosine of the matrices) than they are to each other, or than
                    the next pair is: 1 - similarity / expected similarity
    missing         steps are absent from a regular grid (even, or powers of two): the share of intervals that keep to it
    config, tokenizer, tensors
                    they differ from those of the most steps: 1

Distances are estimated from samples of the tensors that change in the series. A series in the right order can be called
suspicious where the path of training turns back, and one in reverse order is seen by its initialisation only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.model.fingerprints import Fingerprint, fingerprint
from birthlens.model.series import Series
from birthlens.shapes import Float, Int

if TYPE_CHECKING:
    import pandas as pd

Finding = tuple[str, int, int | None, float, str]
FAINT = 0.25
"""Findings that are weaker than this are left out."""
_SIMILAR = 0.5
"""Similarity that neighbours must have for a third to be called foreign."""


def audit_table(series: Series) -> pd.DataFrame:
    """Audit a series, one checkpoint after another: columns kind, step, other (step), strength, finding; strongest first.

    Raises:
        BirthlensError: for a series of one step, and where a directory holds no model or is damaged.
    """
    import pandas as pd

    if len(series.steps) < 2:
        raise BirthlensError(f"{series.path} is a series of one step; an audit compares at least two.")
    prints = {step: fingerprint(directory) for step, directory in series.directories.items()}
    found = [*_mixed(prints), *_missing(series.steps)]
    if not any(kind == "tensors" for kind, *_ in found):
        found += _of_weights(prints)
    strong = sorted((one for one in found if one[3] >= FAINT), key=lambda one: (-one[3], one[1]))
    return pd.DataFrame(strong, columns=["kind", "step", "other", "strength", "finding"]).astype({"other": "Int64"})


def _of_weights(prints: dict[int, Fingerprint]) -> Iterator[Finding]:
    twins = list(_equal(prints))
    yield from twins
    doubled = {step for one in twins for step in (one[1], one[2])}
    single = {step: one for step, one in prints.items() if step not in doubled}
    steps = np.array(list(single))
    if len(steps) < 3:
        yield from _initialisation(prints)
        return
    moving = _moving(single)
    products = _products(single, moving)
    foreign = list(_foreign(steps, products))
    yield from foreign
    if not foreign:
        yield from _order(steps, products)
    yield from _initialisation(prints)


def _equal(prints: dict[int, Fingerprint]) -> Iterator[Finding]:
    first: dict[tuple[bytes, ...], int] = {}
    for step, one in prints.items():
        digests = tuple(one.tensors[name].digest for name in sorted(one.tensors))
        if digests in first:
            yield "equal", step, first[digests], 1.0, f"Steps {first[digests]} and {step} hold the same weights."
        first.setdefault(digests, step)


def _moving(prints: dict[int, Fingerprint]) -> list[str]:
    """Return the names of the tensors that are not the same in every checkpoint."""
    first, *others = prints.values()
    return [name for name, one in first.tensors.items() if any(o.tensors[name].digest != one.digest for o in others)]


def _products(prints: dict[int, Fingerprint], names: Iterable[str]) -> Float[np.ndarray, "step step"]:
    """Return the inner products of the matrices of every two checkpoints, estimated from the samples."""
    total = np.zeros((len(prints), len(prints)))
    for name in names:
        tensors = [one.tensors[name] for one in prints.values()]
        if len(tensors[0].shape) > 1:
            samples = np.stack([tensor.sample.astype(np.float64) for tensor in tensors])
            total += tensors[0].weight * samples @ samples.T
    return total


def _order(steps: Int[np.ndarray, "step"], products: Float[np.ndarray, "step step"]) -> Iterator[Finding]:
    squares = np.diag(products)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
    count = len(steps)
    for place in range(count):
        rest = [other for other in range(count) if other != place]
        costs = [distance[place, rest[0]]]
        costs += [distance[a, place] + distance[place, b] - distance[a, b] for a, b in pairwise(rest)]
        costs.append(distance[rest[-1], place])
        best = int(np.argmin(costs))
        if best != place and costs[place] > 0:
            strength = float(1 - max(costs[best], 0) / costs[place])
            lower = int(steps[rest[max(best - 1, 0)]])
            upper = int(steps[rest[min(best, len(rest) - 1)]])
            lies = f"between steps {lower} and {upper}"
            lies = f"before step {upper}" if best == 0 else f"behind step {lower}" if best == len(rest) else lies
            yield (
                "order", int(steps[place]), None, strength,
                f"By distances between weights, step {steps[place]} lies {lies}.",
            )  # fmt: skip


def _foreign(steps: Int[np.ndarray, "step"], products: Float[np.ndarray, "step step"]) -> Iterator[Finding]:
    norms = np.sqrt(np.diag(products))
    similar = products / np.maximum(np.outer(norms, norms), 1e-300)
    last = len(steps) - 1
    for place in range(len(steps)):
        near = [other for other in (place - 1, place + 1) if 0 <= other <= last]
        pair = tuple(near) if len(near) == 2 else ((1, 2) if place == 0 else (last - 2, last - 1))
        expected = float(similar[pair])
        own = float(max(similar[place, other] for other in near))
        if expected > _SIMILAR and own < expected / 2:
            a, b = (int(steps[one]) for one in pair)
            yield (
                "foreign", int(steps[place]), int(steps[near[-1]]), 1 - max(own, 0.0) / expected,
                f"Step {steps[place]} has similarity {own:.2f} with its nearest neighbour, while steps {a} and {b} have "
                f"{expected:.2f}: it may be of another run.",
            )  # fmt: skip


def _initialisation(prints: dict[int, Fingerprint]) -> Iterator[Finding]:
    names = [name for name in _moving(prints) if len(next(iter(prints.values())).tensors[name].shape) == 1]
    if not names:
        return
    shares = {step: float(np.mean([one.tensors[name].constant for name in names])) for step, one in prints.items()}
    first = min(shares)
    of = f"of the {len(names)} gains and biases"
    if first == 0 and shares[0] < 1:
        yield (
            "initialisation", 0, None, 1 - shares[0],
            f"Step 0 looks trained: {1 - shares[0]:.0%} {of} are not constant, as they are before training.",
        )  # fmt: skip
    for step, share in shares.items():
        if step != first and share > 0 and share > shares[first]:
            yield (
                "initialisation", step, first, share,
                f"Step {step} looks untrained: {share:.0%} {of} are constant, of step {first} {shares[first]:.0%}.",
            )  # fmt: skip


def _missing(steps: list[int]) -> Iterator[Finding]:
    gaps = np.diff(steps)
    gap, count = Counter(gaps.tolist()).most_common(1)[0]
    if count >= 3:
        kept = np.flatnonzero(gaps == gap)
        start = int(kept[0])  # what comes before and behind may be another grid
        even = gaps[start : kept[-1] + 1]
        share = float(np.mean(even == gap))
        for place in np.flatnonzero((even != gap) & (even % gap == 0)):
            low, high = steps[start + place], steps[start + place + 1]
            absent = list(range(low + gap, high, gap))
            yield "missing", high, low, share, f"{_listed(absent)} missing: other steps are {gap} apart."
    early = [step for step in steps if step > 0 and step & (step - 1) == 0]
    powers = [high // low for low, high in pairwise(early)]
    if powers.count(2) >= 3 and _are_neighbours(steps, early):
        share = powers.count(2) / len(powers)
        for (low, high), ratio in zip(pairwise(early), powers, strict=True):
            if ratio > 2:
                absent = [low * 2**power for power in range(1, ratio.bit_length() - 1)]
                yield "missing", high, low, share, f"{_listed(absent)} missing among the powers of two."


def _are_neighbours(steps: list[int], chosen: list[int]) -> bool:
    """Return whether no other step stands between the chosen ones."""
    return steps[steps.index(chosen[0]) : steps.index(chosen[-1]) + 1] == chosen


def _listed(absent: list[int]) -> str:
    text = ", ".join(map(str, absent[:4])) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
    return f"Step {text} is" if len(absent) == 1 else f"Steps {text} are"


def _mixed(prints: dict[int, Fingerprint]) -> Iterator[Finding]:
    for kind, described in (
        ("config", {step: one.config for step, one in prints.items()}),
        ("tokenizer", {step: one.tokenizer for step, one in prints.items()}),
        ("tensors", {step: {n: list(t.shape) for n, t in one.tensors.items()} for step, one in prints.items()}),
    ):
        spelled = {step: json.dumps(value, sort_keys=True, default=str) for step, value in described.items()}
        usual = Counter(spelled.values()).most_common(1)[0][0]
        example = next(step for step, text in spelled.items() if text == usual)
        for step, text in spelled.items():
            if text != usual:
                one, other = described[step], described[example]
                keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
                what = shown(", ".join(keys), 120)
                said = {
                    "config": f"config.json of step {step} and of step {example} differ in {what}.",
                    "tokenizer": f"The tokenizers of step {step} and of step {example} differ in {what}.",
                    "tensors": f"The tensors of step {step} and of step {example} differ in {what}.",
                }
                yield kind, step, example, 1.0, said[kind]
