"""Every kind of task against its rule: batches by a plain loop, predictors by brute force on tiny vocabularies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from birthlens.analysis.interventions.corruptions import task_pair
from birthlens.config.run import RunConfig
from birthlens.config.task import BackcopyConfig, FactsConfig, MarkovConfig, NoiseConfig
from birthlens.errors import BirthlensError
from birthlens.tasks.backcopy import BackcopyTask
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.chains import dirichlet_rows, drawn_chains, stationary_laws
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.facts import FactsTask
from birthlens.tasks.kinds import chain_of, task_of
from birthlens.tasks.markov import MarkovTask
from birthlens.tasks.noise import NoiseTask, labelled
from birthlens.tasks.predictors.reference import predict
from birthlens.tasks.predictors.scores import reference_table
from birthlens.tasks.roles import role_masks
from birthlens.tasks.task import Task, checked_batch, plain_batch

Array = np.ndarray
KINDS = ("bigram", "noise", "backcopy", "markov", "facts")
CORPUS = BigramStatistics(
    ("a", "b", "c"),
    np.array([0.5, 0.3, 0.2]),
    np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.25, 0.25, 0.5]]),
)


def task(kind: str, *overrides: str) -> Task:
    config = RunConfig.parse({}, [f"task.kind={kind}", "task.context=12", *overrides])
    return task_of(config.task, chain_of(config))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_drawn_again_and_keeps_the_protocol(kind: str) -> None:
    one = task(kind)
    first, again, other = one.batch(5, 3), one.batch(5, 3), one.batch(5, 4)
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.targets.shape == (5, 12)
    assert int(first.tokens.max()) < len(one.statistics) and int(first.tokens.min()) >= 0
    scored = role_masks(first)["all"]
    inside = scored[:, :-1]
    assert torch.equal(first.tokens[:, 1:][inside], first.targets[:, :-1][inside])
    for role in one.roles:
        assert role_masks(first)[role].shape == (5, 12)
    one.check_loss(one.headline)
    with pytest.raises(BirthlensError, match="valid are all"):
        one.check_loss("nonsense")


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_are_laws_and_the_exact_one_has_the_lowest_loss(kind: str) -> None:
    one = task(kind)
    batch = one.batch(400, 0)
    for name in one.predictors:
        probabilities = predict(name, one, batch)
        assert probabilities.shape == (400, 12, len(one.statistics))
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-9)
        assert (probabilities >= 0).all()
    table = reference_table(one, batch)
    losses = table[(table["role"] == "all") & (table["metric"] == "loss")].set_index("predictor")["value"]
    assert one.exact is not None
    assert losses[one.exact] == losses.min()
    assert losses["uniform"] > losses[one.exact] + 0.05


# The noisy task, by enumeration of outputs and of whole sequences


def noise_law(one: NoiseTask, output: int, prefix: tuple[int, ...]) -> Array:
    """Return the law of the next token given the prefix and the trigger's output."""
    triggers = one.fixed_triggers.tolist()
    law = np.zeros(len(one.statistics))
    if prefix[-1] in triggers:
        law[one.noise] = one.config.alpha
        law[output] += 1 - one.config.alpha
    elif prefix[-1] == one.noise:
        law[:-1] = CORPUS.unigram
    else:
        law[:-1] = CORPUS.bigram[prefix[-1]]
    return law


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_noisy_predictor_is_that_of_brute_force(alpha: float) -> None:
    config = NoiseConfig(context=4, n_triggers=1, alpha=alpha)
    one = NoiseTask(config, NoiseTask.chain(config, CORPUS))
    index = np.full(4, -1)
    index[one.fixed_triggers] = 0
    for prefix in itertools.product(range(4), repeat=4):
        weights = []
        for output in one.outputs:
            likelihood = np.append(CORPUS.unigram, 0)[prefix[0]]
            for t in range(1, len(prefix)):
                likelihood *= noise_law(one, int(output), prefix[:t])[prefix[t]]
            weights.append(likelihood)
        if sum(weights) == 0:
            continue
        expected = np.average([noise_law(one, int(o), prefix) for o in one.outputs], axis=0, weights=weights)
        batch = labelled(np.array([[*prefix, 0]]), index, 1, one.noise)
        np.testing.assert_allclose(predict("bayes", one, batch)[0, -1], expected, atol=1e-12)


