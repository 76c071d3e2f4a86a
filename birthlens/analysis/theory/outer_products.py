"""One associative memory alone: outer products learned by gradient descent under Zipf data.

Tokens x = 1..N have p(x) ~ x^-exponent and one right output y(x) each. W stores sum_x q(x) e_x^T u_y(x) and answers
argmax_y e_x W u_y^T. This follows Cabannes, Dohmatob and Bietti (scaling laws for associative memories) and Cabannes, Simsek
and Bietti (learning associative memories with gradient descent). With d < N some associations interfere, and the weights q
determine which survive. Gradient descent first enlarges the margins of frequent tokens. Large steps make it oscillate, but
the final result is no worse.

    margin          e_x W u_y(x) - max over other y          > 0: recalled
    interference    root mean square score of wrong outputs around their query's mean
    error           sum of p(x) over the tokens that are not recalled
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

from birthlens.analysis.theory.gradients import clean_gradient
from birthlens.errors import BirthlensError
from birthlens.shapes import Float, Int

Array = np.ndarray
Codes = Literal["unit", "gaussian", "orthogonal"]
Storage = Literal["uniform", "frequency", "root", "first_d"]
STORAGES: tuple[Storage, ...] = ("uniform", "frequency", "root", "first_d")


@dataclass(frozen=True)
class ZipfMemory:
    """N tokens with Zipf frequencies, random embeddings in d dimensions, and one right output each.

    `outputs` is the number of output classes (the N-th token's is (N - 1) mod outputs), by default N. Output vectors are
    uniform on the unit sphere; so are input vectors with `codes="unit"`. With "gaussian" input vectors are N(0, I/d), and
    with "orthogonal" both codebooks are orthonormal.

    Raises:
        BirthlensError: if there are fewer than two tokens or outputs, or more orthogonal vectors than dimensions.
    """

    tokens: int
    d_model: int
    exponent: float = 1.0
    outputs: int | None = None
    seed: int = 0
    codes: Codes = "unit"

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.d_model < 1 or (self.outputs is not None and not 2 <= self.outputs <= self.tokens):
            raise BirthlensError(
                f"tokens = {self.tokens}, d_model = {self.d_model}, outputs = {self.outputs}: a memory needs at least "
                "2 tokens, 1 dimension, and from 2 to `tokens` outputs."
            )
        if self.codes == "orthogonal" and self.tokens > self.d_model:
            raise BirthlensError(
                f"codes = 'orthogonal': {self.tokens} vectors need at least as many dimensions, not {self.d_model}."
            )

    @cached_property
    def frequencies(self) -> Float[Array, "token"]:
        """p(x)."""
        weights = np.arange(1, self.tokens + 1) ** -float(self.exponent)
        return np.asarray(weights / weights.sum())

    @cached_property
    def right(self) -> Int[Array, "token"]:
        """y(x)."""
        return np.arange(self.tokens) % (self.outputs or self.tokens)

    @cached_property
    def codebooks(self) -> tuple[Float[Array, "token d_model"], Float[Array, "output d_model"]]:
        """The vectors e_x and u_y."""
        generator = np.random.default_rng(self.seed)
        books = [generator.standard_normal((n, self.d_model)) for n in (self.tokens, self.outputs or self.tokens)]
        if self.codes == "orthogonal":
            inputs, outputs = (np.linalg.qr(book.T)[0].T for book in books)
            return inputs, outputs
        inputs, outputs = (book / np.linalg.norm(book, axis=1, keepdims=True) for book in books)
        return (books[0] / np.sqrt(self.d_model) if self.codes == "gaussian" else inputs), outputs

    def scores(self, matrix: Float[Array, "d_model d_model"]) -> Float[Array, "token output"]:
        """Return e_x W u_y^T."""
        inputs, outputs = self.codebooks
        return np.asarray(inputs @ matrix @ outputs.T)

    def stored(self, weights: Float[Array, "token"]) -> Float[Array, "d_model d_model"]:
        """Return sum_x q(x) e_x^T u_y(x)."""
        inputs, outputs = self.codebooks
        return np.asarray((inputs * weights[:, None]).T @ outputs[self.right])

    def margins(self, scores: Float[Array, "token output"]) -> Float[Array, "token"]:
        """Return the right score minus the best wrong one."""
        each = np.arange(self.tokens)
        wrong = scores.copy()
        wrong[each, self.right] = -np.inf
        return np.asarray(scores[each, self.right] - wrong.max(1))

    def descent(self, rate: float, steps: int) -> Iterator[Float[Array, "d_model d_model"]]:
        """Yield the matrix at steps 0..steps of gradient descent on the population loss, from zero."""
        return self._descent(rate, (self.frequencies for _ in range(steps)))

    def sampled_descent(
        self, rate: float, steps: int, batch: int, generator: np.random.Generator
    ) -> Iterator[Float[Array, "d_model d_model"]]:
        """Yield the matrix at steps 0..steps of SGD with `batch` new samples in each step, from zero."""
        return self._descent(rate, (generator.multinomial(batch, self.frequencies) / batch for _ in range(steps)))

    def _descent(
        self, rate: float, frequencies: Iterable[Float[Array, "token"]]
    ) -> Iterator[Float[Array, "d_model d_model"]]:
        inputs, outputs = self.codebooks
        joint = np.zeros((self.tokens, len(outputs)))
        matrix = np.zeros((self.d_model, self.d_model))
        yield matrix
        for drawn in frequencies:
            joint[np.arange(self.tokens), self.right] = drawn
            matrix = matrix - rate * clean_gradient(joint, inputs, outputs, matrix)
            yield matrix


def memory_training_table(memory: ZipfMemory, rates: Sequence[float], steps: int = 100) -> pd.DataFrame:
    """Run gradient descent with several step sizes.

    Columns: rate, step, loss, error, recall (share of tokens), margin (mean weighted by frequency), least_margin,
    frequent_margin (of the most frequent token), interference, rose (whether the loss rose at this step).
    """
    rows = []
    each = np.arange(memory.tokens)
    for rate in rates:
        before = np.inf
        for step, matrix in enumerate(memory.descent(rate, steps)):
            scores = memory.scores(matrix)
            margins = memory.margins(scores)
            right = scores[each, memory.right]
            top = scores.max(1)
            loss = float(memory.frequencies @ (top + np.log(np.exp(scores - top[:, None]).sum(1)) - right))
            wrong = np.delete(scores.reshape(-1), each * scores.shape[1] + memory.right).reshape(memory.tokens, -1)
            noise = float(np.sqrt(wrong.var(axis=1).mean()))
            recalled = margins > 0
            error = float(memory.frequencies @ ~recalled)
            mean = float(memory.frequencies @ margins)
            least = float(margins.min())
            rows.append((rate, step, loss, error, recalled.mean(), mean, least, margins[0], noise, loss > before))
            before = loss
    columns = ["rate", "step", "loss", "error", "recall", "margin", "least_margin", "frequent_margin", "interference"]
    return pd.DataFrame(rows, columns=[*columns, "rose"])


def capacity_table(
    tokens: int,
    widths: Sequence[int],
    exponent: float = 1.0,
    storages: Sequence[Storage] = STORAGES,
    outputs: int | None = None,
    seeds: Sequence[int] = (0,),
) -> pd.DataFrame:
    """Measure how much a sum of outer products recalls as d grows, for several weights q.

    uniform: q = 1; frequency: q = p (one small gradient step); root: q = sqrt(p); first_d: q = 1 for the d most frequent.
    Columns: d_model, seed, storage, error, recall, capacity (tokens recalled before the first that is not), n.
    """
    rows = []
    for seed in seeds:
        for width in widths:
            memory = ZipfMemory(tokens, width, exponent, outputs, seed)
            for storage in storages:
                margins = memory.margins(memory.scores(memory.stored(_weights(memory, storage))))
                recalled = margins > 0
                capacity = tokens if recalled.all() else int(recalled.argmin())
                error = float(memory.frequencies @ ~recalled)
                rows.append((width, seed, storage, error, float(recalled.mean()), capacity, tokens))
    return pd.DataFrame(rows, columns=["d_model", "seed", "storage", "error", "recall", "capacity", "n"])


def _weights(memory: ZipfMemory, storage: Storage) -> Float[Array, "token"]:
    if storage == "frequency":
        return memory.frequencies
    if storage == "root":
        return np.sqrt(memory.frequencies)
    if storage == "first_d":
        return (np.arange(memory.tokens) < memory.d_model).astype(np.float64)
    return np.ones(memory.tokens)
