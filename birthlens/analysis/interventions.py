"""Interventions as data: what is replaced, where, and by what. They serialise, and replay on every checkpoint.

An intervention replaces an activation `a` at some positions (and heads) by one of

    zero              0
    mean              the source run's average over batch and position
    mean_position     the source run's average over the batch, at each position
    mean_role         the source run's average over its tokens of the same role (no trigger, first, later occurrence)
    resample          the source run's activation in another sequence, drawn without replacement
    patch             the source run's activation in the same row and position
    uniform           pattern only: equal attention to every position up to the query
    previous_token    pattern only: all attention on the position before (the first position attends to itself)

The source is the unedited run on a second batch (`reference`) or on the evaluated batch itself (`batch`): `patch` from
`batch` freezes an activation, a pattern for instance, while something upstream is edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from birthlens.errors import BirthlensError
from birthlens.sites import (
    ATTENTION_SITES,
    FINAL_NORM,
    INPUT_SITES,
    INTERVENTION_SITES,
    NORM_SITES,
    Edge,
    Embedding,
    Head,
    HeadInput,
    Mlp,
    Point,
)

MEANS = ("mean", "mean_position", "mean_role")
PATTERNS = ("uniform", "previous_token")
METHODS = ("zero", *MEANS, "resample", "patch", *PATTERNS)
SOURCES = ("reference", "batch")
SITES = (*INTERVENTION_SITES, *NORM_SITES, FINAL_NORM)


class Sizes(Protocol):
    """What an intervention is checked against: a ModelConfig or a TransformerLens config."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""

    @property
    def n_heads(self) -> int:
        """Number of heads in each layer."""


@dataclass(frozen=True)
class Intervention:
    """Replace one activation; `heads=None` means all heads, `positions` is 'all', a role or a tuple of indices.

    At the pattern, positions are those of the query.

    Raises:
        BirthlensError: for a site, method or source that does not exist, or does not fit the others.

    Example:
        >>> cut = Intervention("z", "mean", layer=1, heads=(0,))
        >>> cut == from_json(cut.to_json()), str(cut)
        (True, 'z L1H0 mean')
    """

    site: str
    method: str
    layer: int | None = None
    heads: tuple[int, ...] | None = None
    positions: str | tuple[int, ...] = "all"
    source: str = "reference"

    def __post_init__(self) -> None:
        _check_choice("site", self.site, SITES)
        _check_choice("method", self.method, METHODS)
        _check_choice("source", self.source, SOURCES)
        if (self.layer is None) != (self.site in (*INPUT_SITES, FINAL_NORM)):
            need = "has no layer; leave it out" if self.layer is not None else "needs a layer"
            raise BirthlensError(f"layer = {self.layer}: site {self.site} {need}.")
        if self.heads is not None and self.site not in ATTENTION_SITES:
            valid = ", ".join(site for site in INTERVENTION_SITES if site in ATTENTION_SITES)
            raise BirthlensError(f"heads = {self.heads}: site {self.site} has no heads; {valid} do.")
        if self.site == "pattern" and self.method in ("mean", "mean_role"):
            raise BirthlensError(
                f"method = {self.method!r}: it would attend to the future at site pattern; use mean_position, "
                "resample, patch, zero, uniform or previous_token."
            )
        if self.method in PATTERNS and self.site != "pattern":
            raise BirthlensError(f"method = {self.method!r}: it is a pattern and needs site pattern, not {self.site}.")

    @property
    def point(self) -> Point:
        """Where it acts."""
        return Point(self.site, self.layer)

    @property
    def needs_source(self) -> bool:
        """Whether another run's activations are needed."""
        return self.method not in ("zero", *PATTERNS)

    def check(self, sizes: Sizes) -> None:
        """Raise BirthlensError, listing what is valid, where the layer or a head does not exist in the model."""
        if self.layer is not None and not 0 <= self.layer < sizes.n_layers:
            raise BirthlensError(f"layer = {self.layer} does not exist; valid layers are 0 to {sizes.n_layers - 1}.")
        if self.site == "mlp_out" and not has_mlp(sizes, self.layer or 0):
            raise BirthlensError(f"site = 'mlp_out': layer {self.layer} of this model has no feed-forward.")
        for head in self.heads or ():
            _check_head(Head(self.layer or 0, head), sizes)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        heads = None if self.heads is None else list(self.heads)
        return {
            "site": self.site,
            "method": self.method,
            "layer": self.layer,
            "heads": heads,
            "positions": positions,
            "source": self.source,
        }

    def __str__(self) -> str:
        place = "" if self.layer is None else f" L{self.layer}"
        place += "" if self.heads is None else "H" + "+".join(map(str, self.heads))
        where = "" if self.positions == "all" else f" at {self.positions}"
        return f"{self.site}{place} {self.method}{where}"