def test_noisy_sequences_follow_their_rule_and_roles_are_counted_by_hand() -> None:
    config = NoiseConfig(context=40, n_triggers=2, alpha=0.4)
    chain = NoiseTask.chain(config, BigramStatistics(tuple("abcdef"), np.full(6, 1 / 6), np.full((6, 6), 1 / 6)))
    one = NoiseTask(config, chain)
    batch = one.batch(600, 1)
    noise = follows = 0
    for tokens, targets, masks in rows(batch):
        shown: dict[int, int] = {}
        seen: dict[int, int] = {}
        for t, (now, then) in enumerate(zip(tokens, targets, strict=True)):
            if now not in one.fixed_triggers:
                assert masks["global"][t] and not masks["trigger"][t]
                continue
            seen[now] = seen.get(now, 0) + 1
            follows += 1
            noise += then == one.noise
            assert masks["later_occurrence"][t] == (seen[now] >= 2)
            assert masks["noise"][t] == (then == one.noise)
            assert masks["in_context"][t] == (then != one.noise and now in shown)
            assert masks["unpredictable"][t] == (then != one.noise and now not in shown)
            if then != one.noise:
                assert shown.setdefault(now, then) == then
                assert then not in one.fixed_triggers
    assert abs(noise / follows - 0.4) < 4 * math.sqrt(0.24 / follows)
    assert (one.clean().batch(50, 1).tokens != one.noise).all()


def rows(batch: TokenBatch) -> Iterator[tuple[list[int], list[int], dict[str, list[bool]]]]:
    masks = role_masks(batch)
    for b in range(len(batch)):
        yield (
            batch.tokens[b].tolist(),
            batch.targets[b].tolist(),
            {name: mask[b].tolist() for name, mask in masks.items()},
        )


def test_back_copies_follow_their_rule() -> None:
    config = BackcopyConfig(context=30, n_triggers=1)
    one = BackcopyTask(config, BackcopyTask.chain(config, CORPUS))
    batch = one.batch(2000, 0)
    assert (batch.tokens[:, 0] == one.bos).all() and (batch.tokens[:, 1:] != one.bos).all()
    counts = np.zeros((4, 4))
    for tokens, targets, masks in rows(batch):
        for t, (now, then) in enumerate(zip(tokens, targets, strict=True)):
            assert masks["in_context"][t] == (now == 0) and masks["global"][t] == (now != 0)
            if now == 0:
                assert then == tokens[t - 1]
            else:
                counts[now, then] += 1
    start = np.array([0, 0.6, 0.4, 0])
    for token, law in ((1, CORPUS.bigram[1]), (2, CORPUS.bigram[2]), (3, start[:3])):
        n = counts[token].sum()
        np.testing.assert_allclose(counts[token, :3] / n, law, atol=4 * math.sqrt(0.25 / n))


# Markov chains, by Dirichlet integrals


def evidence(sequence: tuple[int, ...], states: int, order: Any, prior: float) -> float:
    """Return the log probability of a sequence after its first tokens, rows integrated out by gamma functions."""
    counts: dict[tuple[int, ...], list[int]] = {}
    for t in range(order, len(sequence)):
        counts.setdefault(sequence[t - order : t], [0] * states)[sequence[t]] += 1
    total = 0.0
    for row in counts.values():
        total += math.lgamma(states * prior) - math.lgamma(states * prior + sum(row))
        total += sum(math.lgamma(prior + n) - math.lgamma(prior) for n in row)
    return total


