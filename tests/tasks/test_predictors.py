"""Reference predictors against brute force: every trigger set, every output, every sequence of a tiny vocabulary."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from typed import present

from birthlens.analysis.behaviour import excess
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.errors import BirthlensError
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import BigramStatistics, markov_chain
from birthlens.tasks.predictors import reference as oracles
from birthlens.tasks.predictors.bag_of_tokens import bag_of_tokens
from birthlens.tasks.predictors.scores import SMOOTHING, reference_table
from birthlens.tasks.predictors.trigger_posterior import TriggerPosterior
from birthlens.tasks.roles import role_masks


def chain(n: int = 4, seed: int = 0) -> BigramStatistics:
    return markov_chain(CorpusConfig(source="markov", vocabulary=n, concentration=1.0, seed=seed))


def trigger_lists(task: BigramTask) -> list[tuple[tuple[int, ...], float]]:
    """Every ordered list of triggers with its probability."""
    k, unigram = task.config.n_triggers, task.statistics.unigram
    if task.fixed_triggers is not None:
        return [(tuple(task.fixed_triggers.tolist()), 1.0)]
    out = []
    for drawn in itertools.permutations(range(len(unigram)), k):
        p, left = 1.0, 1.0
        for token in drawn:
            p, left = p * unigram[token] / left, left - unigram[token]
        out.append((drawn, p))
    return out


def brute_force(task: BigramTask, tokens: list[int]) -> np.ndarray:
    """P(next | tokens), by summing over triggers and outputs, the likelihood of the prefix step by step."""
    n, bigram = len(task.statistics), task.statistics.bigram
    latents = task.config.show_latents
    answer = np.zeros(n)
    for triggers, p_triggers in trigger_lists(task):
        laws = task.output_distribution(np.array([triggers]))[0]
        for outputs in itertools.product(range(n), repeat=len(triggers)):
            weight = p_triggers * float(np.prod([laws[k, o] for k, o in enumerate(outputs)]))
            follow = dict(zip(triggers, outputs, strict=True))
            forced = list(triggers) if latents else []

            def law(t: int, last: int, follow: dict[int, int] = follow, forced: list[Any] = forced) -> np.ndarray:
                if t < len(forced):
                    return np.eye(n)[forced[t]]
                if t == len(forced):
                    return task.statistics.unigram
                return np.eye(n)[follow[last]] if last in follow else bigram[last]

            for t, token in enumerate(tokens):
                weight *= law(t, tokens[t - 1])[token]
            if weight > 0:
                answer += weight * law(len(tokens), tokens[-1])
    return answer / answer.sum()


CASES = [
    {"triggers": "fixed"},
    {"triggers": "fixed", "outputs": "bigram", "no_repeat": True},
    {"triggers": "fixed", "cycles": "clean", "outputs": "bigram"},
    {"triggers": "fixed", "show_latents": True},
    {"triggers": "fixed", "split": "train", "offset": 1},
    {"triggers": "random"},
    {"triggers": "random", "outputs": "bigram"},
    {"triggers": "random", "outputs": "bigram", "no_repeat": True},
    {"triggers": "random", "split": "train"},
    {"triggers": "random", "show_latents": True, "cycles": "clean"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_bayes_is_exact(case: dict[str, Any]) -> None:
    task = BigramTask(TaskConfig(context=7, n_triggers=2, **case), chain())
    batch = task.batch(6, seed=1)
    found = oracles.predict("bayes", task, batch)
    for row, sequence in enumerate(batch.tokens.tolist()):
        for t in range(7):
            expected = brute_force(task, sequence[: t + 1])
            np.testing.assert_allclose(found[row, t], expected, atol=1e-8, err_msg=f"{sequence[: t + 1]}")


@pytest.mark.parametrize("n_triggers", [1, 3, 4])
def test_posterior_is_exact_up_to_every_token_a_trigger(n_triggers: int) -> None:
    task = BigramTask(TaskConfig(context=6, n_triggers=n_triggers, triggers="random"), chain(seed=3))
    batch = task.batch(3, seed=2)
    found = oracles.predict("bayes", task, batch)
    for row, sequence in enumerate(batch.tokens.tolist()):
        np.testing.assert_allclose(found[row, -1], brute_force(task, sequence), atol=1e-8)


@pytest.mark.parametrize("outputs", ["uniform", "bigram"])
def test_clean_random_triggers_are_nearly_exact(outputs: Any) -> None:
    task = BigramTask(TaskConfig(context=8, n_triggers=2, triggers="random", cycles="clean", outputs=outputs), chain(5))
    batch = task.batch(8, seed=4)
    found = oracles.predict("bayes", task, batch)
    exact = np.array([[brute_force(task, row[: t + 1]) for t in range(8)] for row in batch.tokens.tolist()])
    divergence = (exact * (np.log(np.maximum(exact, 1e-300)) - np.log(np.maximum(found, 1e-300)))).sum(-1)
    assert divergence.mean() < 0.01
    # Neglecting the exclusion altogether is clearly worse, so the bound means something.
    blunt = BigramTask(TaskConfig(context=8, n_triggers=2, triggers="random", outputs=outputs), chain(5))
    worse = oracles.predict("bayes", blunt, batch)
    blunt_divergence = (exact * (np.log(np.maximum(exact, 1e-300)) - np.log(np.maximum(worse, 1e-300)))).sum(-1)
    assert blunt_divergence.mean() > 3 * divergence.mean()


def test_an_approximate_predictor_says_so_wherever_it_is_shown() -> None:
    """At 5 tokens and K = 3 it is clearly off the exact law, so no table may call it Bayes-optimal."""
    task = BigramTask(TaskConfig(context=6, n_triggers=3, triggers="random", cycles="clean"), chain(5))
    batch = task.batch(3, seed=4)
    found = oracles.predict("bayes", task, batch)
    exact = np.array([[brute_force(task, row[: t + 1]) for t in range(6)] for row in batch.tokens.tolist()])
    divergence = (exact * (np.log(np.maximum(exact, 1e-300)) - np.log(np.maximum(found, 1e-300)))).sum(-1)
    assert 0.003 < divergence.mean() < 0.2
    assert "0.05 nats at 5 tokens and K = 3" in task.approximation
    assert "bayes (approximate)" in set(reference_table(task, batch)["predictor"])
    assert "bayes" not in set(reference_table(task, batch)["predictor"])
    assert all(name.endswith("(approximate)") for name in excess.floors_table(task, batch)["estimator"])
    for other in ({"cycles": "published"}, {"show_latents": True}, {"triggers": "fixed"}, {"n_triggers": 1}):
        assert BigramTask(task.config.changed(**other), chain(5)).approximation == ""


def test_clean_output_law_is_exact_for_uniform_outputs() -> None:
    task = BigramTask(TaskConfig(context=4, n_triggers=2, triggers="random", cycles="clean"), chain(5))
    law = TriggerPosterior(task).output_law
    expected = np.zeros((5, 5))
    for triggers, p in trigger_lists(task):
        expected[list(triggers)] += p * task.output_distribution(np.array([triggers]))[0]
    np.testing.assert_allclose(law, expected / expected.sum(-1, keepdims=True), atol=1e-9)


def all_sequences(task: BigramTask, length: int) -> list[tuple[tuple[int, ...], float]]:
    """Every sequence of the law with its probability, for fixed triggers."""
    n, triggers = len(task.statistics), tuple(present(task.fixed_triggers).tolist())
    laws = task.output_distribution(np.array([triggers]))[0]
    mass: dict[tuple[int, ...], float] = {}
    for outputs in itertools.product(range(n), repeat=len(triggers)):
        rows = task.statistics.bigram.copy()
        rows[list(triggers)] = np.eye(n)[list(outputs)]
        weight = float(np.prod([laws[k, o] for k, o in enumerate(outputs)]))
        paths: dict[tuple[int, ...], float] = {(z,): weight * p for z, p in enumerate(task.statistics.unigram)}
        for _ in range(length - 1):
            paths = {(*s, z): p * q for s, p in paths.items() for z, q in enumerate(rows[s[-1]]) if q > 0}
        for s, p in paths.items():
            mass[s] = mass.get(s, 0.0) + p
    return [(s, p) for s, p in mass.items() if p > 0]


def as_batch(task: BigramTask, sequences: list[tuple[int, ...]]) -> TokenBatch:
    ids = torch.tensor(sequences)
    triggers = torch.from_numpy(np.repeat(present(task.fixed_triggers)[None], len(ids), 0))
    zeros = torch.zeros_like(ids[:, :-1])
    return TokenBatch(ids[:, :-1], ids[:, 1:], triggers, triggers, zeros, zeros.bool())


def test_bag_is_between_the_exact_blind_predictor_and_the_law_of_one_output() -> None:
    task = BigramTask(TaskConfig(context=7, n_triggers=1, cycles="clean"), chain(4, seed=2))
    sequences = all_sequences(task, 8)
    joint: dict[tuple[Any, ...], np.ndarray] = {}
    for s, p in sequences:
        key = (s[6], tuple(sorted(s[:7])))
        joint.setdefault(key, np.zeros(4))[s[7]] += p
    exact = -sum(float((q * np.log(np.maximum(q / q.sum(), 1e-300))).sum()) for q in joint.values())
    batch, mass = as_batch(task, [s for s, _ in sequences]), np.array([p for _, p in sequences])
    loss = {
        name: float(mass @ oracles.cross_entropy(oracles.predict(name, task, batch), batch.targets.numpy())[:, -1])
        for name in ("bag", "bayes")
    }
    first = oracles.predict("bayes", task, batch)
    trigger = batch.tokens.numpy()[:, -1] == present(task.fixed_triggers)[0]
    first[trigger, -1] = task.output_distribution(present(task.fixed_triggers)[None])[0, 0]
    no_memory = float(mass @ oracles.cross_entropy(first, batch.targets.numpy())[:, -1])
    assert loss["bayes"] < exact < loss["bag"] < no_memory
    assert loss["bag"] - exact < 0.2 * (no_memory - exact)


def exactly_blind(task: BigramTask, length: int) -> dict[tuple[int, tuple[int, ...]], np.ndarray]:
    """P(last token, multiset, next token) for fixed triggers: sums over all orders, by walking through multisets."""
    n, triggers = len(task.statistics), present(task.fixed_triggers).tolist()
    laws = task.output_distribution(np.array([triggers]))[0]
    joint: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}
    for outputs in itertools.product(range(n), repeat=len(triggers)):
        rows = task.statistics.bigram.copy()
        rows[triggers] = np.eye(n)[list(outputs)]
        weight = float(np.prod([laws[k, o] for k, o in enumerate(outputs)]))
        mass = {(z, tuple(np.eye(n, dtype=int)[z])): weight * task.statistics.unigram[z] for z in range(n)}
        for _ in range(length - 1):
            longer: dict[tuple[int, tuple[int, ...]], float] = {}
            for (z, counts), p in mass.items():
                for y in np.flatnonzero(rows[z]).tolist():
                    key = (y, (*counts[:y], counts[y] + 1, *counts[y + 1 :]))
                    longer[key] = longer.get(key, 0.0) + p * rows[z, y]
            mass = longer
        for key, p in mass.items():
            joint[key] = joint.get(key, np.zeros(n)) + p * rows[key[0]]
    return {key: p for key, p in joint.items() if p.sum() > 0}


@pytest.mark.parametrize(("cycles", "accuracies", "losses"), [
    ("published", (0.869, 0.817), (0.300, 0.377)), ("clean", (0.796, 0.776), (0.376, 0.385)),
])  # fmt: skip
def test_bag_is_as_far_from_the_exact_blind_predictor_as_its_module_says(
    cycles: Any, accuracies: tuple[float, float], losses: tuple[float, float]
) -> None:
    task = BigramTask(TaskConfig(context=9, n_triggers=2, cycles=cycles), chain(5))
    joint = exactly_blind(task, 9)
    total = sum(p.sum() for p in joint.values())
    assert total == pytest.approx(1)
    asked = {k: p for k, p in joint.items() if k[0] in present(task.fixed_triggers) and k[1][k[0]] >= 2}
    mass = np.array(list(asked.values()))
    # The bag sees no order, so any order of the multiset that ends with the last token will do.
    rest = [np.repeat(np.arange(5), np.array(counts) - np.eye(5, dtype=int)[z]).tolist() for z, counts in asked]
    batch = as_batch(task, [(*before, z, 0) for before, (z, _) in zip(rest, asked, strict=True)])
    bag = oracles.predict("bag", task, batch)[:, -1]
    exact = mass / mass.sum(1, keepdims=True)
    reached = [float(np.take_along_axis(mass, p.argmax(1)[:, None], 1).sum() / mass.sum()) for p in (exact, bag)]
    loss = [float(-(mass * np.log(np.maximum(p, 1e-300))).sum() / mass.sum()) for p in (exact, bag)]
    np.testing.assert_allclose(reached, accuracies, atol=5e-4)
    np.testing.assert_allclose(loss, losses, atol=5e-4)


def test_bag_does_not_see_order() -> None:
    task = BigramTask(TaskConfig(context=12, n_triggers=2), chain(6))
    batch = task.batch(5, seed=0)
    order = torch.cat([torch.randperm(11, generator=torch.Generator().manual_seed(0)), torch.tensor([11])])
    shuffled = TokenBatch(
        batch.tokens[:, order],
        *(getattr(batch, f) for f in ("targets", "triggers", "outputs", "occurrence", "absorbed")),
    )
    np.testing.assert_allclose(bag_of_tokens(task, batch)[:, -1], bag_of_tokens(task, shuffled)[:, -1])


@pytest.mark.parametrize("triggers", ["fixed", "random"])
@pytest.mark.parametrize("switches", [{}, {"cycles": "clean"}, {"show_latents": True}, {"outputs": "bigram"}])
def test_predictors_are_laws_and_bayes_is_best(triggers: Any, switches: dict[str, Any]) -> None:
    task = BigramTask(TaskConfig(context=48, n_triggers=3, triggers=triggers, **switches), chain(12))
    batch = task.batch(200, seed=5)
    targets, loss = batch.targets.numpy(), {}
    for name in oracles.PREDICTORS:
        p = oracles.predict(name, task, batch)
        assert p.shape == (200, 48, 12) and p.dtype == np.float64 and p.min() >= 0
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-9)
        loss[name] = oracles.cross_entropy(p if name == "bayes" else oracles.smoothed(p, 0.01), targets).mean()
    assert min(loss, key=loss.__getitem__) == "bayes" and np.isfinite(loss["bayes"])


@pytest.mark.parametrize("triggers", ["fixed", "random"])
def test_what_is_in_context_is_certain_once_the_triggers_are_known(triggers: Any) -> None:
    task = BigramTask(TaskConfig(context=40, n_triggers=4, triggers=triggers, show_latents=True), chain(12))
    batch = task.batch(100, seed=3)
    loss = oracles.cross_entropy(oracles.predict("bayes", task, batch), batch.targets.numpy())
    assert batch.in_context.any() and (loss[batch.in_context.numpy()] == 0).all()
    assert loss[(batch.occurrence == 1).numpy()] == pytest.approx(np.log(12))
    unigram = -np.log(task.statistics.unigram[batch.targets[:, 3].numpy()])
    np.testing.assert_allclose(loss[:, 3], unigram)


def test_no_triggers_is_the_global_chain() -> None:
    task = BigramTask(TaskConfig(context=6, n_triggers=0, triggers="random"), chain())
    batch = task.batch(4, seed=0)
    for name in ("bayes", "bag"):
        np.testing.assert_array_equal(oracles.predict(name, task, batch), oracles.predict("bigram", task, batch))


def test_floors_are_the_losses_bayes_meets() -> None:
    task = BigramTask(TaskConfig(context=32, n_triggers=3), chain(12))
    floors = excess.floors_table(task, task.batch(300, seed=1)).set_index("role")
    fresh = task.batch(2000, seed=2)
    loss = oracles.cross_entropy(oracles.predict("bayes", task, fresh), fresh.targets.numpy())
    for role, mask in role_masks(fresh).items():
        mean, error = excess.clustered_mean(loss, mask.numpy())
        assert abs(mean - floors.floor[role]) < 4 * np.hypot(error, floors.error[role]) + 1e-9, role
    assert floors.floor["in_context"] == 0 and floors.floor["first_occurrence"] == pytest.approx(np.log(12))


def test_excess_of_a_predictor_over_itself_is_zero_and_it_is_its_own_nearest() -> None:
    task = BigramTask(TaskConfig(context=24, n_triggers=2), chain(6))
    batch = task.batch(32, seed=3)
    probabilities = oracles.smoothed(oracles.predict("bag", task, batch), SMOOTHING)
    logits = torch.from_numpy(np.log(probabilities))
    table = excess.excess_loss_table(logits, task, batch)
    own = table[table.predictor == "bag"]
    assert np.abs(own.excess).max() < 1e-9 and set(own["by"]) == {"role", "occurrence", "position"}
    assert own[own["by"] == "position"].n.sum() == own[own["by"] == "occurrence"].n.sum() == batch.tokens.numel()
    bigram = torch.from_numpy(np.log(oracles.smoothed(oracles.predict("bigram", task, batch), 1e-6)))
    trace = excess.divergence_table([(0, torch.zeros_like(bigram)), (9, bigram)], task, batch)
    everywhere = trace[(trace.role == "all") & trace.nearest].set_index("step").predictor
    assert everywhere.to_dict() == {0: "uniform", 9: "bigram"}
    divergence = trace[trace.step.eq(0) & trace.role.eq("all") & trace.predictor.eq("unigram")].divergence.item()
    unigram = task.statistics.unigram
    assert divergence == pytest.approx(float((unigram * np.log(unigram * 6)).sum()))


def test_bad_input_is_named() -> None:
    task = BigramTask(TaskConfig(context=4, n_triggers=1), chain())
    with pytest.raises(BirthlensError, match="predictor = 'oracle' is unknown"):
        oracles.predict("oracle", task, task.batch(1, 0))
    with pytest.raises(BirthlensError, match="smoothing = 2"):
        oracles.smoothed(np.ones(2) / 2, 2.0)
