"""Which data taught a memory: the change of its margin over a span of updates, as a sum over the data of those updates.

The margin of a memory is linear in the matrix W that holds it (`analysis.memories.margins`): margin = <G, W>. The loss of
batch s is the mean of losses l_p over its positions p. <G, dl_p/dW> is the derivative of l_p along G, which two passes of
autograd give for all positions at once. SGD with momentum is a linear recursion in the gradients,

    W_{t+1} = W_t - r_t v_t,     v_t = m_t v_{t-1} + g_t + w_t W_t

so over the updates from..until the gradient of batch s enters with c_s = sum_{t >= s} r_t m_{s+1} ... m_t, and

    change of the margin = - sum_s c_s <G, g_s> - sum_s c_s w_s <G, W_s> - c_from m_from <G, v_{from-1}>

The last two terms are the rows "weight decay" and "earlier batches". For AdamW the same holds with G divided by the
denominator of each entry. These denominators depend on the data too, and are taken as they were: the sum is still exact, but
removing a sequence from the data would change more than its row shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from birthlens.analysis.memories.margins import Margin, margin_of
from birthlens.analysis.memories.names import memory_named
from birthlens.analysis.memories.recall import Association
from birthlens.config import clamps as clamping
from birthlens.config.clamps import Clamp, Freeze, Reset
from birthlens.config.schedule import learning_rate
from birthlens.errors import BirthlensError
from birthlens.labels import legible
from birthlens.model.forward import activations, tensors_of
from birthlens.runs.run import Run
from birthlens.shapes import Float
from birthlens.tasks.parts import NUMBERED, By, RarestRoles, part_names
from birthlens.training.forking import trainer_at
from birthlens.training.loop import Draw, Trainer

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
COLUMNS = ("memory", "matrix", "from", "until", "by", "part", "n", "value")
ENTRIES = 1 << 24
"""The largest number of entries of attention patterns in memory at once."""


def data_attribution_table(
    run: Run, memory: str, start: int, stop: int, by: By = "role", every: int | None = None
) -> pd.DataFrame:
    """Tabulate which data changed the margin of a memory over the updates from step `start` to step `stop`.

    Columns: memory, matrix, from, until, by, part, n (positions with a loss), value (nats of the margin). The rows of a
    grouping, "weight decay" and "earlier batches" (by: optimiser) sum, up to rounding, to the row "change" (by: total),
    which is computed from the weights themselves. `every` divides the span into windows of this many updates, each with
    its own sum.

    A memory is one of the task's, or a name as for `memory_named`. With `by="role"` a position counts under the rarest
    of its roles. If some positions of a role count under a rarer one, the others are shown as the rest of the role.

    Raises:
        BirthlensError: for steps outside the run, a memory that it does not have or train, and spans in which a clamp
            writes the matrix or changes the forward pass.
    """
    import pandas as pd

    last = run.steps[-1]
    if last == run.steps[0]:
        raise BirthlensError(f"{run.path} has one step, {last}, and so no update whose data could be attributed.")
    if not run.steps[0] <= start < stop <= last:
        raise BirthlensError(
            f"from = {start}, until = {stop}: the span must lie in steps {run.steps[0]} to {last} of {run.path} and hold "
            "at least one update."
        )
    if every is not None and every < 1:
        raise BirthlensError(f"every = {every}: a window must have at least one update.")
    trainer = trainer_at(run, start)
    labels = [legible(token) for token in run.statistics.vocab]
    margin = _margin(trainer, memory, labels)
    _check_clamps(run, margin.matrix, start, stop)
    edges = [*range(start, stop, every or stop - start), stop]
    windows = [_window(trainer, margin, first, end) for first, end in pairwise(edges)]
    roles = (
        RarestRoles([(draw.batch, draw.mask) for window in windows for draw in window.draws]) if by == "role" else None
    )
    rows: list[tuple[object, ...]] = []
    for window in windows:
        head = (memory, margin.matrix, window.start, window.stop)
        groups: dict[str, list[float]] = {}
        for step, (draw, values) in enumerate(zip(window.draws, window.values, strict=True), start=window.start):
            if roles is not None:
                names = roles.names(draw.batch, draw.mask)
            else:
                names = part_names(by, step, draw.batch, draw.mask, labels)
            for name, value in zip(names, values.tolist(), strict=True):
                groups.setdefault(name, []).append(value)
        ordered = sorted(groups, key=int) if by in NUMBERED else groups
        rows += [(*head, by, name, len(groups[name]), float(np.sum(groups[name]))) for name in ordered]
        rows += [(*head, "optimiser", name, 0, value) for name, value in window.others.items()]
        rows.append((*head, "total", "change", sum(map(len, groups.values())), window.change))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass(frozen=True, eq=False)
class _Update:
    """One update: the weights before it, its data, its settings, and the denominators of AdamW (None for SGD)."""

    tensors: dict[str, Array]
    draw: Draw
    applied: bool
    rate: float
    denominator: Array | None


@dataclass(frozen=True, eq=False)
class _Window:
    """The data of a span's updates, the contribution of each of their positions to the margin, and the rest."""

    start: int
    stop: int
    draws: list[Draw]
    values: list[Array]
    others: dict[str, float]
    change: float


