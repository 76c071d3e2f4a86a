"""Interventions as data: what is replaced, where, and by what. They can be serialised and repeated at every checkpoint.

An intervention replaces an activation `a` at some positions (and heads) by one of

    zero              0
    mean              the source run's average over batch and position
    mean_position     the source run's average over the batch, at each position
    mean_role         the source run's average over its tokens of the same role (no trigger, first, later occurrence)
    resample          the source run's activation in another sequence, drawn without replacement
    patch             the source run's activation in the same row and position
    uniform           pattern only: equal attention to every position up to the query
    previous_token    pattern only: full attention to the previous position (the first position attends to itself)

The source is the unedited run on a second batch (`reference`) or on the evaluated batch itself (`batch`). `patch` from
`batch` freezes an activation, such as a pattern, while something upstream is edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.model.components import Sizes, check_edge, check_head, check_layer, has_mlp, has_norms, has_positions
from birthlens.model.sites import (
    ATTENTION_SITES,
    FINAL_NORM,
    INPUT_SITES,
    INTERVENTION_SITES,
    NORM_SITES,
    Edge,
    Embedding,
    Head,
    Mlp,
    Point,
)

MEANS = ("mean", "mean_position", "mean_role")
PATTERNS = ("uniform", "previous_token")
METHODS = ("zero", *MEANS, "resample", "patch", *PATTERNS)
PATCH_SOURCES = ("reference", "batch")
SITES = (*INTERVENTION_SITES, *NORM_SITES, FINAL_NORM)


@dataclass(frozen=True)
class Intervention:
    """Replace one activation; `heads=None` means all heads, `positions` is 'all', a role or a tuple of indices.

    Heads lie in one layer, which need not be given beside them. For the pattern, positions are those of the query.

    Raises:
        BirthlensError: for a site, method or source that does not exist, or does not fit the others.

    Example:
        >>> cut = Intervention("z", "mean", heads=(Head(1, 0),))
        >>> cut == from_json(cut.to_json()), str(cut)
        (True, 'z L1H0 mean')
    """

    site: str
    method: str
    layer: int | None = None
    heads: tuple[Head, ...] | None = None
    positions: str | tuple[int, ...] = "all"
    source: str = "reference"

    def __post_init__(self) -> None:
        _check_choice("site", self.site, SITES)
        _check_choice("method", self.method, METHODS)
        _check_choice("source", self.source, PATCH_SOURCES)
        _check_positions(self.positions)
        _checked_layer(self.layer)
        if self.heads is not None:
            object.__setattr__(self, "layer", _layer_of(self.heads, self.layer))
            _check_has_heads(self.site, ", ".join(map(str, self.heads)))
        if (self.layer is None) != (self.site in (*INPUT_SITES, FINAL_NORM)):
            need = "has no layer; leave it out" if self.layer is not None else "needs a layer"
            raise BirthlensError(f"layer = {self.layer}: site {self.site} {need}.")
        if self.site == "pattern" and self.method in ("mean", "mean_role"):
            raise BirthlensError(
                f"method = {self.method!r}: it would attend to the future at site pattern; use mean_position, "
                "resample, patch, zero, uniform or previous_token."
            )
        if self.method in PATTERNS and self.site != "pattern":
            raise BirthlensError(f"method = {self.method!r}: it is a pattern and needs site pattern, not {self.site}.")

    @property
    def point(self) -> Point:
        """The point that it replaces."""
        return Point(self.site, self.layer)

    @property
    def needs_source(self) -> bool:
        """Whether activations of another run are needed."""
        return self.method not in ("zero", *PATTERNS)

    def check(self, sizes: Sizes) -> None:
        """Raise BirthlensError, listing the valid ones, if the model does not have the layer or a head."""
        if self.layer is not None:
            check_layer(self.layer, sizes)
        if self.site == "mlp_out" and not has_mlp(sizes, self.layer or 0):
            layers = ", ".join(str(layer) for layer in range(sizes.n_layers) if has_mlp(sizes, layer)) or "none"
            raise BirthlensError(
                f"site = 'mlp_out': layer {self.layer} of this model has no feed-forward; layers that have one: {layers}."
            )
        if self.site == "pos_embed" and not has_positions(sizes):
            raise BirthlensError(
                "site = 'pos_embed': this model adds no positions to its input; the valid input is embed."
            )
        for head in self.heads or ():
            check_head(head, sizes, self.site)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; heads are their numbers within the layer."""
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        heads = None if self.heads is None else [head.head for head in self.heads]
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
        place += "" if self.heads is None else "H" + "+".join(str(head.head) for head in self.heads)
        where = "" if self.positions == "all" else f" at {self.positions}"
        return f"{self.site}{place} {self.method}{where}"


