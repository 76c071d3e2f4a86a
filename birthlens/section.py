"""The base of every config section: frozen, strict about keys, and plain-spoken about what is wrong."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from birthlens.errors import BirthlensError

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


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