def _margin(trainer: Trainer, name: str, labels: Sequence[str]) -> Margin:
    """Return the margin of a memory with the codebooks of the trainer's current weights."""
    weights = trainer.weights()
    triggers = trainer.task.fixed_triggers
    expected = {each.name: each for each in trainer.task.memories}
    if name in expected:
        memory, _ = memory_named(weights, expected[name].circuit, labels)
        pairs = zip(expected[name].queries, expected[name].answers, strict=True)
        association: Association | None = Association.of(pairs, range(len(memory.outputs)))
    else:
        memory, association = memory_named(weights, name, labels, None if triggers is None else triggers.tolist())
    if association is None:
        raise BirthlensError(
            f"memory = {name!r}: no answers are known for it, so it has no margin; "
            f"name another, such as {', '.join([*expected, 'output_memory'])}."
        )
    return margin_of(weights, memory, association, trainer.config.trained)


def _check_clamps(run: Run, matrix: str, start: int, stop: int) -> None:
    """Raise BirthlensError if a clamp acts in the span in a way that no data explain."""
    span = Clamp(start=start, stop=stop + 1)
    for clamp in run.config.training.clamps:
        if isinstance(clamp, clamping.FORWARD) and clamp.overlaps(span):
            raise BirthlensError(
                f"clamp '{clamp}' changes the forward pass in steps {start} to {stop}; choose another span."
            )
        touches = isinstance(clamp, Reset) and clamp.matrix is None
        touches = touches or (getattr(clamp, "matrix", None) == matrix and not isinstance(clamp, Freeze))
        once = isinstance(clamp, Reset) or (isinstance(clamp, clamping.Add) and not clamp.held)
        if touches and (start < clamp.start <= stop if once else clamp.overlaps(span)):
            raise BirthlensError(f"clamp '{clamp}' writes {matrix} in steps {start} to {stop}; choose another span.")


