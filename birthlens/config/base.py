"""The base class of config sections: frozen, with strict keys and errors of one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Self,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from msgspec import Meta, Struct, ValidationError, convert, structs, to_builtins

from birthlens.errors import BirthlensError
from birthlens.labels import shortened, shown, suggestion

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
# The bound keeps a rate, and its products in an optimiser, within float32.
Rate = Annotated[float, Meta(ge=0, le=1e30)]
Fraction = Annotated[float, Meta(gt=0, lt=1)]
Steps = dict[str, Count]


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a config is frozen; make a changed copy with changed().")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = setdefault = clear = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """A part of the run's config, with annotated fields; `section` is its name in messages and in files.

    Values are converted to their fields' types: numbers may be written as text, since YAML reads 1e-3 as text.

    Raises:
        BirthlensError: for an unknown key, a value that does not fit its field, or values that do not fit together.
    """

    section: ClassVar[str] = ""
    kinds: ClassVar[dict[str, Any]] = {}
    """The type of every field, in order."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Fields added after the first format; plain data leaves them out at their defaults, and therefore stays the same."""

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls.kinds = {name: kind for name, kind in hints.items() if get_origin(kind) is not ClassVar}

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if name not in self.kinds:
                valid = ", ".join(self.kinds)
                raise BirthlensError(
                    f"{self._path(name)} = {shown(value)} is unknown; valid keys are {valid}.{suggestion(name, self.kinds)}"
                )
        for name, kind in self.kinds.items():
            value = values[name] if name in values else getattr(type(self), name)
            self.__dict__[name] = _converted(self._path(name), kind, value)
        self._check()

    def _check(self) -> None:
        """Raise BirthlensError if values do not fit together."""

    @classmethod
    def chosen(cls, values: Mapping[Any, Any]) -> Section:
        """Return the section for plain values; a section with several kinds chooses one of them."""
        return cls(**{str(name): value for name, value in values.items()})

    def _path(self, name: str) -> str:
        name = shortened(name, 80)
        return f"{self.section}.{name}" if self.section else name

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"{name} = {value!r}: a config is frozen; make a changed copy with changed().")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name} cannot be deleted: a config is frozen; make a changed copy with changed().")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def changed(self, **fields: Any) -> Self:
        """Return a validated copy with `fields` replaced."""
        return type(self)(**{**self.__dict__, **fields})

    def to_data(self) -> dict[str, Any]:
        """Return plain data for JSON or YAML, from which an equal section can be made."""
        return {
            name: _plain(value)
            for name, value in self.__dict__.items()
            if name not in self.added or value != getattr(type(self), name)
        }


def _converted(path: str, kind: Any, value: Any) -> Any:
    """Return the value converted to its field's type."""
    if isinstance(kind, type) and issubclass(kind, Section):
        if isinstance(value, Mapping):
            return kind.chosen(value)
        if not isinstance(value, kind):
            raise BirthlensError(f"{path} = {shown(value)}: it must be a section with keys of its own.")
        return value
    numeric = not {int, float}.isdisjoint(_leaves(kind))
    if numeric and hasattr(value, "item") and not getattr(value, "shape", True):
        value = value.item()  # a numpy number
    try:
        found = convert(value, kind, strict=not numeric)
    except ValidationError as error:
        raise BirthlensError(_sentence(path, kind, value, str(error))) from None
    return FrozenDict(found) if isinstance(found, dict) else found


def _leaves(kind: Any) -> Iterator[Any]:
    """Yield the types, and the values of Literals, that a type consists of."""
    inner = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    if inner:
        for part in inner:
            yield from _leaves(part)
    else:
        yield kind


def _sentence(path: str, kind: Any, value: Any, complaint: str) -> str:
    """Convert an error of msgspec to one sentence with the field, its value and the valid values."""
    complaint, _, where = complaint.replace("`", "").partition(" - at $")
    for index, name in re.findall(r"\[(\d+)\]|\.(\w+)", where):
        kind = _field_of(kind, value, name) if name else kind
        path = f"{path}.{index or name}"
        value = value[name] if name else value[int(index)]
    if isinstance(value, float) and value != value:
        complaint = "expected a finite number"
    elif Literal in (get_origin(kind), *map(get_origin, get_args(kind))):
        complaint = f"expected {' or '.join(map(repr, _leaves(kind)))}"
    complaint = re.sub(r"\barray\b", "list", re.sub(r"\bobject\b", "mapping", complaint))
    return f"{path} = {shown(value)}: {complaint[0].lower()}{complaint[1:]}."


def _field_of(kind: Any, data: Mapping[str, Any], name: str) -> Any:
    """Return the type of a field of the struct, among those in a type, that the data have the tag of."""
    for leaf in _leaves(kind):
        if isinstance(leaf, type) and issubclass(leaf, Struct) and leaf.__struct_config__.tag == data.get("kind"):
            return next(field.type for field in structs.fields(leaf) if field.encode_name == name)
    return kind


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_data()
    if isinstance(value, Struct):
        return to_builtins(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
