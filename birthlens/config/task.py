"""The task section of a config: one strict set of keys for each kind of task, chosen by `task.kind`.

A kind is a name of `KINDS`, an entry point of the group `birthlens.tasks`, or `module:Class`: a task class of the user's
own, whose attribute `Config` is a subclass of `TaskSection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from birthlens.config.base import Count, Fraction, Positive, Section
from birthlens.config.own_class import own_class
from birthlens.errors import BirthlensError

Context = Annotated[int, Meta(ge=2)]
Probability = Annotated[float, Meta(ge=0, lt=1)]
LARGEST_TABLE = 1_000_000
"""The most transition probabilities of one sequence's chain."""
ENTRY_POINTS = "birthlens.tasks"
"""The group of entry points through which an installed package offers tasks of its own."""


class TaskSection(Section):
    """The settings of every task: its kind, and the number of input tokens in a sequence."""

    section: ClassVar[str] = "task"
    kind: ClassVar[str] = ""
    context: Context = 64
    """Number of input tokens of a sequence."""

    @classmethod
    def chosen(cls, values: Mapping[Any, Any]) -> Section:
        """Return the section of the kind that `values` name, with the other values; the default is the bigram task."""
        others = {str(name): value for name, value in values.items() if name != "kind"}
        return section_of(values.get("kind", TaskConfig.kind))(**others)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of what a run keeps of its corpus besides the distributions."""
        return ()

    def possible_outputs(self, d_vocab: int, fixed_triggers: Sequence[int] | None) -> list[int] | None:
        """List the tokens that can be copied from the context, if the task excludes some; otherwise None."""
        return None

    def to_data(self) -> dict[str, Any]:
        """Return plain data; the kind is left out for the bigram task, as in earlier configs."""
        named = {} if self.kind == TaskConfig.kind else {"kind": self.kind}
        return {**named, **super().to_data()}


class TaskConfig(TaskSection):
    """The bigram task (paper section 4.1): K in-context bigrams in a global chain, over `context` input tokens.

    `cycles="published"` leaves triggers that lead into each other indefinitely in the data, as the authors do;
    `cycles="clean"` draws outputs from the tokens that are not triggers of the sequence, so that nothing is absorbed.
    """

    kind: ClassVar[str] = "bigram"
    context: Context = 256
    """Number of input tokens of a sequence (T)."""
    n_triggers: Count = 5
    """Number of triggers of a sequence (K); 0 leaves the global chain alone."""
    triggers: Literal["fixed", "random"] = "fixed"
    """The same triggers in every sequence (the most frequent tokens), or others drawn for each."""
    offset: Count = 0
    """How many of the most frequent tokens are passed over before the triggers are chosen."""
    outputs: Literal["uniform", "bigram"] = "uniform"
    """How the output of a trigger is drawn: uniformly, or as a successor of the trigger."""
    no_repeat: bool = False
    """Whether a trigger may not be its own output."""
    cycles: Literal["published", "clean"] = "published"
    """Whether triggers may lead into each other indefinitely, as published, or never do."""
    split: Literal["none", "train", "test"] = "none"
    """Draw outputs from all tokens, from the first part of the vocabulary, or from the rest."""
    split_fraction: Fraction = 0.75
    """The share of the vocabulary that is the first part of the split."""
    show_latents: bool = False
    """Whether a sequence begins with the list of its triggers."""

    def _check(self) -> None:
        if self.show_latents and self.n_triggers > self.context:
            raise BirthlensError(
                f"task.n_triggers = {self.n_triggers}: with show_latents at most task.context = {self.context} fit."
            )

    def possible_outputs(self, d_vocab: int, fixed_triggers: Sequence[int] | None) -> list[int] | None:
        """List the tokens that can be outputs, if the config excludes some for every sequence; otherwise None."""
        border = int(self.split_fraction * d_vocab)
        excluded: set[int] = set()
        if self.split == "train":
            excluded |= set(range(border, d_vocab))
        if self.split == "test":
            excluded |= set(range(border))
        if self.cycles == "clean" and fixed_triggers is not None:
            excluded |= set(fixed_triggers)
        return [token for token in range(d_vocab) if token not in excluded] if excluded else None


def as_bigram(section: TaskSection) -> TaskConfig:
    """Return the section of a bigram task.

    Raises:
        BirthlensError: for a section of another kind.
    """
    if not isinstance(section, TaskConfig):
        raise BirthlensError(f"task.kind = {section.kind!r}: this is defined for the bigram task only.")
    return section


class NoiseConfig(TaskSection):
    """Noisy in-context recall (Chen, Bruna, Bietti 2024).

    After a trigger comes the noise token with probability `alpha`, else the trigger's output in this sequence.
    """

    kind: ClassVar[str] = "noise"
    n_triggers: Positive = 3
    """Number of triggers, the most frequent tokens."""
    offset: Count = 0
    """How many of the most frequent tokens are passed over before the triggers are chosen."""
    alpha: Probability = 0.5
    """Probability of the noise token after a trigger."""


class BackcopyConfig(TaskSection):
    """Bigram-Backcopy (Guo et al. 2024): `<bos>` comes first, and a trigger is followed by the token before it."""

    kind: ClassVar[str] = "backcopy"
    n_triggers: Positive = 3
    """Number of triggers, the most frequent tokens."""
    offset: Count = 0
    """How many of the most frequent tokens are passed over before the triggers are chosen."""


class MarkovConfig(TaskSection):
    """In-context Markov chains (Edelman et al. 2024): each sequence has a chain of its own over `states` tokens.

    Rows are drawn from a Dirichlet distribution of the given `concentration`. The next token depends on the `order` tokens
    before it. `chains` is how many chains there are in all (Park et al. 2024), drawn with `chains_seed`; 0 draws a new
    chain for each sequence. A sequence starts with uniform tokens, or as published with the stationary distribution of its
    chain. In a doubly stochastic chain the columns sum to 1 too, so that all tokens are equally frequent.
    """

    kind: ClassVar[str] = "markov"
    states: Annotated[int, Meta(ge=2, le=4096)] = 3
    """Number of tokens of a chain."""
    order: Literal[1, 2] = 1
    """How many tokens the next one depends on."""
    concentration: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    """Concentration of the Dirichlet distribution of a chain's rows; 1 is uniform."""
    rows: Literal["dirichlet", "doubly_stochastic", "sinkhorn"] = "dirichlet"
    """Dirichlet rows; uniform over doubly stochastic chains; or Dirichlet rows made doubly stochastic by scaling."""
    start: Literal["uniform", "stationary"] = "uniform"
    """The distribution of the first tokens."""
    chains: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """How many chains there are in all; 0 draws a new one for each sequence."""
    chains_seed: Count = 0
    """Seed of the chains, where their number is finite."""

    added: ClassVar[frozenset[str]] = frozenset({"rows"})

    def _check(self) -> None:
        if self.rows != "dirichlet" and self.order != 1:
            raise BirthlensError(f"task.rows = {self.rows!r}: it is defined for task.order = 1, not {self.order}.")
        if self.rows == "doubly_stochastic" and (self.states > 5 or self.concentration != 1):
            raise BirthlensError(
                f"task.rows = 'doubly_stochastic': it is drawn by rejection for up to 5 states and concentration 1, not "
                f"{self.states} and {self.concentration:g}; use sinkhorn."
            )
        if self.rows == "sinkhorn" and self.concentration < 0.1:
            raise BirthlensError(
                f"task.concentration = {self.concentration:g}: task.rows = 'sinkhorn' needs at least 0.1, because sparser "
                "rows cannot be balanced in double precision."
            )
        if self.context <= self.order:
            raise BirthlensError(f"task.context = {self.context}: it must be larger than task.order = {self.order}.")
        if self.start == "stationary" and self.order != 1:
            raise BirthlensError(f"task.start = 'stationary': it is defined for task.order = 1, not {self.order}.")
        if self.states ** (self.order + 1) > LARGEST_TABLE:
            raise BirthlensError(
                f"task.states = {self.states}: with task.order = {self.order} each sequence would have "
                f"{self.states ** (self.order + 1)} transition probabilities; at most {LARGEST_TABLE} are possible."
            )