@pytest.mark.parametrize(("order", "name"), [(1, "bigram"), (2, "trigram")])
def test_the_dirichlet_predictor_is_the_ratio_of_evidences(order: Any, name: str) -> None:
    config = MarkovConfig(states=3, context=7, order=order, concentration=0.7)
    one = MarkovTask(config, MarkovTask.chain(config, None))
    assert one.exact == name
    batch = one.batch(20, 0)
    found = predict(name, one, batch)
    for b, tokens in enumerate(batch.tokens.tolist()):
        for t in range(order - 1, 7):
            prefix = tuple(tokens[: t + 1])
            expected = [
                math.exp(evidence((*prefix, j), 3, order, 0.7) - evidence(prefix, 3, order, 0.7)) for j in range(3)
            ]
            np.testing.assert_allclose(found[b, t], expected, rtol=1e-9)


@pytest.mark.parametrize("start", ["uniform", "stationary"])
def test_retrieval_is_bayes_over_the_pool(start: Any) -> None:
    config = MarkovConfig(states=3, context=6, chains=4, start=start)
    one = MarkovTask(config, MarkovTask.chain(config, None))
    assert one.pool is not None
    batch = one.batch(20, 0)
    found = predict("retrieval", one, batch)
    starts = stationary_laws(one.pool) if start == "stationary" else np.full((4, 3), 1 / 3)
    for b, tokens in enumerate(batch.tokens.tolist()):
        for t in range(6):
            weights = [starts[m, tokens[0]] for m in range(4)]
            for m in range(4):
                for s in range(t):
                    weights[m] *= one.pool[m, tokens[s], tokens[s + 1]]
            expected = np.average([one.pool[m, tokens[t]] for m in range(4)], axis=0, weights=weights)
            np.testing.assert_allclose(found[b, t], expected, rtol=1e-9)


def test_stationary_laws_stay_where_they_are() -> None:
    chains = np.random.default_rng(0).dirichlet(np.ones(5), size=(3, 5))
    laws = stationary_laws(chains)
    np.testing.assert_allclose(np.einsum("ci,cij->cj", laws, chains), laws, atol=1e-12)


def test_doubly_stochastic_chains_have_their_laws() -> None:
    """The uniform law against another way to draw it: a block of uniform entries that is accepted if the rest fits."""
    generator = np.random.default_rng(0)
    found = drawn_chains(MarkovConfig(states=3, rows="doubly_stochastic"), 20_000, generator)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(found.sum(2), 1, atol=1e-12)
    block = generator.random((400_000, 2, 2))
    block = block[(block.sum(1) <= 1).all(1) & (block.sum(2) <= 1).all(1) & (block.sum((1, 2)) >= 1)]
    for moment in (
        lambda p: p[:, 0, 0] ** 2,
        lambda p: p[:, 0, 0] * p[:, 1, 1],
        lambda p: p[:, 0, 1] * p[:, 1, 1] ** 2,
    ):
        one, other = moment(found), moment(block)
        error = math.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) < 4 * error
    for states, concentration in ((3, 1.0), (8, 0.5)):
        config = MarkovConfig(states=states, rows="sinkhorn", concentration=concentration)
        scaled = drawn_chains(config, 50, np.random.default_rng(1))
        plain = dirichlet_rows((50, states, states), concentration, np.random.default_rng(1))
        for _ in range(3000):
            plain = plain / plain.sum(1, keepdims=True)
            plain = plain / plain.sum(2, keepdims=True)
        np.testing.assert_allclose(scaled, plain, atol=1e-5)
        np.testing.assert_allclose(scaled.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("states", [2, 3])
def test_the_law_of_doubly_stochastic_chains_is_that_of_brute_force(states: int) -> None:
    config = MarkovConfig(states=states, context=8, rows="doubly_stochastic", start="stationary")
    one = MarkovTask(config, MarkovTask.chain(config, None))
    batch = one.batch(8, 0)
    found = predict("bayes", one, batch)
    if states == 2:
        p = (np.arange(20_000) + 0.5) / 20_000
        every = np.stack([p, 1 - p, 1 - p, p], axis=1).reshape(-1, 2, 2)
    else:
        a, b, c, d = ((each.ravel() + 0.5) / 24 for each in np.indices((24,) * 4))
        entries = np.stack([a, b, 1 - a - b, c, d, 1 - c - d, 1 - a - c, 1 - b - d, a + b + c + d - 1], axis=1)
        every = entries[(entries > 0).all(1)].reshape(-1, 3, 3)
    divergences = []
    for row, tokens in enumerate(batch.tokens.tolist()):
        weights = np.ones(len(every))
        for t, token in enumerate(tokens):
            if t:
                weights = weights * every[:, tokens[t - 1], token]
            expected = np.average(every[:, token], axis=0, weights=weights)
            divergences.append(float((expected * np.log(expected / found[row, t])).sum()))
    assert one.exact == "bayes" and bool(one.approximation) == (states == 3)
    assert np.mean(divergences) < (1e-8 if states == 2 else 5e-4)
    assert one.shown_as("bayes") == ("bayes" if states == 2 else "bayes (approximate)")


def test_large_doubly_stochastic_chains_have_no_exact_law_but_in_a_pool() -> None:
    for chains, exact in ((0, None), (4, "retrieval")):
        config = MarkovConfig(states=4, context=6, rows="doubly_stochastic", chains=chains)
        assert MarkovTask(config, MarkovTask.chain(config, None)).exact == exact


def test_markov_sequences_repeat_their_own_chain() -> None:
    """Over one very long sequence, what follows each state has the frequencies of the pool's only chain."""
    config = MarkovConfig(states=3, context=20_000, chains=1)
    one = MarkovTask(config, MarkovTask.chain(config, None))
    assert one.pool is not None
    batch = one.batch(1, 0)
    counts = np.zeros((3, 3))
    np.add.at(counts, (batch.tokens[0].numpy(), batch.targets[0].numpy()), 1)
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), one.pool[0], atol=0.03)


