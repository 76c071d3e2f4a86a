"""What a test knows and annotations do not say."""

from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that must be there."""
    assert value is not None
    return value


def gradient_of(parameter: Tensor) -> "np.ndarray[Any, Any]":
    """Return the gradient that a backward pass left."""
    return present(parameter.grad).numpy()


def loc(table: "pd.DataFrame | pd.Series[Any]") -> Any:
    """Return `table.loc`: what stands at a label (a row, a number, a text) is known to the test only."""
    return table.loc


def close(iterator: Iterator[object]) -> None:
    """Close a generator that a function returned as an iterator."""
    assert isinstance(iterator, Generator)
    iterator.close()
