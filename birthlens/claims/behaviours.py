"""Statistics of what models do: how fast, how well, with which heads, and where those look."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from birthlens import forward
from birthlens.analysis.ablation import ablation_table
from birthlens.analysis.attention import attention_table
from birthlens.analysis.behaviour import summary
from birthlens.analysis.excess import floors_table
from birthlens.analysis.references import reference_table
from birthlens.analysis.trajectory import evaluation_batch, memories_over
from birthlens.analysis.transplant import by_forward
from birthlens.claims.claim import Evidence
from birthlens.config import TaskConfig
from birthlens.errors import BirthlensError
from birthlens.runs import Run
from birthlens.task import BigramTask, TokenBatch

Array = np.ndarray
IN_CONTEXT = "in_context_unabsorbed"
"""Accuracies leave absorbed positions out: they are free copies."""


def held_out(run: Run, metric: str) -> tuple[Float[Array, "step"], Float[Array, "step"]]:
    """Return steps and values of a held-out measurement.

    Raises:
        BirthlensError: where the run never measured it.
    """
    table = run.metrics()
    rows = table[(table["split"] == "held_out") & (table["metric"] == metric)].sort_values("step")
    if rows.empty:
        raise BirthlensError(f"{run.path} has no held-out {metric}; its evaluation batch holds no such position.")
    return rows["step"].to_numpy(dtype=float), rows["value"].to_numpy(dtype=float)


def first_crossing(steps: Float[Array, "step"], values: Float[Array, "step"], level: float) -> float:
    """Return when the values first get over a level, by linear interpolation; the last step where they never do.

    Example:
        >>> first_crossing(np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.2, 0.6]), 0.4)
        15.0
    """
    above = np.flatnonzero(values >= level)
    if not len(above):
        return float(steps[-1])
    i = int(above[0])
    if i == 0:
        return float(steps[0])
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def reached(evidence: Evidence) -> dict[str, float]:
    """Return the held-out in-context accuracy at a step."""
    steps, values = held_out(evidence.runs["run"], "in_context_accuracy")
    return {"accuracy": float(values[np.searchsorted(steps, evidence.settings["step"])])}


def emergence(run: Run, level: float = 0.5) -> float:
    """Return the step at which the held-out in-context accuracy gets over a level."""
    return first_crossing(*held_out(run, f"{IN_CONTEXT}_accuracy"), level)


def global_first(evidence: Evidence) -> dict[str, float]:
    """Say when the global and the in-context loss have gone half-way from log N to their floors.

    `in_context_after_global` is the difference in steps; `kl_half` is when KL(bigram || W_F) has halved.
    """
    run = evidence.runs["run"]
    floors = floors_table(run.task, evaluation_batch(run)).set_index("role")["floor"]
    uniform, halves = math.log(len(run.statistics)), {}
    for role in ("global", "in_context"):
        steps, loss = held_out(run, f"{role}_loss")
        halves[role] = first_crossing(steps, -loss, -(uniform + float(floors[role])) / 2)
    kl = memories_over(run, bases=("raw",))
    kl = kl[kl["metric"] == "kl"].sort_values("step")
    half = first_crossing(kl["step"].to_numpy(float), -kl["value"].to_numpy(), -float(kl["chance"].iloc[0]) / 2)
    return {
        "in_context_after_global": halves["in_context"] - halves["global"],
        "global": halves["global"],
        "in_context": halves["in_context"],
        "kl_half": half,
        "accuracy": float(held_out(run, f"{IN_CONTEXT}_accuracy")[1][-1]),
    }


def against_the_bag(evidence: Evidence) -> dict[str, float]:
    """Compare the best accuracy of one layer, and the last of two, with the predictor that is blind to order."""
    one, two = evidence.runs["one layer"], evidence.runs["two layers"]
    batch = two.task.batch(two.config.evaluation.batch_size, two.config.seeds.evaluation + evidence.seed)
    table = reference_table(two.task, batch, ["bag"]).set_index(["role", "metric"])["value"]
    ceiling = float(table["in_context", "accuracy"])
    best = float(held_out(one, "in_context_accuracy")[1].max())
    last = float(held_out(two, "in_context_accuracy")[1][-1])
    return {"one_over_bag": best - ceiling, "two_over_bag": last - ceiling, "one": best, "two": last, "bag": ceiling}


def out_of_distribution(evidence: Evidence) -> dict[str, float]:
    """Test runs that were trained on uniform and on bigram outputs on both kinds of output."""
    found = {}
    for trained, run in evidence.runs.items():
        for tested in ("uniform", "bigram"):
            task = BigramTask(run.config.task.changed(outputs=tested), run.statistics)
            found[f"{trained}_on_{tested}"] = tested_on(run, task, evidence.seed)
    found["gain"] = found["uniform_on_uniform"] - found["bigram_on_uniform"]
    return found


def unseen_outputs(evidence: Evidence) -> dict[str, float]:
    """Test a run trained on a part of the tokens as outputs on outputs that it never saw."""
    run, found = evidence.runs["run"], {}
    for split in ("train", "test"):
        task = BigramTask(TaskConfig(**{**run.config.task.model_dump(), "split": split}), run.statistics)
        found[f"on_{split}"] = tested_on(run, task, evidence.seed)
    return {**found, "lost": found["on_train"] - found["on_test"]}


def tested_on(run: Run, task: BigramTask, seed: int, sequences: int = 256) -> float:
    """Return the in-context accuracy of a run's last weights on fresh sequences of any task of its vocabulary."""
    batch = task.batch(sequences, run.config.seeds.evaluation + seed, 1)
    loss, prediction = by_forward(run.weights(-1), batch)
    return summary(loss, prediction, batch)[IN_CONTEXT, "accuracy"][0]


