"""Annotations that wait for somebody to read them."""

from __future__ import annotations

from typing import get_type_hints

import jaxtyping
import numpy as np
import pytest

from birthlens import shapes
from birthlens.analysis.memories.duals import dual_vectors

DTYPES = {
    "Bool": "bool",
    "Float": "float64",
    "Float32": "float32",
    "Int": "int32",
    "Int64": "int64",
    "Num": "int16",
    "Shaped": "int8",
    "UInt32": "uint32",
}

ANYTHING = "Shaped"
OTHER = {name: "bool" if name == "Num" else "complex64" for name in DTYPES if name != ANYTHING}


@pytest.mark.parametrize(
    "name", [name for name in vars(shapes) if name[0].isupper() and name not in ("Any", "TYPE_CHECKING")]
)
def test_a_deferred_name_is_jaxtypings_own(name: str) -> None:
    deferred, own = (getattr(module, name)[np.ndarray, "a b"] for module in (shapes, jaxtyping))
    assert (deferred.dtypes, deferred.dim_str, deferred.array_type) == (own.dtypes, "a b", np.ndarray)
    assert isinstance(np.zeros((2, 3), dtype=DTYPES[name]), deferred)
    assert not isinstance(np.zeros(3, dtype=DTYPES[name]), deferred)
    if name != ANYTHING:
        assert not isinstance(np.zeros((2, 3), dtype=OTHER[name]), deferred)


def test_annotations_are_still_types_and_still_checked() -> None:
    assert repr(get_type_hints(dual_vectors)["return"]) == repr(jaxtyping.Float[np.ndarray, "*step entry d"])
    for wrong in (np.zeros(3), np.zeros((2, 3), dtype=np.int64)):
        with pytest.raises(jaxtyping.TypeCheckError, match="entry d"):  # by the hook of conftest.py
            dual_vectors(wrong)
