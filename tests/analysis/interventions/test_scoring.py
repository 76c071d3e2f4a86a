"""Every metric by hand: float64, one position at a time, from nothing but the logits."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from birthlens.analysis.interventions.bootstrap import percentile_interval, resample_counts
from birthlens.analysis.interventions.metrics import DEFAULT_METRICS, QUANTITIES, Metric
from birthlens.analysis.interventions.scoring import Outcomes, Scoring, default_metrics
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
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
    metrics = tuple(Metric(role, quantity) for quantity in QUANTITIES)
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
    assert default_metrics(statistics) == (*DEFAULT_METRICS, Metric("in_context", "kl"), Metric("global", "kl"))


def test_a_metric_is_parsed_once_and_written_as_before() -> None:
    assert Metric.parse("in_context.loss") == Metric("in_context", "loss")
    assert str(Metric("in_context", "loss")) == "in_context.loss"
    for text in ("accuracy", ".accuracy", ""):
        with pytest.raises(BirthlensError, match=r"write role.quantity, such as in_context.accuracy"):
            Metric.parse(text)
    with pytest.raises(BirthlensError, match=r"'all.speed': the quantity must be one of accuracy, loss"):
        Metric.parse("all.speed")


@pytest.mark.parametrize("quantity", ["accuracy", "loss", "probability"])
@pytest.mark.parametrize("whole", [True, False], ids=["every logit", "one logit"])
def test_nan_logits_give_no_value_and_no_interval(batch: TokenBatch, quantity: str, whole: bool) -> None:
    logits = torch.randn(B, T, N, generator=torch.Generator().manual_seed(1))
    where = tuple(batch.in_context.nonzero()[0].tolist())
    logits[where if whole else (*where, 0)] = torch.nan
    # Token 0 is the answer there: argmax alone would call it right.
    answers = batch.targets.clone()
    answers[where] = 0
    metrics = (Metric("in_context", quantity), Metric("first", quantity))
    roles = {"in_context": batch.in_context, "first": batch.occurrence == 1}
    scoring = Scoring(metrics, roles, answers)
    sums = scoring.sums(logits)[None].repeat(2, 1, 1).numpy()
    table = Outcomes(("none", "case"), metrics, sums, scoring.counts().numpy()).table(np.random.default_rng(0))
    measured = table[table["role"] == "in_context"]
    assert measured[["value", "change", "low", "high", "change_low", "change_high"]].isna().all(axis=None)
    assert np.isfinite(table[table["role"] == "first"][["value", "low", "high"]]).all(axis=None)


def test_one_sequence_has_no_interval(batch: TokenBatch) -> None:
    scoring = Scoring.of(batch[:1], ("all.loss",))
    sums = scoring.sums(torch.randn(1, T, N, generator=torch.Generator().manual_seed(2)))[None].numpy()
    table = Outcomes(("none",), scoring.metrics, sums, scoring.counts().numpy()).table(np.random.default_rng(0))
    assert np.isfinite(table["value"]).all() and table[["low", "high", "change_low", "change_high"]].isna().all(
        axis=None
    )


def test_intervals_are_percentiles_of_resampled_means() -> None:
    generator = np.random.default_rng(3)
    sums = generator.random((9, 1))
    counts = generator.integers(0, 3, (9, 1)).astype(float)
    drawn = []
    for row in resample_counts(np.random.default_rng(4), 9, 50):
        picked = np.repeat(np.arange(9), row.astype(int))
        assert len(picked) == 9
        drawn.append(sums[picked].sum() / counts[picked].sum() if counts[picked].sum() else np.nan)
    known = np.array(drawn)[~np.isnan(drawn)]
    low, high = percentile_interval(np.array(drawn)[:, None, None], np.array([[0.5]]), counts)
    np.testing.assert_allclose([low[0, 0], high[0, 0]], np.percentile(known, [2.5, 97.5]))
    assert low[0, 0] < high[0, 0]
    alone = np.zeros((9, 1))
    alone[4] = 2
    assert np.isnan(percentile_interval(np.array(drawn)[:, None, None], np.array([[0.5]]), alone)).all()