def _window(trainer: Trainer, margin: Margin, start: int, stop: int) -> _Window:
    """Train from one step to another and split the change of the margin."""
    name = margin.matrix
    before = _momentum(trainer, name)
    updates = [_one_update(trainer, name) for _ in range(start, stop)]
    after = trainer.engine.tensors()[name]
    change = margin.of(after.astype(np.float64) - updates[0].tensors[name])
    values: list[Array] = [np.zeros(0)] * len(updates)
    decay = 0.0
    reach = np.zeros_like(margin.direction)  # what the margin loses for each unit of momentum after an update
    for number in reversed(range(len(updates))):
        update = updates[number]
        values[number] = np.zeros(int(update.draw.mask.sum()))
        if not update.applied:
            continue
        settings = update.draw.config.optimiser
        now = update.tensors[name].astype(np.float64)
        if update.denominator is None:
            reach = reach + update.rate * margin.direction
            gradient = reach
            decay -= settings.weight_decay * float(np.vdot(reach, now))
            kept = settings.momentum
        else:
            reach = reach + update.rate * margin.direction / update.denominator
            gradient = (1 - settings.betas[0]) * reach
            decay -= update.rate * settings.weight_decay * margin.of(now)
            kept = settings.betas[0]
        values[number] = (
            -position_derivatives(trainer, update.tensors, update.draw, {name: gradient}) / values[number].size
        )
        reach = kept * reach
    others = {"weight decay": decay, "earlier batches": -float(np.vdot(reach, before))}
    return _Window(start, stop, [update.draw for update in updates], values, others, change)


def _momentum(trainer: Trainer, name: str) -> Float[Array, "..."]:
    """Return the optimiser's running mean of the gradients of a matrix, zero if it has none."""
    parameter = trainer.engine.parameters[name]
    state = trainer.optimiser.state.get(parameter, {})
    found = state.get("momentum_buffer", state.get("exp_avg"))
    array = np.zeros(tuple(parameter.shape)) if found is None else found.detach().cpu().numpy()
    return np.asarray(array, dtype=np.float64)


def _one_update(trainer: Trainer, name: str) -> _Update:
    """Take one update of the run, and record what it was made from."""
    draw = trainer.draw()
    rate = learning_rate(draw.config, trainer.step)
    tensors = trainer.engine.tensors()
    applied = bool(draw.mask.any()) and name not in trainer.resting(draw.config)
    trainer.update()
    denominator = None
    if draw.config.optimiser.kind == "adamw" and applied:
        state = trainer.optimiser.state[trainer.engine.parameters[name]]
        count = float(state["step"])
        first, second = draw.config.optimiser.betas
        scale = np.sqrt(state["exp_avg_sq"].double().numpy()) / np.sqrt(1 - second**count)
        denominator = (scale + 1e-8) * (1 - first**count)
    return _Update(tensors, draw, applied, rate, denominator)


def position_derivatives(
    trainer: Trainer, tensors: dict[str, Array], draw: Draw, along: dict[str, Array]
) -> Float[Array, "place"]:
    """Return the derivative of the loss at each position of the mask, in row-major order, along a change of weights.

    `tensors` are trained weights, `along` the direction of change of some of them.
    """
    config = trainer.config.model
    weights = {**tensors_of(trainer.initial), **{name: torch.from_numpy(array) for name, array in tensors.items()}}
    tangents = {name: torch.from_numpy(np.ascontiguousarray(g, dtype=np.float32)) for name, g in along.items()}
    length = draw.batch.tokens.shape[1]
    heads = max(1, config.n_heads)
    size = max(1, ENTRIES // (length * length * heads))
    found = []
    for first in range(0, len(draw.batch), size):
        part = draw.batch[first : first + size]
        mask = draw.mask[first : first + size]
        length_of_step = torch.zeros((), requires_grad=True)
        moved = {name: weights[name] + length_of_step * tangent for name, tangent in tangents.items()}
        logits = activations({**weights, **moved}, config, part.tokens).logits[mask]
        loss = -functional.log_softmax(logits, -1).gather(-1, part.targets[mask][:, None])[:, 0]
        # Reverse mode twice: the first pass gives sum_p u_p dl_p, which the second differentiates with respect to each u_p.
        weight = torch.zeros_like(loss, requires_grad=True)
        (total,) = torch.autograd.grad(loss, length_of_step, weight, create_graph=True)
        found.append(torch.autograd.grad(total, weight)[0] if len(loss) else loss.detach())
    return np.asarray(torch.cat(found).double().numpy())
