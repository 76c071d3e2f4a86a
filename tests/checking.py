"""The type checker that the tests put around every function of the package: beartype, without what it cannot judge."""

import re
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

UNJUDGED = re.compile(r"\bSelf\b")
"""Annotations that mean something inside a decorated class only; jaxtyping decorates methods one by one."""


NUMERIC_TOWER = BeartypeConf(is_pep484_tower=True)
"""An int is a float where one is asked for, as for every type checker."""


REFUSES_ITSELF = "it takes what a user wrote, and the tests read the sentence with which it refuses"
STANDS_IN = "tests give it stand-ins that have only what it reads"
UNCHECKED = {
    "Intervention.__init__": REFUSES_ITSELF,
    "EdgeIntervention.__init__": REFUSES_ITSELF,
    "FoldedStep.evaluate": REFUSES_ITSELF,
    "FoldedStep.loss_and_gradients": REFUSES_ITSELF,
    "FoldedStep._checked": REFUSES_ITSELF,
    "ideal_weights": REFUSES_ITSELF,
    "ideal_matrices": REFUSES_ITSELF,
    "_readers": REFUSES_ITSELF,
    "width_table": REFUSES_ITSELF,
    "Evidence.__init__": STANDS_IN,
    "emergence": STANDS_IN,
    "exceeded": STANDS_IN,
    "held_out": STANDS_IN,
    "run_names": STANDS_IN,
}
"""Functions whose annotations are not checked, and why."""


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its arguments and result are held to their annotations."""
    if function.__qualname__ in UNCHECKED:
        return function
    annotations = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in annotations.items() if not UNJUDGED.search(str(hint))}
    return beartype(conf=NUMERIC_TOWER)(function)
