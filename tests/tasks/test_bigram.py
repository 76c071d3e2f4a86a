"""The task against a plain loop: distribution, counters, absorbed positions, and reproducibility."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from birthlens.config.run import TaskConfig
from birthlens.errors import BirthlensError
from birthlens.tasks.bigram import BigramTask, cycling
from birthlens.tasks.corpus import from_counts, from_text
from birthlens.tasks.sampling import Categorical, chain

TEXT = "to be or not to be that is the question whether tis nobler in the mind to suffer"
STATISTICS = from_text(TEXT)
FIELDS = ("tokens", "targets", "triggers", "outputs", "occurrence", "absorbed")

configs = st.builds(
    TaskConfig,
    context=st.integers(6, 24),
    n_triggers=st.integers(0, 6),
    triggers=st.sampled_from(["fixed", "random"]),
    offset=st.integers(0, 3),
    outputs=st.sampled_from(["uniform", "bigram"]),
    no_repeat=st.booleans(),
    cycles=st.sampled_from(["published", "clean"]),
    split=st.sampled_from(["none", "train"]),
    show_latents=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 1000))
def test_every_law_of_a_batch(config: TaskConfig, seed: int) -> None:
    task = BigramTask(config, STATISTICS)
    batch = task.sample(7, np.random.default_rng(seed))
    assert (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()
    for row in range(7):
        rule = dict(zip(batch.triggers[row].tolist(), batch.outputs[row].tolist(), strict=True))
        assert len(rule) == config.n_triggers
        # The authors' loop: the list of triggers, one draw of pi_u, then the rule; counting starts after the list.
        listed = config.n_triggers if config.show_latents else 0
        assert batch.tokens[row, :listed].tolist() == batch.triggers[row, :listed].tolist()
        seen: dict[int, int] = {}
        for t, (token, target) in enumerate(zip(batch.tokens[row].tolist(), batch.targets[row].tolist(), strict=True)):
            in_chain = t >= listed
            if in_chain and token in rule:
                seen[token] = seen.get(token, 0) + 1
                assert target == rule[token]
            elif in_chain:
                assert STATISTICS.bigram[token, target] > 0
            assert batch.occurrence[row, t] == (seen[token] if in_chain and token in rule else 0)
            assert bool(batch.absorbed[row, t]) == (in_chain and _never_leaves(token, rule))
            assert bool(batch.is_global[row, t]) == (in_chain and token not in rule)
            assert bool(batch.listed[row, t]) == (not in_chain)
        for trigger, output in rule.items():
            assert not (config.no_repeat and trigger == output)
            assert not (config.cycles == "clean" and output in rule)
            assert not (config.split == "train" and output >= int(0.75 * len(STATISTICS)))
    if config.triggers == "fixed":
        frequent = sorted(range(len(STATISTICS)), key=lambda i: (-STATISTICS.unigram[i], i))
        expected = frequent[config.offset : config.offset + config.n_triggers]
        assert (batch.triggers == torch.tensor(expected, dtype=torch.int64)).all()
    if config.cycles == "clean":
        assert not batch.absorbed.any()


def _never_leaves(token: int, rule: dict[int, int]) -> bool:
    for _ in range(len(rule) + 1):
        if token not in rule:
            return False
        token = rule[token]
    return True


@settings(max_examples=40, deadline=None)
@given(configs, st.integers(0, 1000))
def test_compiled_and_numpy_samplers_agree_to_the_bit(config: TaskConfig, seed: int) -> None:
    task = BigramTask(config, STATISTICS)
    one = task.sample(9, np.random.default_rng(seed), compiled=True)
    two = task.sample(9, np.random.default_rng(seed), compiled=False)
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


def test_a_batch_depends_on_seed_and_index_only() -> None:
    task = BigramTask(TaskConfig(context=20), STATISTICS)
    first = task.batch(8, seed=3, index=5)
    task.batch(100, seed=1, index=0)
    again = BigramTask(TaskConfig(context=20), STATISTICS).batch(8, seed=3, index=5)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in FIELDS)
    assert not torch.equal(first.tokens, task.batch(8, seed=3, index=6).tokens)
    assert not torch.equal(first.tokens, task.batch(8, seed=4, index=5).tokens)


SMALL = from_counts(("a", "b", "c", "d"), np.array([[1, 2, 3, 4], [4, 1, 0, 1], [2, 2, 2, 2], [0, 5, 1, 1]]))


@pytest.mark.parametrize("triggers", ["fixed", "random"])
@pytest.mark.parametrize("outputs", ["uniform", "bigram"])
@pytest.mark.parametrize("show_latents", [False, True])
def test_sequences_have_the_exact_law(triggers: Any, outputs: Any, show_latents: bool) -> None:
    """Chi-square of all length-4 sequences against probabilities summed by brute force over triggers and outputs.

    The law is that of what comes after the list of triggers, where there is one.
    """
    listed = 2 if show_latents else 0
    config = TaskConfig(context=3 + listed, n_triggers=2, triggers=triggers, outputs=outputs, show_latents=show_latents)
    task = BigramTask(config, SMALL)
    n = 200_000
    batch = task.sample(n, np.random.default_rng(0))
    sequences = torch.cat([batch.tokens, batch.targets[:, -1:]], 1)[:, listed:] @ torch.tensor([64, 16, 4, 1])
    observed = np.bincount(sequences.numpy(), minlength=256)
    expected = np.zeros(256)
    p, b = SMALL.unigram, SMALL.bigram
    fixed = np.argsort(-p, kind="stable")[:2]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    for i, j in pairs:
        weight = p[i] * p[j] / (1 - p[i]) if triggers == "random" else float((i, j) == tuple(fixed))
        for o_i in range(4):
            for o_j in range(4):
                law = weight * (b[i, o_i] * b[j, o_j] if outputs == "bigram" else 1 / 16)
                rows = b.copy()
                rows[i], rows[j] = np.eye(4)[o_i], np.eye(4)[o_j]
                expected += law * np.einsum("a,ab,bc,cd->abcd", p, rows, rows, rows).reshape(-1)
    assert math.isclose(expected.sum(), 1)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert chisquare(observed[possible], n * expected[possible]).pvalue > 1e-3


def test_the_law_of_outputs_is_what_is_drawn() -> None:
    config = TaskConfig(context=4, n_triggers=2, triggers="random", outputs="bigram", no_repeat=True, cycles="clean")
    task = BigramTask(config, SMALL)
    batch = task.sample(40_000, np.random.default_rng(1))
    law = task.output_distribution(batch.triggers.numpy())
    hits = np.zeros(law.shape)
    np.put_along_axis(hits, batch.outputs.numpy()[..., None], 1.0, axis=-1)
    difference, error = (hits - law).mean((0, 1)), np.sqrt((law * (1 - law)).sum((0, 1))) / (2 * 40_000)
    assert (np.abs(difference) < 5 * error + 1e-9).all()


def test_shares_of_the_published_task() -> None:
    """The shares that paper.md states for Tiny Shakespeare; the embedded corpus is close to it."""
    from birthlens.config.run import CorpusConfig
    from birthlens.tasks.corpus import statistics_of

    statistics = statistics_of(CorpusConfig())
    published: list[tuple[Literal["fixed", "random"], float, float]] = [("fixed", 0.29, 0.22), ("random", 0.24, 0.25)]
    for triggers, in_context, absorbed in published:
        batch = BigramTask(TaskConfig(triggers=triggers), statistics).batch(4000, seed=0)
        assert abs(batch.in_context.double().mean() - in_context) < 0.02
        assert abs(batch.absorbed.sum() / (batch.occurrence > 0).sum() - absorbed) < 0.03
        assert abs(batch.absorbed[:, -1].double().mean() - 0.076) < 0.015
    first = BigramTask(TaskConfig(), statistics).batch(4000, seed=0).occurrence == 1
    assert abs(first.double().mean() - 0.018) < 0.002


def test_a_list_of_triggers_may_fill_the_context() -> None:
    batch = BigramTask(TaskConfig(context=3, n_triggers=3, show_latents=True), SMALL).batch(50, seed=0)
    assert torch.equal(batch.tokens, batch.triggers) and batch.listed.all() and not batch.is_global.any()
    assert set(batch.targets[:, -1].tolist()) == {0, 1, 2, 3}


def test_cycling_follows_outputs() -> None:
    triggers = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    outputs = np.array([[1, 0, 9], [0, 2, 9], [1, 2, 0]])
    expected = [[True, True, False], [True, False, False], [True, True, True]]
    assert cycling(triggers, outputs).tolist() == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TaskConfig(n_triggers=5), ["n_triggers = 5", "leaves 4"]),
        (TaskConfig(n_triggers=3, offset=2), ["n_triggers = 3", "leaves 2"]),
        (TaskConfig(n_triggers=4, cycles="clean"), ["n_triggers = 4", "clean"]),
        (TaskConfig(n_triggers=4, cycles="clean", triggers="random"), ["n_triggers = 4", "clean"]),
    ],
)
def test_impossible_tasks_are_refused(config: TaskConfig, words: list[str]) -> None:
    with pytest.raises(BirthlensError) as caught:
        BigramTask(config, SMALL)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("entry", [-0.5, np.nan, np.inf])
def test_rows_that_are_no_distributions_are_refused_before_anything_is_drawn(entry: Any) -> None:
    """With a negative diagonal the compiled chain would walk past its row, and out of memory."""
    rows = np.full((4, 4), 0.25)
    rows[1, 1] = entry
    with pytest.raises(ValueError, match="no negative or infinite"):
        Categorical(rows)


WRONG = {
    "a start out of range": {"start": [[4]]},
    "a negative start": {"start": [[-1]]},
    "an override out of range": {"overrides": [[4, 4, 4, 4]]},
    "a uniform of 1": {"uniform": [[1.0] * 6]},
    "a negative uniform": {"uniform": [[-0.1] * 6]},
    "a uniform that is NaN": {"uniform": [[np.nan] * 6]},
    "a prefix that is too long": {"start": [[0] * 7]},
    "uniforms of another shape": {"uniform": [[0.5] * 5]},
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_chain_reads_nothing_out_of_range(wrong: Any, compiled: Any) -> None:
    arrays = {"start": [[0]], "overrides": [[-1] * 4], "uniform": [[0.5] * 6], **wrong}
    start, overrides, uniform = (np.array(arrays[name]) for name in ("start", "overrides", "uniform"))
    with pytest.raises(ValueError, match=r"not in the vocabulary, or a uniform is not|does not fit|do not fit"):
        chain(start, 6, Categorical(np.full((4, 4), 0.25)), overrides, uniform, compiled)


def test_the_compiled_chain_stays_in_a_row_that_ends_early() -> None:
    """Cumulative sums that never reach the uniform, as no `Categorical` has them, end at the last token."""
    rows = Categorical(np.full((4, 4), 0.25))
    rows.flat = np.minimum(rows.flat, 0.5)
    tokens, _ = chain(np.array([[0]]), 6, rows, np.full((1, 4), -1), np.full((1, 6), 0.9), True)
    assert tokens.min() >= 0 and tokens.max() <= 3