@dataclass(frozen=True)
class EdgeIntervention:
    """Replace what one component reads from another: only this edge changes, the sender itself does not.

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
        if not isinstance(self.edge, Edge):
            raise BirthlensError(f"edge = {self.edge!r} is not an edge; parse it with Edge.parse('L0H0->L1H0.k').")
        _check_positions(self.positions)
        _check_choice("method", self.method, tuple(method for method in METHODS if method not in PATTERNS))
        _check_choice("source", self.source, PATCH_SOURCES)

    @property
    def point(self) -> Point:
        """The point of the sender's output."""
        sender = self.edge.sender
        if isinstance(sender, Embedding):
            return Point(sender.name)
        return Point("mlp_out" if isinstance(sender, Mlp) else "z", sender.layer)

    @property
    def needs_source(self) -> bool:
        """Whether activations of another run are needed."""
        return self.method != "zero"

    def check(self, sizes: Sizes) -> None:
        """Raise BirthlensError if an end does not exist, or the sender does not come before the receiver."""
        check_edge(self.edge, sizes)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        return {"edge": str(self.edge), "method": self.method, "positions": positions, "source": self.source}

    def __str__(self) -> str:
        return f"{self.edge} {self.method}" + ("" if self.positions == "all" else f" at {self.positions}")


AnyIntervention = Intervention | EdgeIntervention
Cases = Mapping[str, Sequence[AnyIntervention]]
"""Named sets of interventions; all interventions of one case act together."""


def from_json(data: object) -> AnyIntervention:
    """Read the output of `to_json`; unknown keys are refused."""
    if not isinstance(data, Mapping):
        raise BirthlensError(
            f"intervention = {shown(data)}: it must map fields to values, as {{site: z, method: mean, layer: 1}} or "
            "{edge: L0H0->L1H0.k, method: mean}."
        )
    fields = dict(data)
    if isinstance(fields.get("positions"), list):
        fields["positions"] = tuple(fields["positions"])
    edge = fields.pop("edge", None)
    if edge is None and fields.get("heads") is not None:
        fields["heads"] = _numbered_heads(fields["heads"], fields.get("layer"))
    try:
        return Intervention(**fields) if edge is None else EdgeIntervention(Edge.parse(edge), **fields)
    except TypeError as error:
        raise BirthlensError(f"intervention = {shown(dict(data))} cannot be read: {error}.") from None


def frozen_norms(sizes: Sizes) -> tuple[Intervention, ...]:
    """Return interventions that keep every LayerNorm's divisor at its value in the unedited run; empty without LayerNorm."""
    if not has_norms(sizes):
        return ()
    places = [(site, layer) for layer in range(sizes.n_layers) for site in NORM_SITES]
    there = [(site, layer) for site, layer in places if site == "ln1.scale" or has_mlp(sizes, layer)]
    blocks = [Intervention(site, "patch", layer, source="batch") for site, layer in there]
    return (*blocks, Intervention(FINAL_NORM, "patch", source="batch"))


def check_cases(cases: Cases, sizes: Sizes) -> None:
    """Check every intervention of every case against the model's sizes."""
    for case in cases.values():
        for intervention in case:
            intervention.check(sizes)


def at_heads(site: str, method: str, heads: Iterable[Head], **fields: Any) -> tuple[Intervention, ...]:
    """Return the interventions, one for each layer, that act on a set of heads together."""
    layers: dict[int, list[Head]] = {}
    for head in heads:
        layers.setdefault(head.layer, []).append(head)
    return tuple(Intervention(site, method, heads=tuple(together), **fields) for together in layers.values())


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_indices(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_index, value))


def _checked_layer(layer: object) -> int | None:
    if layer is not None and not _is_index(layer):
        raise BirthlensError(f"layer = {shown(layer)}: it must be a whole number from 0, or left out.")
    return layer


def _check_has_heads(site: object, heads: str) -> None:
    if site not in ATTENTION_SITES:
        valid = ", ".join(site for site in INTERVENTION_SITES if site in ATTENTION_SITES)
        raise BirthlensError(f"heads = {heads}: site {shown(site)} has no heads; {valid} do.")


def _layer_of(heads: object, layer: int | None) -> int:
    """Return the one layer of the heads, which a layer given beside them must equal."""
    if not (isinstance(heads, tuple) and heads and all(isinstance(head, Head) for head in heads)):
        raise BirthlensError(
            f"heads = {shown(heads)}: list at least one Head, such as (Head(1, 0),), or leave it out for all heads."
        )
    layers = sorted({head.layer for head in heads} | ({layer} if layer is not None else set()))
    if len(layers) > 1:
        raise BirthlensError(
            f"heads = {', '.join(map(str, heads))}: an intervention acts in one layer, not in layers "
            f"{' and '.join(map(str, layers))}."
        )
    return layers[0]


def _numbered_heads(numbers: object, layer: object) -> tuple[Head, ...]:
    """Read heads from their JSON form: numbers within the layer beside them."""
    if not (_are_indices(numbers) and numbers):
        raise BirthlensError(
            f"heads = {shown(numbers)}: list at least one head's number, or leave it out for all heads."
        )
    its_layer = _checked_layer(layer)
    if its_layer is None:
        raise BirthlensError(f"heads = {shown(numbers)}: heads need a layer, as in layer: 1.")
    return tuple(Head(its_layer, number) for number in numbers)


def _check_positions(positions: object) -> None:
    # The batch determines which roles there are (`tasks.positions`).
    if not isinstance(positions, str) and not _are_indices(positions):
        raise BirthlensError(
            f"positions = {shown(positions)}: give 'all', a role such as in_context, or a list of indices."
        )


def _check_choice(field: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise BirthlensError(f"{field} = {shown(value)} is unknown; valid are {', '.join(valid)}.")