@dataclass(frozen=True)
class EdgeIntervention:
    """Replace what one component reads of another: only this edge changes, the sender itself does not.

    Methods are zero, mean, mean_position, mean_role, resample and patch, applied to what the sender writes.

    Example:
        >>> EdgeIntervention(Edge.parse("L0H0->L1H0.k"), "zero").to_json()["edge"]
        'L0H0->L1H0.k'
    """

    edge: Edge
    method: str
    positions: str | tuple[int, ...] = "all"
    source: str = "reference"

    def __post_init__(self) -> None:
        _check_choice("method", self.method, tuple(method for method in METHODS if method not in PATTERNS))
        _check_choice("source", self.source, SOURCES)

    @property
    def point(self) -> Point:
        """Where the sender's output is seen."""
        sender = self.edge.sender
        if isinstance(sender, Embedding):
            return Point(sender.name)
        return Point("mlp_out" if isinstance(sender, Mlp) else "z", sender.layer)

    @property
    def needs_source(self) -> bool:
        """Whether another run's activations are needed."""
        return self.method != "zero"

    def check(self, sizes: Sizes) -> None:
        """Raise BirthlensError where an end does not exist, or the sender does not come before the receiver."""
        sender, receiver = self.edge.sender, self.edge.receiver
        for end in (sender, receiver):
            if isinstance(end, Head):
                _check_head(end, sizes)
            elif isinstance(end, HeadInput):
                _check_head(end.head, sizes)
            elif isinstance(end, Mlp) and not 0 <= end.layer < sizes.n_layers:
                raise BirthlensError(f"layer = {end.layer} does not exist; valid layers are 0 to {sizes.n_layers - 1}.")
        if not precedes(self.edge, parallel=bool(getattr(sizes, "parallel_attn_mlp", False))):
            raise BirthlensError(f"edge = {self.edge}: the sender must come before the receiver.")

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        return {"edge": str(self.edge), "method": self.method, "positions": positions, "source": self.source}

    def __str__(self) -> str:
        return f"{self.edge} {self.method}" + ("" if self.positions == "all" else f" at {self.positions}")


AnyIntervention = Intervention | EdgeIntervention
Cases = Mapping[str, Sequence[AnyIntervention]]
"""Named sets of interventions; all interventions of one case act together."""


def precedes(edge: Edge, parallel: bool) -> bool:
    """Say whether the sender writes before the receiver reads (`parallel` blocks feed both halves the block's input)."""
    sender, receiver = edge.sender, edge.receiver
    if isinstance(sender, Embedding) or not isinstance(receiver, HeadInput | Mlp):
        return True
    if isinstance(sender, Head) and isinstance(receiver, Mlp) and not parallel:
        return sender.layer <= receiver.layer
    return sender.layer < receiver.layer


def from_json(data: Mapping[str, Any]) -> AnyIntervention:
    """Read what `to_json` wrote; unknown keys are refused."""
    fields = dict(data)
    for key in ("positions", "heads"):
        if isinstance(fields.get(key), list):
            fields[key] = tuple(fields[key])
    edge = fields.pop("edge", None)
    try:
        return Intervention(**fields) if edge is None else EdgeIntervention(Edge.parse(edge), **fields)
    except TypeError as error:
        raise BirthlensError(f"intervention = {dict(data)} cannot be read: {error}.") from None


def frozen_norms(sizes: Sizes) -> tuple[Intervention, ...]:
    """Return interventions that hold every LayerNorm's divisor at its value in the unedited run; none without LayerNorm."""
    if not has_norms(sizes):
        return ()
    places = [(site, layer) for layer in range(sizes.n_layers) for site in NORM_SITES]
    there = [(site, layer) for site, layer in places if site == "ln1.scale" or has_mlp(sizes, layer)]
    blocks = [Intervention(site, "patch", layer, source="batch") for site, layer in there]
    return (*blocks, Intervention(FINAL_NORM, "patch", source="batch"))


def has_norms(sizes: Sizes) -> bool:
    """Say whether a model (by either kind of config) normalises its residual stream."""
    return getattr(sizes, "family", None) == "full" or getattr(sizes, "normalization_type", None) is not None


def has_mlp(sizes: Sizes, layer: int) -> bool:
    """Say whether a layer has a feed-forward."""
    family, kind = getattr(sizes, "family", None), getattr(sizes, "feed_forward", None)
    if kind is None:
        return not getattr(sizes, "attn_only", False)
    return kind != "none" and (family == "full" or layer == sizes.n_layers - 1)


def check_cases(cases: Cases, sizes: Sizes) -> None:
    """Check every intervention of every case against the model's sizes."""
    for case in cases.values():
        for intervention in case:
            intervention.check(sizes)


def all_heads(sizes: Sizes) -> list[Head]:
    """Return every head, by layer and number."""
    return [Head(layer, head) for layer in range(sizes.n_layers) for head in range(sizes.n_heads)]


def at_heads(site: str, method: str, heads: Iterable[Head], **fields: Any) -> tuple[Intervention, ...]:
    """Return the interventions, one a layer, that act on a set of heads together."""
    layers: dict[int, list[int]] = {}
    for head in heads:
        layers.setdefault(head.layer, []).append(head.head)
    return tuple(Intervention(site, method, layer, tuple(numbers), **fields) for layer, numbers in layers.items())


def _check_choice(field: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise BirthlensError(f"{field} = {value!r} is unknown; valid are {', '.join(valid)}.")


def _check_head(head: Head, sizes: Sizes) -> None:
    valid = all_heads(sizes)
    if head not in valid:
        raise BirthlensError(f"head = {head} does not exist; valid heads are {', '.join(map(str, valid))}.")