def slower(evidence: Evidence) -> dict[str, float]:
    """Compare when two runs get over half accuracy: in steps, and in in-context targets seen until then."""
    fast, slow = evidence.runs["fast"], evidence.runs["slow"]
    steps = {"fast": emergence(fast), "slow": emergence(slow)}
    targets = {name: steps[name] * targets_per_step(run) for name, run in (("fast", fast), ("slow", slow))}
    return {
        "steps_later": steps["slow"] - steps["fast"],
        "steps_ratio": steps["slow"] / steps["fast"],
        "targets_ratio": targets["slow"] / targets["fast"],
        **{f"steps_{name}": value for name, value in steps.items()},
    }


def speed(evidence: Evidence) -> dict[str, float]:
    """Return how soon one run gets over half accuracy, in steps, tokens and in-context targets, and how far it gets."""
    run = evidence.runs["run"]
    steps = emergence(run)
    return {
        "accuracy at the end": float(held_out(run, f"{IN_CONTEXT}_accuracy")[1][-1]),
        "steps to half accuracy": steps,
        "tokens to half accuracy": steps * run.config.training.batch_size * run.config.task.context,
        "targets to half accuracy": steps * targets_per_step(run),
    }


def targets_per_step(run: Run, sequences: int = 256) -> float:
    """Return how many in-context targets a training batch holds on average."""
    share = float(evaluation_batch(run, sequences).in_context.double().mean())
    return share * run.config.training.batch_size * run.config.task.context


def heads_removed(evidence: Evidence) -> dict[str, float]:
    """Ablate each head at the end: what the in-context accuracy and the global loss lose."""
    run, method = evidence.runs["run"], evidence.settings["method"]
    tasks = run.config.seeds.evaluation + evidence.seed
    batch, reference = (run.task.batch(128, tasks, index) for index in (1, 2))
    metrics = [f"{IN_CONTEXT}.accuracy", "global.loss", "global.accuracy"]
    table = ablation_table(
        [(run.steps[-1], run.weights(-1))], batch, reference, "all", [method], metrics=metrics, draws=0
    )
    value = table.set_index(["ablated", "role", "metric"])["value"]
    found = {"accuracy": float(value["none", IN_CONTEXT, "accuracy"])}
    for name, head in (("prev_token", "L0H0"), ("induction", "L1H0")):
        found[f"accuracy_without_{name}"] = float(value[head, IN_CONTEXT, "accuracy"])
        found[f"share_lost_without_{name}"] = 1 - found[f"accuracy_without_{name}"] / found["accuracy"]
        found[f"global_loss_without_{name}"] = float(value[head, "global", "loss"] - value["none", "global", "loss"])
    return found


