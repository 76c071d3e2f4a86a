"""Clamps: interventions during training, as data, each with a span of steps [from, until).

    freeze         a matrix gets no updates
    hold           a matrix is zero, its value at another step, its ideal memory, its projection on its ledger, or of rank R
    add            a multiple of its ideal memory is added to a matrix, once, or kept in it
    reset          the optimiser's state is cleared, once
    set            a setting of the task, the loss or the optimiser has another value
    ablate         a head or an edge of the forward pass is replaced by zero or by its mean
    pin            the attention pattern of a head is the previous token, uniform, or the one that the model had at `from`
    copy           a head copies: it adds to the logit of each token in proportion to its attention to that token
    stop_gradient  no gradient passes an edge

A clamp acts on the weights at the steps of its span and on the updates that start there. In YAML it is a mapping or a text:

    training.clamps: [{kind: freeze, matrix: L0.W_K, until: 50}, hold L1.W_O ideal from=20 until=40]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from birthlens.errors import BirthlensError

Step = Annotated[int, Meta(ge=0)]
Strength = Annotated[float, Meta(ge=-1e6, le=1e6)]
Source = Literal["zero", "initial", "step", "ideal", "ideal_dual", "ledger", "without_ledger", "rank"]


class Clamp(Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True, omit_defaults=True):
    """The fields of all clamps: the first step at which it acts, and the first at which it no longer does (None: never)."""

    start: Step = field(default=0, name="from")
    stop: Step | None = field(default=None, name="until")

    @property
    def subjects(self) -> tuple[str, ...]:
        """What the clamp fixes; two clamps that fix the same thing contradict each other if their spans overlap."""
        return ()

    def acts(self, step: int) -> bool:
        """Return whether a step is in the span."""
        return self.start <= step and (self.stop is None or step < self.stop)

    def overlaps(self, other: Clamp) -> bool:
        """Return whether two spans share a step."""
        return (other.stop is None or self.start < other.stop) and (self.stop is None or other.start < self.stop)

    def __str__(self) -> str:
        words = [str(self.__struct_config__.tag), *self._words()]
        words += [f"from={self.start}"] if self.start else []
        words += [f"until={self.stop}"] if self.stop is not None else []
        return " ".join(words)

    def _words(self) -> list[str]:
        """Return the words between the kind and the span."""
        return list(self.subjects)


class Freeze(Clamp, frozen=True, kw_only=True, tag="freeze"):
    """Keep a matrix unchanged: no gradient, no weight decay, no momentum."""

    matrix: str

    @property
    def subjects(self) -> tuple[str, ...]:
        """The matrix."""
        return (self.matrix,)


class Hold(Clamp, frozen=True, kw_only=True, tag="hold"):
    """Hold a matrix at a value, or project it after each update (ledger, without_ledger, rank).

    `step` names the step of at=step, `rank` the rank of at=rank, and `strength` the scores of at=ideal, in nats.
    """

    matrix: str
    at: Source
    step: Step | None = None
    rank: Annotated[int, Meta(ge=1)] | None = None
    strength: Strength | None = None

    def __post_init__(self) -> None:
        for name, sources in {"step": ("step",), "rank": ("rank",), "strength": ("ideal", "ideal_dual")}.items():
            value = getattr(self, name)
            if value is not None and self.at not in sources:
                raise ValueError(f"{name} = {value} goes with at = {' or '.join(sources)}, not {self.at}")
            if value is None and self.at == name:
                raise ValueError(f"at = {name} needs its number, as in {name}:8")

    @property
    def subjects(self) -> tuple[str, ...]:
        """The matrix."""
        return (self.matrix,)

    def _words(self) -> list[str]:
        number = self.step if self.at == "step" else self.rank
        words = [self.matrix, self.at if number is None else f"{self.at}:{number}"]
        return words if self.strength is None else [*words, f"strength={self.strength}"]

    @property
    def projects(self) -> bool:
        """Whether the matrix is still trained, and projected after each update."""
        return self.at in ("ledger", "without_ledger", "rank")


class Add(Clamp, frozen=True, kw_only=True, tag="add"):
    """Add the ideal memory of a matrix, so that its right entries gain `strength` nats.

    With `held`, the share of the memory in the matrix is set to `strength` at every step of the span; otherwise the memory
    is added once, at step `from`.
    """

    matrix: str
    strength: Strength = 1.0
    held: bool = False

    @property
    def subjects(self) -> tuple[str, ...]:
        """The matrix, if it is held."""
        return (self.matrix,) if self.held else ()

    def _words(self) -> list[str]:
        return [self.matrix, str(self.strength), *(["held"] if self.held else [])]


class Reset(Clamp, frozen=True, kw_only=True, tag="reset"):
    """Clear the optimiser's state at step `from`, for one matrix or for all."""

    matrix: str | None = None

    def _words(self) -> list[str]:
        return [] if self.matrix is None else [self.matrix]