# Facts, by reading each sequence


@pytest.mark.parametrize("structured", [True, False])
def test_a_fact_is_the_answer_of_the_two_tokens_that_count(structured: bool) -> None:
    config = FactsConfig(context=9, subjects=6, relations=3, answers=2, noise_tokens=4, structured=structured)
    one = FactsTask(config, FactsTask.chain(config, None))
    vocab = one.statistics.vocab
    batch = one.batch(300, 0)
    answers: dict[tuple[str, str], str] = {}
    for tokens, targets, masks in rows(batch):
        words = [vocab[i] for i in tokens]
        subject = [word for word in words if word[0] == "s"]
        relation = [word for word in words if word[0] == "r"]
        assert words[-1] == "<eos>" and len(subject) == len(relation) == 1
        answer = vocab[targets[-1]]
        assert answers.setdefault((subject[0], relation[0]), answer) == answer
        assert answer.startswith(relation[0] + "a")
        assert masks["fact"] == masks["all"] == [False] * 8 + [True]
    assert len(answers) == 18
    if structured:
        by_relation = [sorted(answer for (_, r), answer in answers.items() if r == f"r{n}") for n in range(3)]
        assert by_relation == [[f"r{n}a0"] * 3 + [f"r{n}a1"] * 3 for n in range(3)]


def test_partial_knowledge_of_facts_is_counted() -> None:
    config = FactsConfig(context=6, subjects=4, relations=2, answers=3, noise_tokens=2, structured=False, facts_seed=1)
    one = FactsTask(config, FactsTask.chain(config, None))
    batch = one.batch(50, 0)
    by_relation, by_subject = (predict(name, one, batch)[:, -1] for name in ("relation", "subject"))
    for b, tokens in enumerate(batch.tokens.tolist()):
        subject = next(i for i in tokens if i < 4)
        relation = next(i - 4 for i in tokens if 4 <= i < 6)
        expected = np.bincount(one.facts[:, relation], minlength=len(one.statistics)) / 4
        np.testing.assert_allclose(by_relation[b], expected)
        np.testing.assert_allclose(by_subject[b], np.bincount(one.facts[subject], minlength=len(one.statistics)) / 2)


# Tasks of somebody's own


