"""The base of every config section: frozen, strict about keys, and plain-spoken about what is wrong."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, NoReturn, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from birthlens.errors import BirthlensError


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "Input should be a number")
    return value


# pydantic would read true as 1, and 'yes' as true.
NotBool = BeforeValidator(_no_bool)
Switch = Annotated[bool, Field(strict=True)]
Positive = Annotated[int, Field(ge=1), NotBool]
Count = Annotated[int, Field(ge=0), NotBool]
# The bound keeps a rate, and what an optimiser multiplies it with, within float32.
Rate = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False), NotBool]
Fraction = Annotated[float, Field(gt=0, lt=1), NotBool]


class FrozenDict(dict[str, int]):
    """A dict that stays as it was made."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a config is frozen; make a changed copy with changed().")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = setdefault = clear = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, int]]]:
        return FrozenDict, (dict(self),)


Steps = Annotated[dict[str, Count], AfterValidator(FrozenDict)]


class Section(BaseModel):
    """A part of the run's config; `section` is its name in messages and in files."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    section: ClassVar[str] = ""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise BirthlensError(_sentence(type(self), error)) from None

    def changed(self, **fields: Any) -> Self:
        """Return a validated copy with `fields` replaced."""
        return type(self)(**{**self.model_dump(), **fields})


def _sentence(kind: type[Section], error: ValidationError) -> str:
    """Say the first of pydantic's complaints as one sentence with field, value and what would be valid."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    path = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    name = f"{kind.section}.{path}" if kind.section else path
    if first["type"] == "extra_forbidden":
        return f"{name} = {first['input']!r} is unknown; valid keys are {', '.join(kind.model_fields)}."
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{name} = {first['input']!r}: it must be a section with keys of its own."
    message = (first["msg"][0].lower() + first["msg"][1:]).replace("tuple", "list")
    return f"{name} = {first['input']!r}: {message}."
