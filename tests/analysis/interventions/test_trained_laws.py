"""The laws of the induction circuit on a run that was trained, not built: a small paper-like one, clean mode."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from typed import loc

from birthlens import load_run, preset, train_to_disk
from birthlens.analysis.interventions.ablation import ablate_heads, cases_table
from birthlens.analysis.interventions.corruptions import triggers_swapped
from birthlens.analysis.interventions.edge_tables import births_table, cut_edges, edge_table, other_edges
from birthlens.model.sites import Edge, Head
from birthlens.runs.run import Run

SMALL = ["task.cycles=clean", "task.context=48", "model.d_model=128", "training.steps=250", "checkpoints.every=50",
         "evaluation.every=250"]  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("trained") / "clean"
    for _ in train_to_disk(preset("demo", SMALL), path):
        pass
    return load_run(path)


@pytest.fixture(scope="session")
def cuts(trained: Run) -> "pd.Series[Any]":
    batch, reference = trained.task.batch(128, 0, 2**41), trained.task.batch(128, 0, 2**41 + 1)
    weights = trained.weights(-1)
    cases = {
        "no layer 1": ablate_heads([Head(1, 0)], "mean"),
        "no layer 0": ablate_heads([Head(0, 0)], "mean"),
        "keys only": cut_edges(other_edges(weights.config, Head(0, 0), [Edge.parse("L0H0->L1H0.k")]))(weights.config),
        "keys cut": cut_edges(["L0H0->L1H0.k"])(weights.config),
        "ideal pattern": ablate_heads([Head(0, 0)], "previous_token_pattern"),
    }
    table = cases_table([(0, weights)], cases, batch, reference, ("in_context.accuracy",), draws=0)
    return table.set_index("case")["value"]


def test_it_learned_the_task(cuts: "pd.Series[Any]") -> None:
    assert cuts["none"] > 0.8


def test_without_the_induction_head_almost_nothing_is_left(cuts: "pd.Series[Any]") -> None:
    assert cuts["no layer 1"] < 0.05


def test_without_the_previous_token_head_little_is_left(cuts: "pd.Series[Any]") -> None:
    assert cuts["no layer 0"] < 0.25 and cuts["keys cut"] < 0.25


def test_keeping_layer_0_for_the_keys_only_loses_nothing(cuts: "pd.Series[Any]") -> None:
    assert cuts["keys only"] > cuts["none"] - 0.02


def test_the_exact_previous_token_pattern_loses_nothing(cuts: "pd.Series[Any]") -> None:
    assert cuts["ideal pattern"] > cuts["none"] - 0.005


def test_the_edge_into_the_keys_is_the_one_that_is_born(trained: Run) -> None:
    pair = triggers_swapped(trained.task.batch(64, 0, 2**41 + 2), np.random.default_rng(0), len(trained.statistics))
    edges = ["L0H0->L1H0.q", "L0H0->L1H0.k", "L0H0->L1H0.v", "L0H0->logits", "L1H0->logits"]
    births = births_table(edge_table(trained.checkpoints(), pair, edges, draws=100)).set_index("edge")
    assert births["born"].dropna().index.tolist() == ["L0H0->L1H0.k", "L1H0->logits"]
    assert births.loc["L0H0->L1H0.k", "last"] == pytest.approx(1, abs=0.1)
    assert 0 < loc(births)["L0H0->L1H0.k", "born"] < 250 and births["peak"].abs().max() < 1.5
