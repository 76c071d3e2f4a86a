"""Options that the user gave, and the refusal of those that would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from birthlens.errors import BirthlensError


def given(*names: str) -> list[str]:
    """Return those of some parameters of the command that the user gave, as they are typed."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    typed = {str(parameter.name): max(parameter.opts, key=len) for parameter in context.command.params}
    return [typed[name] for name in names if context.get_parameter_source(name) is not default]


def refuse_idle(why: str, *names: str) -> None:
    """Raise BirthlensError if the user gave one of these parameters, which do nothing here; `why` follows the name."""
    if idle := given(*names):
        raise BirthlensError(f"{', '.join(idle)}: {why}; leave {'it' if len(idle) == 1 else 'them'} out.")


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device`."""
    return click.option(
        "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, mps or auto (a GPU where it pays)."
    )(function)


def how_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device`, `--precision` and `--sampler`."""
    precision = click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="Precision of matrix products; weights stay float32.",
    )
    sampler = click.option(
        "--sampler",
        type=click.Choice(["numpy", "counter"]),
        default="numpy",
        show_default=True,
        help="How batches are drawn; counter draws on the device, other batches than numpy.",
    )
    return device_option(precision(sampler(function)))
