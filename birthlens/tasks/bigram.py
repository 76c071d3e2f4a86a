"""The task of paper section 4.1: global bigrams from a corpus, overridden by K in-context bigrams trigger -> output.

triggers q_1..q_K   fixed: the most frequent tokens after `offset`; random: from pi_u without replacement, each sequence
outputs  o_1..o_K   uniform, or pi_b(. | q_k); without the trigger itself (no_repeat), without the sequence's triggers
                    (cycles: clean), from a part of the vocabulary (split)
tokens              z_1 ~ pi_u; z_{t+1} = o_k if z_t = q_k, else ~ pi_b(. | z_t)
                    show_latents: q_1..q_K come before z_1; the list takes no part in the rule and is not counted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from birthlens.config.task import TaskConfig
from birthlens.errors import BirthlensError
from birthlens.labels import counted
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.corpus import BigramStatistics
from birthlens.tasks.sampling import Categorical, chain, uniforms
from birthlens.tasks.task import Task

Array = np.ndarray


TERMS: Mapping[str, str] = {
    "trigger, output": "A trigger is a token whose usual successor is overridden in a sequence: the output, a new one for "
    "each sequence, follows it every time.",
    "in-context target": "What follows a trigger from its second time on: predictable from the context only.",
    "global target": "What follows a token that is not a trigger; it is drawn from the bigrams of the corpus.",
    "absorbed": "Positions from which every token is a trigger, because each trigger's output is itself a trigger. Copying "
    "is easy there, so the accuracy is also given without them.",
    "uniform, unigram, bigram": "Predictors that use no information, the frequencies of tokens, or the bigrams of the "
    "corpus.",
    "bag of tokens": "A predictor that uses which tokens occur in the sequence and how often, but not their order.",
    "Bayes-optimal": "The predictor that knows the task and all of the context. It is the best on average over all "
    "positions; at one kind of position another predictor may be better.",
}
"""The terms of a report, with their meanings."""


class BigramTask(Task):
    """Sample batches of the task.

    Raises:
        BirthlensError: if the triggers do not fit the vocabulary, or no output token is left to draw.

    Example:
        >>> from birthlens.tasks.corpus import from_text
        >>> task = BigramTask(TaskConfig(context=16, n_triggers=2), from_text("to be or not to be"))
        >>> batch = task.sample(3, np.random.default_rng(0))
        >>> tuple(batch.tokens.shape), bool((batch.tokens[:, 1:] == batch.targets[:, :-1]).all())
        ((3, 16), True)
    """

    Config = TaskConfig
    title = "global and in-context bigrams"
    roles = {
        "in_context": "a trigger that occurred before: its output is known from the context, and from nothing else",
        "in_context_unabsorbed": "the same without absorbed positions, which are free copies",
        "first_occurrence": "a trigger's first occurrence: what follows cannot be predicted",
        "global": "a token that is not a trigger: the next token follows the bigrams of the corpus",
    }
    shown_predictors = ("uniform", "unigram", "bigram", "bag", "bayes")
    corruptions = ("other_outputs", "first_replaced", "triggers_swapped", "shifted")
    predictors_home = "birthlens.tasks.predictors.reference:PREDICTORS"
    config: TaskConfig

    def __init__(self, config: TaskConfig, statistics: BigramStatistics) -> None:
        super().__init__(config, statistics)
        n = len(statistics)
        k = config.n_triggers
        possible = n - config.offset if config.triggers == "fixed" else int((statistics.unigram > 0).sum())
        if k > max(possible, 0):
            raise BirthlensError(
                f"task.n_triggers = {k}: the vocabulary of {n} tokens leaves {max(possible, 0)} "
                f"(task.triggers = {config.triggers!r}, task.offset = {config.offset}); choose at most that many."
            )
        self._triggers_of_all = fixed_triggers(config, statistics)
        self._allowed = _split_mask(config, n)
        self._first = Categorical(statistics.unigram[None])
        self._rows = Categorical(statistics.bigram)
        self._fixed_outputs = None
        if self.fixed_triggers is not None:
            self._fixed_outputs = Categorical(self.output_distribution(self.fixed_triggers[None])[0])
        else:
            excluded = k if config.cycles == "clean" else int(config.no_repeat)
            if int(self._allowed.sum()) <= excluded:
                raise _no_output_left(config)

    @property
    def fixed_triggers(self) -> Int[Array, "n_triggers"] | None:
        """Ids of the fixed triggers, or None if every sequence draws its own."""
        return self._triggers_of_all

    @property
    def exact(self) -> str | None:
        """The predictor that is the exact distribution of the next token given the prefix; None if there is none."""
        return "bayes"

    @property
    def approximation(self) -> str:
        """How far the Bayes-optimal predictor is from the exact one, with random triggers and clean cycles; else empty."""
        config = self.config
        if config.triggers != "random" or config.cycles != "clean" or config.show_latents or config.n_triggers < 2:
            return ""
        return (
            "With random triggers and task.cycles=clean it is an approximation: its mean KL divergence from the exact law "
            "is 0.05 nats at 5 tokens and K = 3, 0.01 at 7 tokens and K = 3, 0.001 at 8 tokens and K = 2 (context 16). It "
            "is not known for larger vocabularies, whose trigger sets are too many to list."
        )

    @property
    def terms(self) -> Mapping[str, str]:
        """The terms of a report about the task, with their meanings."""
        return TERMS

    @property
    def setting(self) -> str:
        """The number and kind of the triggers."""
        return f"K = {self.config.n_triggers} {self.config.triggers}"

    def story(self, source: str, labels: Sequence[str]) -> str:
        """Return what sequences follow; see `Task.story`."""
        n = self.config.n_triggers
        said = f"of {self.config.context} tokens, which follow {source} ({len(labels)} tokens)"
        if n == 0:
            return f"{said}; no token is a trigger, so nothing can be copied from the context."
        ids = self.fixed_triggers
        which = "drawn for each sequence" if ids is None else " ".join(labels[i] for i in ids)
        return (
            f"{said} except after {counted(n, 'trigger')} ({which}): whatever followed a trigger first in a sequence "
            "follows it again. From a trigger's second time on its successor can thus be known, but only by looking back "
            "and copying it; how often the model does is its in-context accuracy."
        )

    def check_loss(self, loss: str) -> None:
        """Raise BirthlensError if `training.loss` names no role that positions of this task can have."""
        super().check_loss(loss)
        if loss != "all" and loss != "global" and self.config.n_triggers == 0:
            raise BirthlensError(
                f"training.loss = {loss!r}: with task.n_triggers = 0 there is no such target; use all."
            )

    @property
    def roles_are_known(self) -> bool:
        """Whether the prefix determines the role of its last token, so that entropies can replace losses."""
        return self.fixed_triggers is not None or self.config.show_latents

    def output_distribution(self, triggers: Int[Array, "batch n_triggers"]) -> Float[Array, "batch n_triggers d_vocab"]:
        """Return the exact distribution of each trigger's output.

        If the exclusions leave a bigram row without probability, the output is uniform over the allowed tokens.
        """
        config = self.config
        n = len(self.statistics)
        allowed = np.broadcast_to(self._allowed, (*triggers.shape, n)).copy()
        if config.no_repeat:
            np.put_along_axis(allowed, triggers[..., None], False, axis=-1)
        if config.cycles == "clean":
            for k in range(triggers.shape[1]):
                np.put_along_axis(allowed, np.repeat(triggers[:, None, k : k + 1], triggers.shape[1], 1), False, -1)
        weights = allowed.astype(np.float64)
        if config.outputs == "bigram":
            weights *= self.statistics.bigram[triggers]
            empty = weights.sum(-1, keepdims=True) == 0
            weights = np.where(empty, allowed, weights)
        totals = weights.sum(-1, keepdims=True)
        if (totals == 0).any():
            raise _no_output_left(config)
        return np.asarray(weights / totals)

    def sample(self, n: int, generator: np.random.Generator, compiled: bool | None = None) -> TokenBatch:
        """Draw n sequences; the same generator state gives the same batch, compiled or not."""
        config = self.config
        k = config.n_triggers
        length = config.context + 1
        triggers = self._triggers(n, generator)
        outputs = self._outputs(triggers, generator)
        overrides = np.full((n, len(self.statistics)), -1, dtype=np.int64)
        overrides[np.arange(n)[:, None], triggers] = outputs
        uniform = uniforms((n, length), generator)
        listed = k if config.show_latents else 0
        first = self._first.draw(np.zeros(n, dtype=np.int64), uniform[:, listed])
        start = np.concatenate([triggers[:, :listed], first[:, None]], axis=1)
        sequence, occurrence = chain(start, length, self._rows, overrides, uniform, compiled)
        absorbed = np.zeros((n, config.context), dtype=bool)
        doomed = cycling(triggers, outputs)
        if len(rows := np.flatnonzero(doomed.any(axis=1))):
            traps = np.zeros((len(rows), len(self.statistics)), dtype=bool)
            each = np.arange(len(rows))[:, None]
            traps[each, triggers[rows]] = doomed[rows]
            absorbed[rows, listed:] = traps[each, sequence[rows, listed:-1]]
        return TokenBatch(
            tokens=torch.from_numpy(sequence[:, :-1]),
            targets=torch.from_numpy(sequence[:, 1:]),
            triggers=torch.from_numpy(triggers),
            outputs=torch.from_numpy(outputs),
            occurrence=torch.from_numpy(occurrence[:, :-1]),
            absorbed=torch.from_numpy(absorbed),
        )

    def _triggers(self, n: int, generator: np.random.Generator) -> Int[Array, "batch n_triggers"]:
        k = self.config.n_triggers
        if self.fixed_triggers is not None:
            return np.repeat(self.fixed_triggers[None], n, axis=0)
        # The K smallest of Exp(1)/p, in order, have the distribution of K draws without replacement.
        with np.errstate(divide="ignore"):
            clocks = generator.standard_exponential((n, len(self.statistics))) / self.statistics.unigram
        return np.argsort(clocks, axis=1, kind="stable")[:, :k].astype(np.int64)

    def _outputs(
        self, triggers: Int[Array, "batch n_triggers"], generator: np.random.Generator
    ) -> Int[Array, "batch n_triggers"]:
        n, k = triggers.shape
        uniform = uniforms((n, k), generator).reshape(-1)
        if self._fixed_outputs is not None:
            return self._fixed_outputs.draw(np.tile(np.arange(k), n), uniform).reshape(n, k)
        laws = Categorical(self.output_distribution(triggers).reshape(n * k, len(self.statistics)))
        return laws.draw(np.arange(n * k), uniform).reshape(n, k)


def fixed_triggers(config: TaskConfig, statistics: BigramStatistics) -> Int[Array, "n_triggers"] | None:
    """Return the ids of the fixed triggers, or None if every sequence draws its own."""
    return statistics.most_frequent(config.n_triggers, config.offset) if config.triggers == "fixed" else None


def cycling(
    triggers: Int[Array, "batch n_triggers"], outputs: Int[Array, "batch n_triggers"]
) -> Bool[Array, "batch n_triggers"]:
    """Return, for each trigger, whether following outputs from it meets triggers indefinitely."""
    match = outputs[:, :, None] == triggers[:, None, :]
    alive = match.any(-1)
    each = np.arange(len(triggers))[:, None]
    onward = match.argmax(-1) if match.shape[-1] else np.zeros_like(triggers)
    for _ in range(triggers.shape[1] - 1):
        alive = alive & alive[each, onward]
    return alive


def _split_mask(config: TaskConfig, n: int) -> Bool[Array, "d_vocab"]:
    ids = np.arange(n)
    border = int(config.split_fraction * n)
    return {"none": ids >= 0, "train": ids < border, "test": ids >= border}[config.split]


def _no_output_left(config: TaskConfig) -> BirthlensError:
    return BirthlensError(
        f"task.n_triggers = {config.n_triggers}: with task.cycles = {config.cycles!r}, no_repeat = {config.no_repeat} and "
        f"split = {config.split!r} (split_fraction = {config.split_fraction}) no output token may be left to draw; "
        "use fewer triggers, a larger vocabulary, or another split_fraction."
    )
