"""The ledger across checkpoints: what each matrix is made of, as tidy tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from birthlens.analysis.memories.circuits import INDUCTION_HEAD, PREV_TOKEN_HEAD
from birthlens.analysis.memories.ledger import RESIDUAL, Ledger
from birthlens.analysis.memories.ledger_factors import factor_ledger
from birthlens.analysis.memories.ledger_nulls import NULLS, Derangements, Nulls
from birthlens.analysis.memories.memory import Array, Circuit
from birthlens.analysis.memories.paper_ledgers import paper_circuits, paper_ledgers
from birthlens.analysis.memories.recall_tables import Moving
from birthlens.errors import BirthlensError
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.shapes import Float

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 20
CIRCUIT = "circuit"
"""The reading of a memory as the product of its two matrices; the other reading is the trained matrix, under its name."""
_TRAINED = {"prev_token_memory": "W_K", "trigger_memory": "W_K", "output_memory": "W_O", "feed_forward_memory": "W_F"}
_NULL_COLUMNS = [f"null_{name}" for name in NULLS]
COLUMNS = ["step", "matrix", "family", "kind", "share", "alone", "coefficient", "coefficient_std", "n"]
COLUMNS += [*_NULL_COLUMNS, "null_derangement", "null_derangement_95"]


def ledger_table(
    matrices: Iterable[tuple[int, Float[Array, "d_in d_out"]]],
    ledger: Ledger,
    name: str,
    minus: Float[Array, "d_in d_out"] | None = None,
    draws: int = 20,
    generator: np.random.Generator | None = None,
) -> pd.DataFrame:
    """Build the ledger of one matrix at every checkpoint, given as (step, matrix); `minus` (W_init) is subtracted first.

    Columns: step, matrix, family, kind ("association", "cell", "residual"), share (of the squared norm; they sum to 1 at
    each step, ready for a stacked area chart), alone (what the association explains without the others), coefficient and
    coefficient_std (over the family's pairs), n (pairs; dimensions of a cell; entries for the residual), null_rank,
    null_rows, null_columns (expected by chance, see `ledger_nulls`), null_derangement and null_derangement_95 (mean and 95 %
    quantile of `alone` over `draws` wrong pairings, drawn from `generator`; NaN without one). A zero matrix has shares NaN.
    """
    import pandas as pd

    nulls = Nulls.of(ledger)
    wrong = {
        family.name: Derangements.of(ledger, family, draws, generator)
        for family in ledger.families
        if generator is not None and len(family.association.queries) > 1
    }
    rows: list[list[object]] = []
    iterator = iter(matrices)
    with threadpool_limits(1):  # see recall_tables.memory_series
        while chunk := list(islice(iterator, _CHUNK)):
            stack = np.stack([np.asarray(matrix, dtype=np.float64) for _, matrix in chunk])
            stack = stack if minus is None else stack - minus
            rows += _rows(ledger, [step for step, _ in chunk], name, stack, nulls.shares(stack), wrong)
    if not rows:
        raise BirthlensError(f"ledger of {name}: there is no checkpoint to read; give at least one (step, matrix).")
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("step", kind="stable", ignore_index=True)


def entries_table(ledger: Ledger, matrix: Float[Array, "d_in d_out"]) -> pd.DataFrame:
    """List every association's own coefficient (joint least squares) at one checkpoint.

    Columns: family, input, output (labels), coefficient.
    """
    import pandas as pd

    found = ledger.coefficients(matrix)
    return pd.DataFrame(
        [
            (f.name, ledger.inputs[f.inputs].labels[query], ledger.outputs[f.outputs].labels[right], float(value))
            for f in ledger.families
            for (query, right), value in zip(f.association.pairs, found[f.name], strict=True)
        ],
        columns=["family", "input", "output", "coefficient"],
    )


def paper_ledger_table(
    checkpoints: Iterable[tuple[int, Weights]],
    triggers: Sequence[int] | None = None,
    minus_initial: bool = True,
    draws: int = 20,
    generator: np.random.Generator | None = None,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
    cells: bool = True,
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
    told: Callable[[str], None] = lambda memory: None,
) -> pd.DataFrame:
    """Split the matrices of `paper_ledgers` at every checkpoint; `minus_initial` subtracts their value at the first one.

    Columns as in `ledger_table`, with reading after matrix. A memory is a product of two matrices, one of which is trained:

        "L1.W_O"   the trained matrix, between the codebooks on its own sides (`ledger_factors`)
        "circuit"  the product W_V W_O or W_Q W_K^T; left out if it is the trained matrix itself, because W_Q is the identity

    `told` is called with the name of each memory before it is read, which takes seconds from about 1,000 tokens on.

    The shares of the two readings differ, so state which one a number belongs to. The ledgers are those of the first
    checkpoint. attrs["left_out"] names the memories without rows: the linear feed-forward if `bigram` is not given.
    attrs["moving_partners"] names the memories that have the circuit only, because their other matrix changes too.

    Raises:
        BirthlensError: if a codebook moves between checkpoints (trained embeddings); each then needs a ledger of its own.
    """
    import pandas as pd

    read = list(checkpoints)
    if not read:
        raise BirthlensError("There is no checkpoint to read; give at least one (step, weights).")
    first = read[0][1]
    moving = Moving([prev_token_head])
    for _, weights in read:
        moving.watch(weights)
    if moving.names:
        raise BirthlensError(
            f"{', '.join(moving.names)} moves between checkpoints, so one ledger cannot be used for all of them: "
            "call ledger_table for each checkpoint with its own codebooks (paper_ledgers)."
        )
    circuits = [(step, paper_circuits(weights, prev_token_head, induction_head)) for step, weights in read]
    ledgers = paper_ledgers(first, triggers, prev_token_head, induction_head, cells, bigram)
    tables: dict[tuple[str, str], pd.DataFrame] = {}
    for name, (initial, ledger) in ledgers.items():
        told(name)
        products = [(step, found[name].matrix) for step, found in circuits]
        reading = CIRCUIT if _is_product(initial) else _trained_parameter(name, initial)
        minus = initial.matrix if minus_initial else None
        tables[name, reading] = ledger_table(products, ledger, name, minus, draws, generator)
    partners = [name for name, (initial, _) in ledgers.items() if _is_product(initial)]
    moving_partners = [
        name
        for name in partners
        if any(not np.array_equal(found[name].left, ledgers[name][0].left) for _, found in circuits)
    ]
    for name in partners:
        if name in moving_partners:
            continue
        told(name)
        initial, ledger = ledgers[name]
        trained = [(step, _right(found[name])) for step, found in circuits]
        own = factor_ledger(ledger, initial, "right")
        minus = _right(initial) if minus_initial else None
        tables[name, _trained_parameter(name, initial)] = ledger_table(trained, own, name, minus, draws, generator)
    for (_, reading), rows in tables.items():
        rows.insert(2, "reading", reading)
    order = sorted(tables, key=lambda key: (list(ledgers).index(key[0]), key[1] == CIRCUIT))
    table = pd.concat([tables[key] for key in order], ignore_index=True)
    table.attrs["left_out"] = [name for name in circuits[0][1] if name not in ledgers]
    table.attrs["moving_partners"] = moving_partners
    return table


def _is_product(circuit: Circuit) -> bool:
    """Return whether a circuit has more factors than its trained matrix; with W_Q = I, W_Q W_K^T is the trained W_K^T."""
    rows, columns = circuit.left.shape[-2:]
    return circuit.right is not None and not (rows == columns and np.array_equal(circuit.left, np.eye(rows)))


def _trained_parameter(memory: str, circuit: Circuit) -> str:
    return f"L{circuit.layer}.{_TRAINED[memory]}"


def _right(circuit: Circuit) -> Array:
    return circuit.left if circuit.right is None else circuit.right


def _rows(
    ledger: Ledger,
    steps: Sequence[int],
    name: str,
    stack: Array,
    nulls: dict[str, dict[str, Array]],
    wrong: dict[str, Derangements],
) -> list[list[object]]:
    shares = ledger.shares(stack)
    coefficients = ledger.coefficients(stack)
    deranged = {family: pairing.shares(stack) for family, pairing in wrong.items()}
    nan = float("nan")
    rows = []
    ranks = {
        f"{a} x {b}": round(float(np.trace(m) * np.trace(n)))
        for a, m in ledger.input_parts.items()
        for b, n in ledger.output_parts.items()
    }
    for i, step in enumerate(steps):

        def nulls_of(family: str, i: int = i) -> list[object]:
            return [float(np.broadcast_to(nulls[null][family], len(steps))[i]) for null in NULLS]

        for family in ledger.families:
            values = coefficients[family.name][i]
            draws = deranged.get(family.name)
            quantiles = [nan, nan] if draws is None else [float(draws[i].mean()), float(np.quantile(draws[i], 0.95))]
            share = float(shares.associations[family.name][i])
            alone = float(shares.alone[family.name][i])
            row = [step, name, family.name, "association", share, alone, float(values.mean()), float(values.std())]
            rows.append([*row, len(values), *nulls_of(family.name), *quantiles])
        for cell, values in shares.cells.items():
            row = [step, name, cell, "cell", float(values[i]), nan, nan, nan, ranks[cell]]
            rows.append([*row, *nulls_of(cell), nan, nan])
        row = [step, name, RESIDUAL, RESIDUAL, float(shares.residual[i]), nan, nan, nan, stack[i].size]
        rows.append([*row, *nulls_of(RESIDUAL), nan, nan])
    return rows
