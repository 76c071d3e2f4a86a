"""Statistics of what models do: how fast they learn, how well, and with which heads.

Steps that a run never reached are NaN; differences between steps are as in `timing.lag`.
"""

from __future__ import annotations

import math

import numpy as np

from birthlens.analysis.behaviour import births
from birthlens.analysis.behaviour.attention import attention_table
from birthlens.analysis.behaviour.excess import floors_table
from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.analysis.interventions.ablation import ablation_table
from birthlens.analysis.interventions.weight_patching import by_forward
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics.timing import first_crossing, lag, slope
from birthlens.config.task import as_bigram
from birthlens.errors import BirthlensError
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.shapes import Float
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.predictors.scores import reference_table
from birthlens.tasks.roles import summary
from birthlens.tasks.task import HELD_OUT

Array = np.ndarray
IN_CONTEXT = "in_context_unabsorbed"
"""Accuracies leave out absorbed positions, which can be copied for free."""


def held_out(run: Run, metric: str) -> tuple[Float[Array, "step"], Float[Array, "step"]]:
    """Return steps and values of a held-out measurement.

    Raises:
        BirthlensError: if the run never measured it.
    """
    steps, values = births.held_out(run.metrics(), metric)
    if not len(steps):
        raise BirthlensError(f"{run.path} has no held-out {metric}; its evaluation batch holds no such position.")
    return steps.astype(float), values


def reached(evidence: Evidence) -> dict[str, float]:
    """Return the held-out in-context accuracy at a step."""
    steps, values = held_out(evidence.runs["run"], "in_context_accuracy")
    return {"accuracy": float(values[np.searchsorted(steps, evidence.settings["step"])])}


def emergence(run: Run, level: float = 0.5) -> float:
    """Return the step at which the held-out in-context accuracy exceeds a level; NaN if it never does."""
    return first_crossing(*held_out(run, f"{IN_CONTEXT}_accuracy"), level)


def global_first(evidence: Evidence) -> dict[str, float]:
    """Return when the global and the in-context loss have fallen half-way from log N to their floors.

    `in_context_after_global` is the difference in steps (`timing.lag`). `kl_half` is the step at which KL(bigram || W_F) has
    halved.
    """
    run = evidence.runs["run"]
    floors = floors_table(run.task, evaluation_batch(run)).set_index("role")["floor"]
    uniform = math.log(len(run.statistics))
    halves = {}
    for role in ("global", "in_context"):
        steps, loss = held_out(run, f"{role}_loss")
        halves[role] = first_crossing(steps, -loss, -(uniform + float(floors[role])) / 2)
    kl = memories_over(run, bases=("raw",)).to_pandas()
    kl = kl[kl["metric"] == "kl"].sort_values("step")
    half = first_crossing(kl["step"].to_numpy(float), -kl["value"].to_numpy(), -float(kl["chance"].iloc[0]) / 2)
    last = float(run.config.training.steps)
    return {
        **lag("in_context_after_global", halves["global"], halves["in_context"], (last, last)),
        "global": halves["global"],
        "in_context": halves["in_context"],
        "kl_half": half,
        "accuracy": float(held_out(run, f"{IN_CONTEXT}_accuracy")[1][-1]),
    }


def against_the_bag(evidence: Evidence) -> dict[str, float]:
    """Compare the best accuracy of one layer, and the last accuracy of two, with the predictor that ignores order.

    The predictor is evaluated on the same batch as both runs.
    """
    one = evidence.runs["one layer"]
    two = evidence.runs["two layers"]
    batch = two.task.batch(two.config.evaluation.batch_size, two.config.seeds.evaluation, HELD_OUT)
    table = reference_table(two.task, batch, ["bag"]).set_index(["role", "metric"])["value"]
    ceiling = float(table["in_context", "accuracy"])
    best = float(held_out(one, "in_context_accuracy")[1].max())
    last = float(held_out(two, "in_context_accuracy")[1][-1])
    return {"one_over_bag": best - ceiling, "two_over_bag": last - ceiling, "one": best, "two": last, "bag": ceiling}