class FactsConfig(TaskSection):
    """Factual recall (Nichani, Lee, Bietti 2024): the answer to a subject and a relation among noise tokens.

    `<eos>` comes last, and its target is the answer. Each relation has `answers` possible answers of its own. `structured`
    spreads them evenly over the subjects; otherwise they are drawn uniformly with `facts_seed`.
    """

    kind: ClassVar[str] = "facts"
    context: Annotated[int, Meta(ge=3)] = 32
    """Number of input tokens of a sequence; `<eos>` is the last."""
    subjects: Positive = 16
    """Number of subjects."""
    relations: Positive = 4
    """Number of relations; every pair of a subject and a relation is a fact."""
    answers: Positive = 8
    """Number of possible answers to each relation."""
    noise_tokens: Positive = 20
    """Number of tokens that mean nothing."""
    structured: bool = True
    """Whether answers are spread evenly over the subjects, or drawn."""
    facts_seed: Count = 0
    """Seed of the facts, where they are drawn."""


class TextConfig(TaskSection):
    """Windows of a real text: `context` tokens from a random place of the corpus, which must be a text.

    A token is a character, or one of `vocabulary` byte pairs that are built from the text itself (null means 512). The
    last `held_out` of the text is for evaluation; neither training nor the building of pairs nor the n-grams see it.
    """

    kind: ClassVar[str] = "text"
    tokens: Literal["characters", "pairs"] = "pairs"
    """Tokens are characters, or byte pairs that are built from the text."""
    vocabulary: Annotated[int, Meta(ge=2, le=2**14)] | None = None
    """Number of byte pairs; null means 512. Characters are as many as the text has."""
    held_out: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    """The share at the end of the text that only the evaluation reads."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The text as token ids, and how it was cut into pairs."""
        return ("stream", "tokenizer") if self.tokens == "pairs" else ("stream",)

    def _check(self) -> None:
        if self.tokens == "characters" and self.vocabulary is not None:
            raise BirthlensError(
                f"task.vocabulary = {self.vocabulary}: with task.tokens = 'characters' the vocabulary is the text's "
                "characters; leave it out, or use pairs."
            )


