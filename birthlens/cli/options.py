"""Options that the user gave, and the refusal of those that would do nothing."""

from __future__ import annotations

import click

from birthlens.errors import BirthlensError


def given(*names: str) -> list[str]:
    """Return those of some parameters of the command that the user gave, as they are typed."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    typed = {str(parameter.name): max(parameter.opts, key=len) for parameter in context.command.params}
    return [typed[name] for name in names if context.get_parameter_source(name) is not default]


def refuse_idle(why: str, *names: str) -> None:
    """Raise BirthlensError where the user gave one of these parameters, which do nothing here; `why` follows the name."""
    if idle := given(*names):
        raise BirthlensError(f"{', '.join(idle)}: {why}; leave {'it' if len(idle) == 1 else 'them'} out.")
