"""The interface of a task: everything that training, probes, interventions and reports need and that depends on the task.

A task is a class with a config section, a vocabulary with a global chain, and a distribution from which token batches are
drawn. Only `sample` must be written; the other parts have defaults that say "this task has none".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from birthlens.config.task import TaskSection
from birthlens.errors import BirthlensError
from birthlens.labels import label
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.roles import role_masks

Array = np.ndarray
HELD_OUT = 2**40
"""Index of the held-out batch of training; no training run reaches it, so equal seeds share no batch."""

Predictor = Callable[[Any, TokenBatch], Float[Array, "batch pos d_vocab"]]
"""Maps a task and a batch to the probabilities of the next token at every position."""


@dataclass(frozen=True)
class ExpectedMemory:
    """An association that a solution of the task should store, and where to read it.

    `circuit` names a memory as `analysis.memories.names.memory_named` takes it, for instance "output_memory" or
    "L0H0.OV: W_E -> W_U". Entry i of `queries` should be answered by entry i of `answers`; chance is one in the number of
    the circuit's outputs.
    """

    name: str
    circuit: str
    queries: tuple[int, ...]
    answers: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.answers) or not self.queries:
            raise BirthlensError(
                f"memory {self.name!r} has {len(self.queries)} queries and {len(self.answers)} answers; "
                "give one answer for each query, and at least one."
            )


class Task(ABC):
    """A distribution of token sequences, and what is known about it.

    `statistics` is the global chain over the task's whole vocabulary, including special tokens. `roles` describes the roles
    of positions that matter for the task; their masks come with each batch. `corruptions` names those that make sense for
    patching, the default first: those of `interventions.corruptions`, and those that the task defines in `corrupted`.
    """

    Config: ClassVar[type[TaskSection]]
    needs_corpus: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    """Whether the task reads the corpus's text itself (`chain_of_text`), and not only its statistics (`chain`)."""
    title: ClassVar[str] = ""
    roles: ClassVar[Mapping[str, str]] = {}
    corruptions: ClassVar[tuple[str, ...]] = ("other_sequence",)
    shown_roles: ClassVar[Mapping[str, str]] = {"in_context": "in-context", "global": "global"}
    """The roles that reports and figures draw, with their names in a sentence; the headline comes first."""
    shown_predictors: ClassVar[tuple[str, ...]] = ()
    """The predictors that reports and figures draw; empty for all of them."""
    predictors_home: ClassVar[str] = ""
    """Where the table of the reference predictors is, from the least to the best informed, as module:NAME."""

    def __init__(self, config: Any, statistics: BigramStatistics) -> None:
        self.config = config
        self.statistics = statistics

    @classmethod
    def chain(cls, config: Any, corpus: BigramStatistics | None) -> BigramStatistics:
        """Return the global chain over the task's vocabulary, made from the corpus's (None if it needs none)."""
        assert corpus is not None
        return corpus

    @classmethod
    def chain_of_text(cls, config: Any, text: str) -> BigramStatistics:
        """Return the global chain of a task that `needs_text`."""
        raise NotImplementedError(f"{cls.__name__} has needs_text and no chain_of_text.")

    @property
    def fixed_triggers(self) -> Int[Array, "n_triggers"] | None:
        """Ids of the triggers that all sequences share, or None if there are none."""
        return None

    @property
    def roles_are_known(self) -> bool:
        """Whether the prefix determines the role of its last token, so that entropies can replace losses."""
        return True

    @property
    def exact(self) -> str | None:
        """The predictor that is the exact distribution of the next token given the prefix; None if there is none."""
        return None

    @property
    def approximation(self) -> str:
        """How far `exact` is from the exact distribution if it is an approximation; empty if it is exact."""
        return ""

    def shown_as(self, predictor: str) -> str:
        """Return the name of a predictor in tables: `exact` is marked if it is an approximation.

        Example:
            >>> from birthlens.config.task import TaskConfig
            >>> from birthlens.tasks.bigram import BigramTask
            >>> from birthlens.tasks.corpus import from_text
            >>> task = BigramTask(TaskConfig(n_triggers=2, triggers="random", cycles="clean"), from_text("to be or not"))
            >>> task.shown_as("bayes"), task.shown_as("bag")
            ('bayes (approximate)', 'bag')
        """
        return f"{predictor} (approximate)" if self.approximation and predictor == self.exact else predictor

    @property
    def headline(self) -> str:
        """The role whose accuracy shows whether the task has been learned."""
        return next(iter(self.shown_roles))

    @property
    def setting(self) -> str:
        """The task's own settings in a few words, for a single line."""
        return str(self.config.kind)

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow, as the end of "... was trained to predict the next token in sequences".

        `source` names the corpus; `labels` are the tokens in readable form.
        """
        return f"of {self.config.context} tokens of the task {self.config.kind} ({len(self.statistics)} tokens)."

    @property
    def terms(self) -> Mapping[str, str]:
        """The terms of a report about the task, with their meanings: by default its shown roles and its predictors."""
        roles = {f"{said} target": self.roles[role] for role, said in self.shown_roles.items() if role in self.roles}
        found = {term: f"{meaning[0].upper()}{meaning[1:]}." for term, meaning in roles.items()}
        for name, predictor in self.predictors.items():
            if said := " ".join((predictor.__doc__ or "").split("\n\n")[0].split()):
                found[label(self.shown_as(name))] = f"A reference predictor: {said.removeprefix('Return ')}"
        return found

    @property
    def memories(self) -> tuple[ExpectedMemory, ...]:
        """The associations that a solution should store, besides those of the paper's two-layer model."""
        return ()

    @abstractmethod
    def sample(self, n: int, generator: np.random.Generator) -> TokenBatch:
        """Draw n sequences; the same state of the generator gives the same batch."""

    def corrupted(self, name: str, batch: TokenBatch, generator: np.random.Generator) -> TokenBatch:
        """Return a batch whose sequences take the place of those of `batch`, row by row, for a corruption of this task.

        "other_sequence" draws new sequences.

        Raises:
            BirthlensError: for a corruption that the task does not define.
        """
        if name != "other_sequence":
            raise BirthlensError(
                f"corruption = {name!r} is not defined for the run's task; it defines {', '.join(self.corruptions)}."
            )
        return checked_batch(self, self.sample(len(batch), generator), len(batch))

    def batch(self, n: int, seed: int, index: int = 0) -> TokenBatch:
        """Draw batch number `index` of the stream `seed`; it depends on nothing else, so any batch can be drawn again."""
        return self.sample(n, np.random.default_rng([seed, index]))

    @property
    def predictors(self) -> Mapping[str, Predictor]:
        """The reference predictors by name, from the least to the best informed; empty if the task has none."""
        if not self.predictors_home:
            return {}
        module, _, name = self.predictors_home.partition(":")
        return getattr(import_module(module), name)

    def check_loss(self, loss: str) -> None:
        """Raise BirthlensError if `training.loss` names no role that positions of this task can have."""
        valid = ("all", *(role for role in self.roles if role != "all"))
        if loss not in valid:
            raise BirthlensError(f"training.loss = {loss!r} is not a role of this task; valid are {', '.join(valid)}.")

    def loss_mask(self, batch: TokenBatch, loss: str) -> Bool[Tensor, "batch pos"]:
        """Return the positions whose loss is trained on, for `training.loss`: the name of a role.

        Raises:
            BirthlensError: for a name that is not a role of the task; the message lists the valid ones.
        """
        masks = role_masks(batch)
        if loss not in masks:
            raise BirthlensError(f"training.loss = {loss!r}: the batch has no such role; it has {', '.join(masks)}.")
        return masks[loss]