class RepeatTask(Task):
    """Random tokens, and then the same ones again."""

    class Config(MarkovConfig):
        """Half a sequence is random, the other half repeats it."""

    needs_corpus = False
    roles = {"in_context": "the second half: every token is known from the first"}
    shown_roles = {"in_context": "in-context"}

    @classmethod
    def chain(cls, config: MarkovConfig, corpus: BigramStatistics | None) -> BigramStatistics:
        return MarkovTask.chain(config, corpus)

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        half = self.config.context // 2 + 1
        once = generator.integers(self.config.states, size=(n, half))
        tokens = np.concatenate([once, once], axis=1)[:, : self.config.context + 1]
        later = np.broadcast_to(np.arange(self.config.context) >= half - 1, (n, self.config.context))
        return plain_batch(tokens, np.where(later, 2, 1), {"in_context": later})


class WrongTask(RepeatTask):
    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        return super().sample(n + 1, generator)


class FloatMarks(RepeatTask):
    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        batch = super().sample(n, generator)
        batch.marks["in_context"] = batch.in_context.float()  # type: ignore[index]
        return batch


class NoChain(RepeatTask):
    @classmethod
    def chain(cls, config: MarkovConfig, corpus: BigramStatistics | None) -> Any:
        return None


class Flat(RepeatTask):
    @property
    def predictors(self) -> Any:
        return {"flat": lambda task, batch: np.ones((2, 2)), "large": lambda task, batch: np.ones((4, 6, 3))}


def test_a_task_that_violates_the_protocol_is_told_which_method_returned_what() -> None:
    config = MarkovConfig(context=6)
    chain = MarkovTask.chain(config, None)
    floats = FloatMarks(config, chain)
    with pytest.raises(
        BirthlensError, match=r"FloatMarks.sample\(4\) returned the mark 'in_context' of .* torch.float32"
    ):
        checked_batch(floats, floats.sample(4, np.random.default_rng(0)), 4)
    flat = Flat(config, chain)
    for name, words in (("flat", r"returned \(2, 2\); it must .* \(4, 6, 3\)"), ("large", "no probabilities")):
        with pytest.raises(BirthlensError, match=rf"Flat.predictors\['{name}'\] .*{words}"):
            predict(name, flat, flat.sample(4, np.random.default_rng(0)))
    with pytest.raises(BirthlensError, match=r"NoChain.chain returned a NoneType; it must return BigramStatistics"):
        chain_of(RunConfig.parse({}, [f"task.kind={__name__}:NoChain"]))


def test_a_task_of_ones_own_is_trained_by_its_name(tmp_path: object) -> None:
    from birthlens.training.loop import train

    words = [
        f"task.kind={__name__}:RepeatTask",
        "task.context=8",
        "task.states=5",
        "model.d_model=8",
        "training.steps=2",
    ]
    config = RunConfig.parse({}, [*words, "training.batch_size=4", "training.engine=functional"])
    assert RunConfig.parse(config.to_data()) == config
    records = list(train(config))
    assert [record.step for record in records] == [0, 1, 2]
    assert any(row["metric"] == "in_context_loss" for row in records[0].metrics)
    wrong = RunConfig.parse(config.to_data(), [f"task.kind={__name__}:WrongTask"])
    with pytest.raises(BirthlensError, match=r"WrongTask.sample\(128\) returned tokens of shape \(129, 8\)"):
        next(train(wrong))


CORRUPTED = [
    ("noise", "new_outputs", "task.alpha=0.4"), ("backcopy", "other_copies", "task.n_triggers=5"),
    ("facts", "other_subject", "task.structured=false"), ("facts", "other_relation", "task.subjects=5"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "setting"), CORRUPTED)