def out_of_distribution(evidence: Evidence) -> dict[str, float]:
    """Test a run trained on uniform outputs and one trained on bigram outputs on both kinds of output.

    `gain` is the advantage, on uniform outputs, of training on them. `gap` compares each run on the kind it has not seen.
    """
    found = {}
    for trained, run in evidence.runs.items():
        for tested in ("uniform", "bigram"):
            task = BigramTask(as_bigram(run.config.task).changed(outputs=tested), run.statistics)
            found[f"{trained}_on_{tested}"] = tested_on(run, task, evidence.seed)
    found["gain"] = found["uniform_on_uniform"] - found["bigram_on_uniform"]
    found["gap"] = found["uniform_on_bigram"] - found["bigram_on_uniform"]
    return found


def unseen_outputs(evidence: Evidence) -> dict[str, float]:
    """Test a run that was trained with some of the tokens as outputs on outputs that it never saw."""
    run = evidence.runs["run"]
    found = {}
    for split in ("train", "test"):
        task = BigramTask(as_bigram(run.config.task).changed(split=split), run.statistics)
        found[f"on_{split}"] = tested_on(run, task, evidence.seed)
    return {**found, "lost": found["on_train"] - found["on_test"]}


def tested_on(run: Run, task: BigramTask, seed: int, sequences: int = 256) -> float:
    """Return the in-context accuracy of a run's last weights on new sequences of any task with its vocabulary."""
    batch = task.batch(sequences, run.config.seeds.evaluation + seed, 1)
    loss, prediction = by_forward(run.weights(-1), batch)
    return summary(loss, prediction, batch)[IN_CONTEXT, "accuracy"][0]


def slower(evidence: Evidence) -> dict[str, float]:
    """Compare when two runs exceed an accuracy of one half, in steps and in in-context targets seen until then.

    `steps_later` is a `timing.lag`; the ratios are NaN if either run never gets there.
    """
    fast = evidence.runs["fast"]
    slow = evidence.runs["slow"]
    steps = {"fast": emergence(fast), "slow": emergence(slow)}
    targets = {name: steps[name] * targets_per_step(run) for name, run in (("fast", fast), ("slow", slow))}
    ends = (float(fast.config.training.steps), float(slow.config.training.steps))
    return {
        **lag("steps_later", steps["fast"], steps["slow"], ends),
        "steps_ratio": steps["slow"] / steps["fast"],
        "targets_ratio": targets["slow"] / targets["fast"],
        **{f"steps_{name}": value for name, value in steps.items()},
    }


def speed(evidence: Evidence) -> dict[str, float]:
    """Return how soon a run exceeds an accuracy of one half, in steps, tokens and in-context targets, and its last accuracy.

    If it never does, the first three are NaN.
    """
    run = evidence.runs["run"]
    steps = emergence(run)
    return {
        "accuracy at the end": float(held_out(run, f"{IN_CONTEXT}_accuracy")[1][-1]),
        "steps to half accuracy": steps,
        "tokens to half accuracy": steps * run.config.training.batch_size * run.config.task.context,
        "targets to half accuracy": steps * targets_per_step(run),
    }


def targets_per_step(run: Run, sequences: int = 256) -> float:
    """Return the average number of in-context targets in a training batch."""
    share = float(evaluation_batch(run, sequences).in_context.double().mean())
    return share * run.config.training.batch_size * run.config.task.context


def heads_removed(evidence: Evidence) -> dict[str, float]:
    """Ablate each head at the end: how much the in-context accuracy, and the global loss and accuracy, change."""
    run = evidence.runs["run"]
    method = evidence.settings["method"]
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
        lost = value["none", "global", "accuracy"] - value[head, "global", "accuracy"]
        found[f"global_accuracy_lost_without_{name}"] = float(lost)
    return found


def roles(evidence: Evidence) -> dict[str, float]:
    """Return how well the best head of each layer of a two-layer model fulfils the two roles, at the end."""
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
    """Fit log(steps to half accuracy) on log(batch size) or log(context) over the cases: the slope, and that for tokens.

    NaN if one of the runs never got there.
    """
    section, key = str(evidence.settings["over"]).split(".")
    runs = list(evidence.runs.values())
    sizes = np.log([float(getattr(getattr(run.config, section), key)) for run in runs])
    steps = np.array([emergence(run) for run in runs])
    tokens = steps * [run.config.training.batch_size * run.config.task.context for run in runs]
    return {"steps_exponent": slope(sizes, np.log(steps)), "tokens_exponent": slope(sizes, np.log(tokens))}
