"""The theory's claims: what they judge is what the tables hold, and their sentences name the step's switch."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from birthlens.analysis.theory.first_step import PREDICTIONS, counts_table, first_step_table
from birthlens.analysis.theory.three_steps import ablations
from birthlens.claims.catalogue.theory import THEORY
from birthlens.claims.claim import Evidence
from birthlens.claims.statistics import theory
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import statistics_of

STATISTICS = statistics_of(CorpusConfig())


def claim(name: str) -> Any:
    return next(claim for claim in THEORY if claim.id == name)


def test_every_prediction_is_judged_on_and_off_the_diagonal() -> None:
    judged = {e.quantity for c in THEORY if c.statistic is theory.first_step for e in c.expectations}
    assert judged == {f"{a}_{b}" for a, b in product(("growth", "diagonal", "off_diagonal"), PREDICTIONS)}


def test_first_step_gives_the_tables_correlations_at_the_largest_width() -> None:
    settings = {"widths": (16, 32), "context": 16, "sequences": 32, "init": "authors"}
    found = theory.first_step(Evidence({}, 3, settings))
    task = BigramTask(TaskConfig(context=16), STATISTICS)
    table = first_step_table(task, ModelConfig(), (32,), 32, (3,), ("zero",))
    for row in table.itertuples():
        assert found[f"{row.entries}_{row.prediction}"] == row.correlation
    growth = found["off_diagonal_model"] - found["small_model"]
    assert found["growth_model"] == growth != 0 and len({found[f"off_diagonal_{p}"] for p in PREDICTIONS}) == 3


@pytest.mark.parametrize("name", ["first-step-from-counts", "first-step-orthogonal"])
def test_the_codebooks_are_the_claims(name: Any) -> None:
    settings = {**claim(name).settings, "widths": (256,), "sequences": 64, "context": 32}
    assert (theory.first_step(Evidence({}, 0, settings))["off_diagonal_uniform"] > 0.9) == name.endswith("orthogonal")


def test_a_sentence_says_whether_steps_are_projected() -> None:
    cases = ablations(STATISTICS)
    words = {True: ("projected on its own family's span",), False: ("without the projection", "without projection")}
    for one in THEORY:
        if one.statistic is theory.three_steps and "order" not in one.settings:
            assert any(w in one.sentence for w in words[cases[one.settings["case"]][0].projected]), one.id


def test_frequency_is_the_covariance_of_prefix_and_target() -> None:
    batch = BigramTask(TaskConfig(context=24), STATISTICS).batch(32, seed=1)
    mask, n = batch.in_context.numpy(), len(STATISTICS)
    found = counts_table(batch, mask, n, prediction="frequency")
    tokens, targets = batch.tokens.numpy(), batch.targets.numpy()
    expected = np.zeros((n, n))
    frequency = np.array([np.bincount(tokens[b, : t + 1], minlength=n) / (t + 1) for b, t in np.argwhere(mask)])
    for k in set(targets[mask].tolist()):
        here = targets[mask] == k
        expected[:, k] = here.mean() * (frequency[here].mean(0) - frequency.mean(0))
    np.testing.assert_allclose(found, expected, atol=1e-12)
