"""Every metric by hand: float64, one position at a time, from nothing but the logits."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from birthlens.analysis.interventions.scoring import DEFAULT_METRICS, QUANTITIES, Scoring, default_metrics
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import BigramStatistics, markov_chain

N, T, B = 11, 20, 6


@pytest.fixture(scope="module")
def statistics() -> BigramStatistics:
    return markov_chain(CorpusConfig(source="markov", vocabulary=N))


@pytest.fixture(scope="module")
def batch(statistics: BigramStatistics) -> TokenBatch:
    return BigramTask(TaskConfig(context=T, n_triggers=3), statistics).batch(B, 0)


def by_hand(logits: NDArray[Any], answer: int, alternative: int, row: NDArray[Any]) -> dict[str, float]:
    shares = np.exp(logits) / np.exp(logits).sum()
    return {
        "accuracy": float(np.argmax(logits) == answer),
        "loss": -np.log(shares[answer]),
        "logit": logits[answer],
        "probability": shares[answer],
        "logit_difference": logits[answer] - logits[alternative],
        "kl": sum(p * np.log(p / q) for p, q in zip(row, shares, strict=True) if p > 0),
    }


@pytest.mark.parametrize("role", ["in_context", "global"])
def test_every_quantity_by_hand(batch: TokenBatch, statistics: BigramStatistics, role: str) -> None:
    logits = 3 * torch.randn(B, T, N, generator=torch.Generator().manual_seed(0))
    alternatives = (batch.targets + 1) % N
    where = batch.in_context if role == "in_context" else batch.occurrence == 0
    bigram = torch.from_numpy(statistics.bigram).float()
    metrics = tuple(f"{role}.{quantity}" for quantity in QUANTITIES)
    scoring = Scoring(metrics, {role: where}, batch.targets, alternatives, batch.tokens, bigram)
    expected = np.zeros((B, len(QUANTITIES)))
    for b, t in where.nonzero().tolist():
        row = statistics.bigram[int(batch.tokens[b, t])].astype(np.float64)
        found = by_hand(
            logits[b, t].double().numpy(), int(batch.targets[b, t]), int(alternatives[b, t]), row / row.sum()
        )
        expected[b] += [found[quantity] for quantity in QUANTITIES]
    np.testing.assert_allclose(scoring.sums(logits), expected, rtol=1e-4, atol=1e-4)
    assert scoring.counts()[:, 0].tolist() == where.sum(1).tolist() and where.any()


def test_kl_is_nothing_for_the_table_itself_and_never_negative(batch: TokenBatch, statistics: BigramStatistics) -> None:
    chain = torch.from_numpy(statistics.bigram).float()
    scoring = Scoring.of(batch, ("all.kl",), statistics)
    exact = chain.clamp(min=1e-30).log()[batch.tokens]
    assert float(scoring.sums(exact).abs().max()) < 1e-3
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    assert (scoring.sums(exact + noise) > 0.01).all()


def test_the_usual_metrics_include_kl_where_the_table_is_known(statistics: BigramStatistics) -> None:
    assert default_metrics(None) == DEFAULT_METRICS
    assert default_metrics(statistics) == (*DEFAULT_METRICS, "in_context.kl", "global.kl")
