"""jaxtyping's shape annotations, without cost for a program that never evaluates one.

Annotations are strings (`from __future__ import annotations`), used by readers, by type checkers, and in the tests by
beartype. Importing jaxtyping takes a sixth of the time in which `birthlens probe` reads 200 checkpoints, so it is imported
only when the first annotation is evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Int as Int
    from jaxtyping import Int64 as Int64
    from jaxtyping import Num as Num
    from jaxtyping import Shaped as Shaped
    from jaxtyping import UInt32 as UInt32
else:

    class _Deferred:
        """A name of jaxtyping, looked up when it is subscripted."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, array_and_shape: tuple[type, str]) -> Any:
            import jaxtyping

            return getattr(jaxtyping, self.name)[array_and_shape]

    Bool, Float, Float32, Int, Int64, Num, Shaped, UInt32 = map(
        _Deferred, ("Bool", "Float", "Float32", "Int", "Int64", "Num", "Shaped", "UInt32")
    )
