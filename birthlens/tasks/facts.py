"""Factual recall (Nichani, Lee, Bietti 2024): a subject and a relation among noise tokens; the answer is a stored fact.

    noise ... subject ... noise ... relation ... noise <eos>   ->   a(subject, relation)

Subject and relation are uniform and at different uniform places, in any order. Relation r has its own answers. The
published model has a separate vocabulary for answers. Here they are the last tokens of one vocabulary for both sides, so a
model scores all tokens, and has to learn first that answers follow `<eos>`. Only that target counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from birthlens.config.task import FactsConfig
from birthlens.labels import counted
from birthlens.shapes import Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.task import ExpectedMemory, Predictor, Task, others_of, plain_batch, sequences_of, shifts

Array = np.ndarray


class FactsTask(Task):
    """Sample batches of facts. Ids: subjects, relations, noise tokens, `<eos>`, answers (those of relation 0 first)."""

    Config = FactsConfig
    needs_corpus = False
    title = "factual recall"
    roles = {"fact": "the last position: the answer of the sequence's subject and relation follows"}
    shown_roles = {"fact": "fact"}
    corruptions = ("other_subject", "other_relation", "other_sequence")
    config: FactsConfig

    @classmethod
    def chain(cls, config: FactsConfig, corpus: BigramStatistics | None) -> BigramStatistics:
        """Return the vocabulary; its chain is uniform, because the last token alone determines nothing."""
        answers = [f"r{r}a{a}" for r in range(config.relations) for a in range(config.answers)]
        vocab = (
            *(f"s{i}" for i in range(config.subjects)),
            *(f"r{i}" for i in range(config.relations)),
            *(f"n{i}" for i in range(config.noise_tokens)),
            "<eos>",
            *answers,
        )
        n = len(vocab)
        return BigramStatistics(vocab, np.full(n, 1 / n), np.full((n, n), 1 / n))

    @property
    def first_relation(self) -> int:
        """Id of relation 0; the subjects come before it."""
        return self.config.subjects

    @property
    def eos(self) -> int:
        """Id of `<eos>`."""
        return self.config.subjects + self.config.relations + self.config.noise_tokens

    @cached_property
    def facts(self) -> Int[Array, "subject relation"]:
        """The id of the answer of each subject and relation."""
        config = self.config
        shape = (config.subjects, config.relations)
        if config.structured:
            subjects = np.arange(config.subjects)[:, None]
            chosen = np.broadcast_to(subjects * config.answers // config.subjects, shape)
        else:
            chosen = np.random.default_rng(config.facts_seed).integers(config.answers, size=shape)
        return self.eos + 1 + np.arange(config.relations) * config.answers + chosen

    @property
    def exact(self) -> str | None:
        """The predictor that is the exact distribution of the next token given the prefix."""
        return "fact"

    @property
    def setting(self) -> str:
        """The number of facts."""
        return f"{self.config.subjects} subjects x {self.config.relations} relations"

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors, from the least to the best informed."""
        return PREDICTORS

    @property
    def memories(self) -> tuple[ExpectedMemory, ...]:
        """What one attention layer should write: each subject votes for its answers, each relation for its own."""
        subjects = np.repeat(np.arange(self.config.subjects), self.config.relations)
        return (
            ExpectedMemory("subject_memory", "L0.OV", tuple(subjects.tolist()), tuple(self.facts.reshape(-1).tolist())),
        )

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        config = self.config
        return (
            f"of {config.context} tokens: one of {counted(config.subjects, 'subject')} and one of "
            f"{counted(config.relations, 'relation')} stand among noise tokens, and <eos> comes last. What follows it is "
            f"the answer of the pair, one of the {config.answers} answers of the relation. Nothing can be copied from the "
            "context: facts must be stored in the weights."
        )

    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n sequences; the same state of the generator gives the same batch."""
        config = self.config
        context = config.context
        noise = config.subjects + config.relations + generator.integers(config.noise_tokens, size=(n, context))
        subject = generator.integers(config.subjects, size=n)
        relation = generator.integers(config.relations, size=n)
        places = np.argsort(generator.random((n, context - 1)), axis=1)[:, :2]
        each = np.arange(n)
        tokens = np.concatenate([noise, self.facts[subject, relation][:, None]], axis=1)
        tokens[each, places[:, 0]] = subject
        tokens[each, places[:, 1]] = self.first_relation + relation
        tokens[:, context - 1] = self.eos
        return self._labelled(tokens)

    def corrupted(self, name: str, batch: TokenBatch, generator: np.random.Generator) -> TokenBatch:
        """Return corrupted sequences: with another subject, or another relation, and the answer of the new pair."""
        if name not in ("other_subject", "other_relation"):
            return super().corrupted(name, batch, generator)
        tokens = sequences_of(batch)
        subject, relation = named(self, batch)
        if name == "other_subject":
            others = np.arange(self.config.subjects)
            new = others_of(subject, others, shifts(others, subject.shape, generator))
            tokens = np.where(tokens == subject[:, None], new[:, None], tokens)
            subject = new
        else:
            others = np.arange(self.config.relations)
            new = others_of(relation, others, shifts(others, relation.shape, generator))
            old = self.first_relation + relation[:, None]
            tokens = np.where(tokens == old, self.first_relation + new[:, None], tokens)
            relation = new
        tokens[:, -1] = self.facts[subject, relation]
        return self._labelled(tokens)

    def _labelled(self, tokens: Int[Array, "batch pos_plus_one"]) -> TokenBatch:
        n = len(tokens)
        context = self.config.context
        last = np.zeros((n, context), dtype=bool)
        last[:, -1] = True
        nowhere = np.zeros_like(last)
        marks = {"fact": last, "all": last, "global": nowhere, "in_context": nowhere}
        return plain_batch(tokens, np.zeros((n, context), dtype=np.int64), marks)


def named(task: FactsTask, batch: TokenBatch) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """Return the subject and the relation of each sequence."""
    tokens = batch.tokens.numpy()
    first = task.first_relation
    end = task.first_relation + task.config.relations
    each = np.arange(len(tokens))
    subject = tokens[each, (tokens < first).argmax(1)]
    relation = tokens[each, ((tokens >= first) & (tokens < end)).argmax(1)] - first
    return subject, relation


def _everywhere(
    task: FactsTask, batch: TokenBatch, last: Float[Array, "batch d_vocab"]
) -> Float[Array, "batch pos d_vocab"]:
    """Return a distribution at the last position, and the uniform distribution where there is no target."""
    n = len(task.statistics)
    found = np.full((*batch.tokens.shape, n), 1 / n)
    found[:, -1] = last
    return found


def uniform(task: FactsTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the same probability for every answer."""
    last = np.zeros((len(batch), len(task.statistics)))
    last[:, task.eos + 1 :] = 1 / (task.config.relations * task.config.answers)
    return _everywhere(task, batch, last)


def by_relation(task: FactsTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return p(answer | relation), the subject being unknown."""
    _, relation = named(task, batch)
    laws = np.zeros((task.config.relations, len(task.statistics)))
    for r in range(task.config.relations):
        np.add.at(laws[r], task.facts[:, r], 1 / task.config.subjects)
    return _everywhere(task, batch, laws[relation])


def by_subject(task: FactsTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return p(answer | subject), the relation being unknown."""
    subject, _ = named(task, batch)
    laws = np.zeros((task.config.subjects, len(task.statistics)))
    for s in range(task.config.subjects):
        np.add.at(laws[s], task.facts[s], 1 / task.config.relations)
    return _everywhere(task, batch, laws[subject])


def fact(task: FactsTask, batch: TokenBatch) -> Float[Array, "batch pos d_vocab"]:
    """Return the answer of the subject and the relation."""
    subject, relation = named(task, batch)
    return _everywhere(task, batch, np.eye(len(task.statistics))[task.facts[subject, relation]])


PREDICTORS: Mapping[str, Predictor] = {
    "uniform": uniform,
    "subject": by_subject,
    "relation": by_relation,
    "fact": fact,
}
"""The predictors by name, from the least to the best informed."""
