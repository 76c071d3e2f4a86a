"""When a model learns facts: the linear attention model of factual recall, reduced to one vote for each token.

With one-hot embeddings and no positions, linear attention at the `<eos>` query gives

    logits = sum_z c_z q_z V_z        c_z: number of times token z is in the sequence; q: its key; V_z: its vote for answers

(Nichani, Lee, Bietti 2024, arXiv 2412.06538). Near zero, q_z and V_z grow together, at a rate set by the gradient
G_z = E[c_z (1_y - p_hat)], the information of z about the answer. From a small init, token z escapes at about

    t_z = log(1 / init) / (rate |G_z|)        |G_r| = (1/R) sqrt(1/D - 1/A)        |G_s| = (1/S) sqrt(1/R - 1/A)

with S subjects, R relations, D answers to each relation and A = R D answers, if facts are spread evenly. Noise tokens and
`<eos>` have G = 0. The formula is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax

from birthlens.config.task import FactsConfig
from birthlens.shapes import Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.facts import FactsTask, named

Array = np.ndarray


@dataclass(frozen=True)
class Descent:
    """Stochastic gradient descent from q = V = init: its rate, the sequences in each step, and the number of steps."""

    rate: float = 1.0
    batch: int = 256
    steps: int = 800
    init: float = 1e-5


def escape_times(config: FactsConfig, descent: Descent) -> tuple[float, float]:
    """Return the predicted steps at which relations and subjects escape, for facts that are spread evenly.

    Example:
        >>> relation, subject = escape_times(FactsConfig(subjects=16, relations=4, answers=8), Descent())
        >>> round(relation), round(subject)
        (150, 394)
    """
    answers = config.relations * config.answers
    of_relation = np.sqrt(1 / config.answers - 1 / answers) / config.relations
    of_subject = np.sqrt(1 / config.relations - 1 / answers) / config.subjects
    growth = np.log(1 / descent.init) / descent.rate
    return float(growth / of_relation), float(growth / of_subject)


def stage_table(
    task: FactsTask, descent: Descent, seed: int = 0, every: int = 10, evaluated: int = 512
) -> pd.DataFrame:
    """Run the descent and evaluate it on the same new sequences at each evaluated step.

    Columns: step, loss, relation_accuracy (the predicted answer is one of the relation's), fact_accuracy, relation_kl
    (KL from p(answer | relation) to the model), relation_key, subject_key (means of q).
    """
    generator = np.random.default_rng(seed)
    held_out = task.sample(evaluated, np.random.default_rng((seed, 1)))
    laws = np.zeros((task.config.relations, task.config.relations * task.config.answers))
    for relation in range(task.config.relations):
        np.add.at(laws[relation], task.facts[:, relation] - task.eos - 1, 1 / task.config.subjects)
    keys = np.full(task.eos + 1, descent.init)
    votes = np.full((task.eos + 1, laws.shape[1]), descent.init)
    rows = []
    for step in range(descent.steps + 1):
        if step % every == 0:
            rows.append((step, *_scores(task, keys, votes, held_out, laws)))
        batch = task.sample(descent.batch, generator)
        counts = counts_of(task, batch)
        wrong = softmax((counts * keys) @ votes, axis=1)
        wrong[np.arange(len(wrong)), _answers(task, batch)] -= 1
        on_votes = (counts * keys).T @ wrong / len(wrong)
        on_keys = (counts * (wrong @ votes.T)).mean(0)
        votes = votes - descent.rate * on_votes
        keys = keys - descent.rate * on_keys
    columns = ["step", "loss", "relation_accuracy", "fact_accuracy", "relation_kl", "relation_key", "subject_key"]
    return pd.DataFrame(rows, columns=columns)


def counts_of(task: FactsTask, batch: TokenBatch) -> Float[Array, "batch token"]:
    """Count how often each input token is in each sequence."""
    return np.eye(task.eos + 1)[batch.tokens.numpy()].sum(1)


def _scores(
    task: FactsTask,
    keys: Float[Array, "token"],
    votes: Float[Array, "token answer"],
    batch: TokenBatch,
    laws: Float[Array, "relation answer"],
) -> tuple[float, ...]:
    probabilities = softmax((counts_of(task, batch) * keys) @ votes, axis=1)
    answers = _answers(task, batch)
    _, relation = named(task, batch)
    predicted = probabilities.argmax(1)
    law = laws[relation]
    ratio = np.log(np.where(law > 0, law, 1) / np.maximum(probabilities, 1e-300))
    first = task.first_relation
    return (
        float(-np.log(probabilities[np.arange(len(answers)), answers]).mean()),
        float((predicted // task.config.answers == relation).mean()),
        float((predicted == answers).mean()),
        float((law * ratio).sum(1).mean()),
        float(keys[first : first + task.config.relations].mean()),
        float(keys[:first].mean()),
    )


def _answers(task: FactsTask, batch: TokenBatch) -> Int[Array, "batch"]:
    return batch.targets[:, -1].numpy() - task.eos - 1