def test_a_corruption_changes_the_answers_and_what_they_depend_on_alone(kind: str, name: str, setting: str) -> None:
    one = task(kind, setting)
    batch = one.batch(40, 0)
    corrupted = one.corrupted(name, batch, np.random.default_rng(1))
    clean = torch.cat([batch.tokens, batch.targets[:, -1:]], 1)
    changed = clean != torch.cat([corrupted.tokens, corrupted.targets[:, -1:]], 1)
    assert torch.equal(corrupted.tokens[:, 1:], corrupted.targets[:, :-1]) and 0.05 < changed.float().mean() < 0.5
    answers = role_masks(corrupted)[one.headline]
    assert torch.equal(answers, role_masks(batch)[one.headline])
    if kind == "facts":
        kinds = [range(one.config.subjects), range(one.config.subjects, one.config.subjects + one.config.relations)]
        moved = kinds[name == "other_relation"]
        at = torch.isin(batch.tokens, torch.tensor(list(moved)))
        assert torch.equal(changed[:, :-1], at) and torch.isin(corrupted.tokens[at], torch.tensor(list(moved))).all()
    else:
        # Triggers and noise stay; every answer but those of noise is another one.
        fixed = torch.isin(clean, torch.tensor([*np.asarray(one.fixed_triggers), len(one.statistics) - 1]))
        assert not changed[fixed].any()
        assert changed[:, 1:][answers].all()
    exact = predict(str(one.exact), one, corrupted)
    told = np.take_along_axis(exact, corrupted.targets.numpy()[..., None], -1)[..., 0]
    assert (told[answers.numpy()] == (1 - 0.4 if kind == "noise" else 1)).all()


def test_tasks_without_corruptions_of_their_own_take_other_sequences() -> None:
    one = task("markov", "task.context=40")
    batch = one.batch(6, 0)
    pair = task_pair(one, "other_sequence", batch, np.random.default_rng(1))
    assert torch.equal(pair.corrupted.tokens, one.sample(6, np.random.default_rng(1)).tokens)
    both = batch.in_context & pair.corrupted.in_context & (batch.tokens == pair.corrupted.tokens)
    assert torch.equal(pair.scored, both & (batch.targets != pair.corrupted.targets))
    for refused in (lambda: task_pair(one, "shifted", batch, np.random.default_rng(1)),
                    lambda: one.corrupted("shifted", batch, np.random.default_rng(1))):  # fmt: skip
        with pytest.raises(
            BirthlensError, match="'shifted' is not defined for the run's task; it defines other_sequence"
        ):
            refused()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nose", "valid are bigram, noise, backcopy, markov, facts"),
        (5, "task.kind = 5 is unknown"),
        ("no_such_module:Task", "cannot be imported"),
        ("math:Task", "the module 'math' has no class 'Task'"),
        ("math:pi", "must be a subclass of TaskSection"),
    ],
)
def test_unknown_kinds_are_refused(kind: object, words: str) -> None:
    with pytest.raises(BirthlensError, match=words):
        RunConfig.parse({"task": {"kind": kind}})


def test_each_kind_has_keys_of_its_own() -> None:
    with pytest.raises(BirthlensError, match=r"task.states = 3 is unknown; valid keys are context, n_triggers"):
        RunConfig.parse({}, ["task.kind=noise", "task.states=3"])
    with pytest.raises(BirthlensError, match="transition probabilities"):
        RunConfig.parse({}, ["task.kind=markov", "task.states=4096"])
    for settings, words in (
        (["task.rows=doubly_stochastic", "task.states=6"], "up to 5 states"),
        (["task.rows=sinkhorn", "task.order=2"], "defined for task.order = 1"),
        (["task.rows=sinkhorn", "task.concentration=0.01"], "at least 0.1"),
    ):
        with pytest.raises(BirthlensError, match=words):
            RunConfig.parse({}, ["task.kind=markov", *settings])
    with pytest.raises(BirthlensError, match=r"task.n_triggers = 3"):
        task("noise", "corpus.source=markov", "corpus.vocabulary=3")
    with pytest.raises(BirthlensError, match="leaves none that is not a trigger"):
        task("backcopy", "corpus.source=markov", "corpus.vocabulary=3")


def test_data_of_the_bigram_task_is_what_it_was_before_there_were_kinds() -> None:
    data = RunConfig().to_data()
    assert "kind" not in data["task"] and not {"zeroed", "warm_up", "decay"} & {*data["model"], *data["optimiser"]}