def early_copies(evidence: Evidence) -> dict[str, float]:
    """Ask how far the previous-token head reaches, and where the induction head finds its copies, at the end.

    `attention_early`, `attention_late`: attention of layer 0 from t to t - 1, in the first and last quarter of positions.
    `used_early`: share of right in-context predictions whose most attended position lies in the first quarter.
    `accuracy_with`, `accuracy_without`: accuracy at in-context targets in the last half of the context, whose trigger has or
    has not been seen with its output in the first quarter.
    """
    run = evidence.runs["run"]
    batch = run.task.batch(evidence.settings.get("sequences", 64), run.config.seeds.evaluation + evidence.seed, 1)
    tensors, quarter = forward.tensors_of(run.weights(-1)), run.config.task.context // 4
    to_previous, used, has, right = [], [], [], []
    with torch.inference_mode():
        for part in batch.chunks(16):
            seen = forward.activations(tensors, run.config.model, part.tokens)
            to_previous.append(seen.patterns[0][:, 0].diagonal(-1, dim1=1, dim2=2).double().mean(0))
            used.append(seen.patterns[1][:, 0].argmax(-1) < quarter)
            right.append(seen.logits.argmax(-1) == part.targets)
            has.append(_seen_before(part, quarter))
    early, correct, early_copy = torch.cat(used), torch.cat(right), torch.cat(has)
    profile = torch.stack(to_previous).mean(0)
    asked = batch.in_context & ~batch.absorbed
    late = asked & (torch.arange(asked.shape[1]) >= 2 * quarter)
    found = {
        "attention_early": float(profile[: quarter - 1].mean()),
        "attention_late": float(profile[-quarter:].mean()),
        "used_early": _share(early, asked & correct),
        "accuracy": _share(correct, asked),
        "accuracy_with": _share(correct, late & early_copy),
        "accuracy_without": _share(correct, late & ~early_copy),
        "share_with": _share(early_copy, late),
    }
    found["attention_drop"] = found["attention_early"] - found["attention_late"]
    found["accuracy_gain"] = found["accuracy_with"] - found["accuracy_without"]
    return found


def roles(evidence: Evidence) -> dict[str, float]:
    """Say how well the best head of each layer of a two-layer model fills the two roles, at the end."""
    run = evidence.runs["run"]
    batch = run.task.batch(64, run.config.seeds.evaluation + evidence.seed, 1)
    table = attention_table([(run.steps[-1], run.weights(-1))], batch, role=IN_CONTEXT)
    best = table.groupby(["probe", "layer"])["value"].max()
    return {
        "accuracy": float(held_out(run, f"{IN_CONTEXT}_accuracy")[1][-1]),
        "previous_token_layer_0": float(best["previous_token", 0]),
        "previous_token_layer_1": float(best["previous_token", 1]),
        "induction_layer_0": float(best["induction_match", 0]),
        "induction_layer_1": float(best["induction_match", 1]),
    }


def exponent(evidence: Evidence) -> dict[str, float]:
    """Fit log(steps to half accuracy) on log(batch size) or log(context) over the cases: the slope, and that of tokens."""
    section, key = str(evidence.settings["over"]).split(".")
    runs = list(evidence.runs.values())
    sizes = np.log([float(getattr(getattr(run.config, section), key)) for run in runs])
    steps = np.array([emergence(run) for run in runs])
    tokens = steps * [run.config.training.batch_size * run.config.task.context for run in runs]
    return {"steps_exponent": _slope(sizes, np.log(steps)), "tokens_exponent": _slope(sizes, np.log(tokens))}


def _slope(x: Sequence[float] | Array, y: Array) -> float:
    return float(np.polyfit(np.asarray(x), y, 1)[0])


def _seen_before(batch: TokenBatch, end: int) -> torch.Tensor:
    """Say of each position whether its token stands, followed by its successor, in the first `end` positions."""
    early = batch.tokens[:, : end - 1]
    return (early[:, None] == batch.tokens[:, :, None]).any(-1)


def _share(what: torch.Tensor, among: torch.Tensor) -> float:
    return float(what[among].double().mean()) if bool(among.any()) else float("nan")