def checked_batch(task: Task, batch: object, n: int) -> TokenBatch:
    """Return a batch that a user's own task drew, or say which part of it violates the protocol.

    Raises:
        BirthlensError: if `sample` returned anything but a TokenBatch of the right shape, vocabulary and marks.
    """
    where = f"{type(task).__name__}.sample({n})"
    if not isinstance(batch, TokenBatch):
        raise BirthlensError(f"{where} returned a {type(batch).__name__}; it must return a TokenBatch.")
    shape = (n, task.config.context)
    d_vocab = len(task.statistics)
    for name, ids in (("tokens", batch.tokens), ("targets", batch.targets)):
        if tuple(ids.shape) != shape or ids.dtype != torch.int64:
            raise BirthlensError(
                f"{where} returned {name} of shape {tuple(ids.shape)} and type {ids.dtype}; it must be {shape}, torch.int64."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < d_vocab:
            raise BirthlensError(
                f"{where} returned {name} from {int(ids.min())} to {int(ids.max())}; valid are 0 to {d_vocab - 1}."
            )
    _check_marks(where, batch.marks, shape)
    _check_marks(where, role_masks(batch), shape)
    return batch


def _check_marks(where: str, marks: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    for name, mask in marks.items():
        found = tuple(getattr(mask, "shape", ()))
        kind = getattr(mask, "dtype", type(mask).__name__)
        if not isinstance(mask, Tensor) or found != shape or kind != torch.bool:
            raise BirthlensError(
                f"{where} returned the mark {name!r} of shape {found} and type {kind}; it must be {shape}, torch.bool."
            )


def plain_batch(
    tokens: Int[Array, "batch pos_plus_one"],
    occurrence: Int[Array, "batch pos"],
    marks: Mapping[str, Bool[Array, "batch pos"]],
) -> TokenBatch:
    """Make a batch of whole sequences (inputs and, shifted by one place, targets) without outputs of their own."""
    sequences = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
    nothing = sequences.new_zeros(len(sequences), 0)
    return TokenBatch(
        tokens=sequences[:, :-1],
        targets=sequences[:, 1:],
        triggers=nothing,
        outputs=nothing,
        occurrence=torch.from_numpy(np.ascontiguousarray(occurrence, dtype=np.int64)),
        absorbed=torch.zeros_like(sequences[:, :-1], dtype=torch.bool),
        marks={name: torch.from_numpy(np.ascontiguousarray(mask)) for name, mask in marks.items()},
    )


def sequences_of(batch: TokenBatch) -> Int[Array, "batch pos_plus_one"]:
    """Return a copy of whole sequences: the inputs, and the last target."""
    return torch.cat([batch.tokens, batch.targets[:, -1:]], 1).numpy().copy()


def others_of(
    tokens: Int[Array, "*place"], among: Int[Array, "choice"], shift: Int[Array, "*place"]
) -> Int[Array, "*place"]:
    """Return for each token another one of an ascending list that holds it, `shift` places further, from its end on again.

    Example:
        >>> others_of(np.array([2, 7]), np.array([2, 5, 7]), np.array([1, 1])).tolist()
        [5, 2]
    """
    return np.asarray(among[(np.searchsorted(among, tokens) + shift) % len(among)])


def shifts(among: Int[Array, "choice"], shape: tuple[int, ...], generator: np.random.Generator) -> Int[Array, "..."]:
    """Draw shifts for `others_of`, which lead to another token unless there is only one."""
    return generator.integers(1, max(len(among), 2), size=shape)