class Set(Clamp, frozen=True, kw_only=True, tag="set"):
    """Give another value to a setting, by its full name such as task.outputs or optimiser.learning_rate."""

    key: str
    value: Any

    @property
    def subjects(self) -> tuple[str, ...]:
        """The setting."""
        return (self.key,)

    def _words(self) -> list[str]:
        return [f"{self.key}={json.dumps(self.value)}"]


class Ablate(Clamp, frozen=True, kw_only=True, tag="ablate"):
    """Replace the output of a head, or what one component reads of another (an edge), by zero or by its mean.

    The mean is that of the model at step `from`, over all positions of the held-out batch.
    """

    target: str
    method: Literal["zero", "mean"] = "zero"

    @property
    def subjects(self) -> tuple[str, ...]:
        """The head or the edge."""
        return (_place(self.target),)

    def _words(self) -> list[str]:
        return [*self.subjects, self.method]


class Pin(Clamp, frozen=True, kw_only=True, tag="pin"):
    """Fix the attention pattern of a head: all to the previous token, uniform, or the model's pattern at step `from`."""

    head: str
    pattern: Literal["previous", "uniform", "frozen"]

    @property
    def subjects(self) -> tuple[str, ...]:
        """The head."""
        return (_place(self.head),)

    def _words(self) -> list[str]:
        return [*self.subjects, self.pattern]


class Copy(Clamp, frozen=True, kw_only=True, tag="copy"):
    """Let a head copy the tokens that it attends to, whatever its W_V and W_O are.

    At each position, `strength` times the head's attention to a token is added to the logit of that token, in nats. The head
    writes nothing to the residual stream, so its W_V and W_O have no gradient; its attention pattern is still learned.
    """

    head: str
    strength: Strength = 15.0

    @property
    def subjects(self) -> tuple[str, ...]:
        """The head."""
        return (_place(self.head),)

    def _words(self) -> list[str]:
        return [*self.subjects, str(self.strength)]


class StopGradient(Clamp, frozen=True, kw_only=True, tag="stop_gradient"):
    """Stop the gradient through an edge such as L0H0->L1H0.k."""

    edge: str

    @property
    def subjects(self) -> tuple[str, ...]:
        """The edge."""
        return (_place(self.edge),)


AnyClamp = Freeze | Hold | Add | Reset | Set | Ablate | Pin | Copy | StopGradient
EVERY = (Freeze, Hold, Add, Reset, Set, Ablate, Pin, Copy, StopGradient)
KINDS: dict[str, type[Clamp]] = {str(kind.__struct_config__.tag): kind for kind in EVERY}
FORWARD = (Ablate, Pin, Copy, StopGradient)
"""The clamps that act in the forward pass, which only the engine `functional` has."""
SETTABLE = (
    "valid are the keys of task except kind and context, training.loss, training.batch_size, and the keys of optimiser "
    "except kind"
)
_FIXED = ("task.kind", "task.context", "optimiser.kind")


def _place(text: str) -> str:
    """Return a head or an edge in its usual spelling: L0H0 for L00H0, without spaces."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"\s", "", text))


def _fixes(clamp: Clamp, matrix: str) -> bool:
    return isinstance(clamp, Hold | Add) and matrix in clamp.subjects


def can_be_set(key: str) -> bool:
    """Return whether a setting may change during training: it changes neither the model nor the vocabulary."""
    section, _, name = key.partition(".")
    return key not in _FIXED and (section in ("task", "optimiser") or name in ("loss", "batch_size"))


def check_spans(clamps: Sequence[Clamp], steps: int) -> None:
    """Raise BirthlensError for spans outside the run, empty spans, and spans that contradict each other."""
    for number, clamp in enumerate(clamps):
        if clamp.stop is not None and clamp.stop <= clamp.start:
            raise BirthlensError(f"clamp '{clamp}': until = {clamp.stop} must be larger than from = {clamp.start}.")
        if clamp.start >= max(steps, 1):
            raise BirthlensError(f"clamp '{clamp}': it starts after the last update; training.steps = {steps}.")
        if clamp.stop is not None and (isinstance(clamp, Reset) or (isinstance(clamp, Add) and not clamp.held)):
            raise BirthlensError(f"clamp '{clamp}': it acts once, at from = {clamp.start}; leave until out.")
        for other in clamps[:number]:
            for one, fixed in ((clamp, other), (other, clamp)):
                if isinstance(one, Add) and not one.held and _fixes(fixed, one.matrix) and fixed.acts(one.start):
                    raise BirthlensError(
                        f"clamp '{clamp}' contradicts '{other}': {one.matrix} is held at step {one.start}, so nothing can "
                        "be added to it."
                    )
            if set(clamp.subjects) & set(other.subjects) and clamp.overlaps(other):
                raise BirthlensError(
                    f"clamp '{clamp}' contradicts '{other}': both fix {clamp.subjects[0]} at the same steps."
                )
