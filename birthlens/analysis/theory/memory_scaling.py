"""How the error of one associative memory falls with its width d and with the number T of samples, under Zipf data.

T samples of x with p(x) ~ x^-a are counted, and W = sum_x q(x) e_x^T u_y(x) stores what was seen, with e_x ~ N(0, I/d), u_y
on the unit sphere and M output classes. The weights q are a power of the counts, or 1 for the d/12 most frequent tokens and
0 for the others. This follows Cabannes, Dohmatob and Bietti 2023 (arXiv 2310.02984), whose rates are

    q = p^rho      d^(-(a - 1) / (2 rho a)) + T^(1/a - 1)
    thresholded    d^(1 - a)                + T^(1/a - 1)

The data term is known exactly: (1 - 1/M) sum_x p(x) (1 - p(x))^T, from the mass of the tokens that are in no sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from birthlens.analysis.theory.outer_products import ZipfMemory
from birthlens.errors import BirthlensError
from birthlens.shapes import Float

Array = np.ndarray


@dataclass(frozen=True)
class Scheme:
    """How strongly a memory stores a token: q = counts^power, or with `threshold` q = 1 for the d/12 most frequent."""

    name: str
    power: float = 0.0
    threshold: bool = False

    def weights(self, counts: Float[Array, "token"], d_model: int) -> Float[Array, "token"]:
        """Return q for each token, at most 1; 0 for a token that was never seen."""
        seen = counts > 0
        if not self.threshold:
            return np.where(seen, (counts / counts.max()) ** self.power, 0.0)
        kept = np.zeros(len(counts))
        kept[np.argsort(-counts, kind="stable")[: max(1, d_model // 12)]] = 1.0
        return kept * seen

    def rate(self, exponent: float) -> float:
        """Return the published slope of log(error) on log(d); NaN if there is no power law (power 0)."""
        if self.threshold:
            return 1 - exponent
        return -(exponent - 1) / (2 * self.power * exponent) if self.power else float("nan")


SCHEMES = (
    Scheme("q = 1"),
    Scheme("q = p", 1.0),
    Scheme("q = sqrt(p)", 0.5),
    Scheme("thresholded", threshold=True),
)


def data_rate(exponent: float) -> float:
    """Return the published slope of log(data term) on log(T), 1/a - 1."""
    return 1 / exponent - 1


def data_term(memory: ZipfMemory, samples: int) -> float:
    """Return the expected error of a memory that stores everything it has seen without interference."""
    unseen = float(memory.frequencies @ (1 - memory.frequencies) ** samples)
    return (1 - 1 / (memory.outputs or memory.tokens)) * unseen


def scaling_table(
    exponents: Sequence[float],
    widths: Sequence[int],
    samples: Sequence[int | None] = (None,),
    seeds: Sequence[int] = (0,),
    schemes: Sequence[Scheme] = SCHEMES,
    tokens: int = 1000,
    outputs: int = 5,
) -> pd.DataFrame:
    """Measure the error for every exponent a, width d, number of samples T (None: p itself is known), scheme and seed.

    Columns: exponent, d_model, samples (infinity if p is known), scheme, seed, error, data_term (its expectation).

    Example:
        >>> table = scaling_table([2.0], [16, 64], tokens=50)
        >>> list(table.columns)
        ['exponent', 'd_model', 'samples', 'scheme', 'seed', 'error', 'data_term']
    """
    rows = []
    for exponent in exponents:
        for seed in seeds:
            for width in widths:
                memory = ZipfMemory(tokens, width, exponent, outputs, seed, codes="gaussian")
                for drawn in samples:
                    counts = memory.frequencies if drawn is None else _counts(memory, drawn)
                    floor = 0.0 if drawn is None else data_term(memory, drawn)
                    for scheme in schemes:
                        error = _error(memory, scheme.weights(counts, width))
                        rows.append((exponent, width, drawn or np.inf, scheme.name, seed, error, floor))
    columns = ["exponent", "d_model", "samples", "scheme", "seed", "error", "data_term"]
    return pd.DataFrame(rows, columns=columns)


def slope(sizes: Sequence[float] | Float[Array, "size"], errors: Sequence[float] | Float[Array, "size"]) -> float:
    """Return the slope of log(errors) on log(sizes) by least squares; NaN if an error is zero.

    Raises:
        BirthlensError: if there are fewer than two sizes.

    Example:
        >>> slope([1, 2, 4], [8.0, 2.0, 0.5])
        -2.0
    """
    if len(sizes) < 2:
        raise BirthlensError(f"sizes = {list(sizes)}: a slope needs at least two.")
    if not min(errors) > 0:
        return float("nan")
    return round(float(np.polyfit(np.log(sizes), np.log(errors), 1)[0]), 12)


def _counts(memory: ZipfMemory, samples: int) -> Float[Array, "token"]:
    """Count T samples; they have a random stream of their own, so that the codebooks of a seed do not change with T."""
    generator = np.random.default_rng((memory.seed, 1, samples))
    return generator.multinomial(samples, memory.frequencies).astype(float)


def _error(memory: ZipfMemory, weights: Float[Array, "token"]) -> float:
    """Return the error of the stored sum; W u^T is computed directly, without the d x d matrix."""
    inputs, outputs = memory.codebooks
    votes = (outputs @ outputs.T)[memory.right]
    margins = memory.margins(inputs @ (inputs.T @ (weights[:, None] * votes)))
    return float(memory.frequencies @ ~(margins > 0))