KINDS: dict[str, type[TaskSection]] = {
    kind.kind: kind for kind in (TaskConfig, NoiseConfig, BackcopyConfig, MarkovConfig, FactsConfig, TextConfig)
}
"""The section of every kind of task that comes with birthlens."""


def section_of(kind: object) -> type[TaskSection]:
    """Return the config section of a kind of task.

    Raises:
        BirthlensError: for an unknown kind; the message lists the known ones.
    """
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    if not isinstance(kind, str):
        raise _unknown(kind)
    return _own_section(kind)


@cache
def own_task(kind: str) -> Any:
    """Import a task class that does not come with birthlens: `module:Class`, or the name of an entry point.

    Raises:
        BirthlensError: if there is no such class; the message says what was looked for.
    """
    found = own_class(kind, "task.kind", ENTRY_POINTS)
    if found is None:
        raise _unknown(kind)
    return found


@cache
def _own_section(kind: str) -> type[TaskSection]:
    section = getattr(own_task(kind), "Config", None)
    if not (isinstance(section, type) and issubclass(section, TaskSection)):
        raise BirthlensError(
            f"task.kind = {kind!r}: its attribute Config is {section!r}; it must be a subclass of TaskSection."
        )
    return type(section.__name__, (section,), {"kind": kind, "__doc__": section.__doc__, "__annotations__": {}})


def _unknown(kind: object) -> BirthlensError:
    return BirthlensError(
        f"task.kind = {kind!r} is unknown; valid are {', '.join(KINDS)}, or a class of your own as module:Class."
    )
