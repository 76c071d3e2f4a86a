"""Key numbers of a run, each with the scores of chance and of the reference predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.behaviour.trajectory import memories_over
from birthlens.analysis.memories.order_tables import chosen_sets, onsets_table, standardised_scores_table
from birthlens.labels import counted, label
from birthlens.runs.evaluation import evaluation_batch
from birthlens.runs.run import Run
from birthlens.tasks.predictors.scores import reference_table

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.tasks.batch import TokenBatch

REACHED = 0.9


@dataclass(frozen=True)
class KeyNumber:
    """One number: its value, its chance level, and the optimum (NaN if that has no meaning).

    The optimum of a loss or an accuracy is that of the Bayes-optimal predictor, which is the best on average over all
    positions (at one kind of position another predictor may be better). The optimum of a recall is 1.
    """

    name: str
    value: float
    chance: float = float("nan")
    optimum: float = float("nan")
    about: str = ""


@dataclass
class Facts:
    """The data of a run's report, each computed once."""

    run: Run
    sequences: int = 32

    @cached_property
    def steps(self) -> list[int]:
        """The kept steps."""
        return self.run.steps

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The measurements of training."""
        return self.run.metrics()

    @cached_property
    def batch(self) -> TokenBatch:
        """The held-out sequences."""
        return evaluation_batch(self.run, self.sequences)

    @cached_property
    def references(self) -> pd.DataFrame:
        """The reference predictors' scores on these sequences."""
        return reference_table(self.run.task, self.batch, self.predictors)

    @cached_property
    def predictors(self) -> tuple[str, ...]:
        """The reference predictors to show, from the least to the best informed."""
        return self.run.task.shown_predictors or tuple(self.run.task.predictors)

    @property
    def headline(self) -> tuple[str, str]:
        """The role whose accuracy tells whether the task has been learned, and its name in a sentence."""
        role = self.run.task.headline
        return role, self.run.task.shown_roles[role]

    @cached_property
    def births(self) -> pd.DataFrame:
        """Onsets of the memories, as `birthlens order` finds them: columns memory, candidates, onset."""
        return chosen_sets(onsets_table(standardised_scores_table([self.run])))

    @cached_property
    def recalls(self) -> pd.DataFrame:
        """Memory readings in the raw basis over the kept steps."""
        return memories_over(self.run, self.steps, bases=("raw",)).to_pandas()

    def series(self, metric: str, split: str = "held_out") -> tuple[list[int], list[float]]:
        """Return a measured curve: steps and values."""
        rows = self.metrics[(self.metrics["split"] == split) & (self.metrics["metric"] == metric)].sort_values("step")
        return [int(step) for step in rows["step"]], [float(value) for value in rows["value"]]

    def last(self, metric: str) -> float:
        """Return the last measured value of a metric, NaN if it was never measured."""
        _, values = self.series(metric)
        return values[-1] if values else float("nan")

    def reference(self, predictor: str, role: str, metric: str) -> float:
        """Return the score of a reference predictor, NaN if the role is empty."""
        table = self.references
        names = (predictor, self.run.task.shown_as(predictor))
        chosen = table["predictor"].isin(names) & (table["role"] == role) & (table["metric"] == metric)
        found = [float(value) for value in table[chosen]["value"]]
        return found[0] if found else float("nan")

    def recall_series(self, memory: str, candidates: str) -> tuple[list[int], list[float], float]:
        """Return recall over steps, and its chance level; empty if the reading does not exist."""
        rows = self.recalls[
            (self.recalls["memory"] == memory)
            & (self.recalls["candidates"] == candidates)
            & (self.recalls["metric"] == "recall")
        ].sort_values("step")
        chance = float(rows["chance"].iloc[0]) if len(rows) else float("nan")
        return [int(step) for step in rows["step"]], [float(v) for v in rows["value"]], chance

    def readings(self, memory: str) -> list[str]:
        """List the candidate sets that are informative for a memory of this run.

        With fixed triggers, the trigger memory is read among the triggers. No other token was ever a query, so recall among
        all N tokens would be at most K / N.
        """
        rows = self.recalls[(self.recalls["memory"] == memory) & (self.recalls["metric"] == "recall")]
        found = [name for name in dict.fromkeys(rows["candidates"]) if "among" not in name]
        return [name for name in found if not (memory == "trigger_memory" and name == "all" and "triggers" in found)]

    def queries(self, memory: str, candidates: str) -> str:
        """Describe the queries of a reading: "64 tokens", "5 triggers"."""
        rows = self.recalls[(self.recalls["memory"] == memory) & (self.recalls["candidates"] == candidates)]
        noun = "trigger" if candidates == "triggers" else "position" if memory == "prev_token_memory" else "token"
        first = "first " if candidates.startswith("first") else ""
        return first + counted(int(rows["n"].iloc[0]), noun)


def first_above(steps: Sequence[int], values: Sequence[float], level: float) -> int | None:
    """Return the first measured step with a value above a level, or None."""
    return next((step for step, value in zip(steps, values, strict=True) if value > level), None)


def key_numbers(facts: Facts, memories: bool) -> list[KeyNumber]:
    """Return the key numbers of a run; with `memories`, those of the three memories too."""
    out = []
    task = facts.run.task
    exact = task.shown_as(task.exact) if task.exact else ""
    headline, headline_name = facts.headline
    names = {headline: f"{headline_name} accuracy"}
    if f"{headline}_unabsorbed" in task.roles:
        names[f"{headline}_unabsorbed"] = f"{headline_name} accuracy, absorbed positions left out"
    for role, said in names.items():
        chance = facts.reference("uniform", role, "accuracy")
        best = facts.reference(exact, role, "accuracy")
        bag = facts.reference("bag", role, "accuracy")
        about = f"bag of tokens (approximate): {bag:.3f}" if np.isfinite(bag) else ""
        out.append(KeyNumber(said, facts.last(f"{role}_accuracy"), chance, best, about))
    for role, name in task.shown_roles.items():
        said = f"{name} loss (nats)"
        chance = facts.reference("uniform", role, "loss")
        best = facts.reference(exact, role, "loss")
        trained = "trained on" if facts.run.config.training.loss in (role, "all") else "not trained on"
        out.append(KeyNumber(said, facts.last(f"{role}_loss"), chance, best, trained))
    steps, values = facts.series(f"{headline}_accuracy")
    reached = first_above(steps, values, REACHED)
    step = float("nan") if reached is None else float(reached)
    out.append(KeyNumber(f"first step with {headline_name} accuracy above {REACHED}", step))
    if memories:
        for memory in ("output_memory", "trigger_memory", "prev_token_memory"):
            for candidates in facts.readings(memory):
                _, found, chance = facts.recall_series(memory, candidates)
                name = f"recall of the {label(memory)}, {facts.queries(memory, candidates)}"
                out.append(KeyNumber(name, found[-1], chance, 1.0))
    return [number for number in out if np.isfinite(number.value) or "first step" in number.name]
