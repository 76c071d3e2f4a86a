"""The simplified two-layer model as a few small tables, since its embeddings and most of its maps are frozen.

With the codebook U = [W_pos; W_E] a token z at position t enters as x = U[t] + U[n_pos + z], and (layers count from 0)

    scores   S = scale U W_Q0 W_K0^T U^T    score of layer 0: four entries of S, no product over d_model
    values   V = U W_V0 W_O0                layer 0 writes sum_s pattern0(t, s) (V[s] + V[n_pos + z_s]) to give x1
    bilinear B = scale W_Q1 W_K1^T          score of layer 1: x1_t B x1_s^T, so that its keys are x1 itself
    direct   G = (1 + W_F) W_U              logits_t = x1_t G + c_t H, where c_t = sum_s pattern1(t, s) x1_s
    attended H = W_V1 W_O1 G

(paper section 4.2). Products with the weights of layer 1 are taken only at positions that carry a loss. A training step
is `_fold`, then the loss and its gradients with respect to S, B, G and H, then the chain rule back to the weights. Only the
middle part uses the batch; it is implemented in torch (`torch_step`) and in Numba (`numba_step`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from birthlens.errors import BirthlensError
from birthlens.shapes import Bool, Float32, Int

Array = np.ndarray

TRAINABLE = ("L0.W_K", "L1.W_K", "L1.W_O", "L1.W_F")
MAX_ENTRIES = 2048
"""Largest number of rows of the codebook; the table of scores has its square."""

_QUIET = np.errstate(over="ignore", invalid="ignore")
"""No warnings about each product: a diverged run shows in its loss, which the caller checks."""


class Tables(NamedTuple):
    """The tables that a step reads: U, V, S (rows are queries), B, G, H of the equations above."""

    codebook: Float32[Array, "entry d_model"]
    values: Float32[Array, "entry d_model"]
    scores: Float32[Array, "entry entry"]
    bilinear: Float32[Array, "d_model d_model"]
    direct: Float32[Array, "d_model d_vocab"]
    attended: Float32[Array, "d_model d_vocab"]


class Sums(NamedTuple):
    """Gradients of the loss with respect to four of the tables; those that are not needed may hold anything."""

    scores: Float32[Array, "entry entry"]
    bilinear: Float32[Array, "d_model d_model"]
    direct: Float32[Array, "d_model d_vocab"]
    attended: Float32[Array, "d_model d_vocab"]


class Needs(NamedTuple):
    """Which of the sums a pass computes; without any it is a forward pass."""

    scores: bool = False
    bilinear: bool = False
    direct: bool = False
    attended: bool = False


class Batch(NamedTuple):
    """Checked input: the targets of sequence b are entries starts[b] to starts[b + 1] of `positions` and `targets`."""

    tokens: Int[Array, "batch pos"]
    starts: Int[Array, " batch_plus_1"]
    positions: Int[Array, " target"]
    targets: Int[Array, " target"]


class StepOutcome(NamedTuple):
    """Results at the positions of the mask, in row-major order: `outcome.losses` has the order of `x[mask]`.

    `logits` has no rows where they were not requested.
    """

    losses: Float32[Array, " target"]
    predictions: Int[Array, " target"]
    logits: Float32[Array, "row d_vocab"]


class StepResult(NamedTuple):
    """One training step: mean loss, gradients by weight, number of right predictions, and the outcome at each position."""

    loss: float
    gradients: dict[str, Float32[Array, "..."]]
    n_correct: int
    outcome: StepOutcome


class FoldedStep(ABC):
    """Loss, gradients and evaluation of the simplified model, written by hand.

    `weights` maps names to float32 arrays in TransformerLens orientation; `L1.W_F` may be absent. `trained` is the subset of
    `TRAINABLE` that needs gradients: these arrays are read at every call, so update them in place between calls. All
    others are frozen, and what depends on them alone is computed once, here.

    Raises:
        BirthlensError: if these are not the weights of a two-layer simplified model, or `trained` names something else.
    """

    def __init__(
        self, weights: Mapping[str, Array], score_scale: float, trained: Sequence[str], pos_multiple: int = 1
    ) -> None:
        _check_weights(weights, trained)
        self.trained = tuple(trained)
        self.n_ctx, self.d_model = weights["W_pos"].shape
        self.d_vocab = len(weights["W_E"])
        self.n_pos = -(-self.n_ctx // pos_multiple) * pos_multiple
        self._weights = weights
        self._scale = np.float32(score_scale)
        self._codebook = np.zeros((self.n_pos + self.d_vocab, self.d_model), np.float32)
        self._codebook[: self.n_ctx] = weights["W_pos"]
        self._codebook[self.n_pos :] = weights["W_E"]
        with single_threaded_blas():
            self._values = self._codebook @ weights["L0.W_V"][0] @ weights["L0.W_O"][0]
        self._needs = Needs(
            scores="L0.W_K" in trained,
            bilinear="L1.W_K" in trained,
            direct="L1.W_F" in trained,
            attended="L1.W_O" in trained or "L1.W_F" in trained,
        )

    @_QUIET
    def loss_and_gradients(
        self, tokens: Int[Array, "batch pos"], targets: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"]
    ) -> StepResult:
        """Return the mean cross-entropy over the positions of the mask, and its gradients.

        Raises:
            BirthlensError: if shapes or ids do not fit, or no position is marked, so that there is no mean loss.
        """
        batch = self._checked(tokens, targets, mask)
        if not len(batch.targets):
            raise BirthlensError("mask: no position of the batch is marked, so it has no loss; take a larger batch.")
        tables = self._fold()
        outcome, sums = self._run(batch, tables, self._needs, logits=False)
        return StepResult(
            loss=float(outcome.losses.mean(dtype=np.float64)),
            gradients=self._unfold(tables, sums),
            n_correct=int((outcome.predictions == batch.targets).sum()),
            outcome=outcome,
        )

    @_QUIET
    def evaluate(
        self,
        tokens: Int[Array, "batch pos"],
        targets: Int[Array, "batch pos"],
        mask: Bool[Array, "batch pos"],
        *,
        logits: bool = False,
    ) -> StepOutcome:
        """Return losses, predicted tokens and, if requested, logits at the positions of the mask (it may be empty)."""
        return self._run(self._checked(tokens, targets, mask), self._fold(), Needs(), logits=logits)[0]

    @abstractmethod
    def _run(self, batch: Batch, tables: Tables, needs: Needs, *, logits: bool) -> tuple[StepOutcome, Sums]:
        """Run the folded model over a batch; the sums are gradients of the mean loss."""

    def _fold(self) -> Tables:
        weights = self._weights
        codebook = self._codebook
        with single_threaded_blas():
            direct = weights["W_U"]
            if "L1.W_F" in weights:
                direct = direct + weights["L1.W_F"] @ direct
            return Tables(
                codebook=codebook,
                values=self._values,
                scores=codebook @ (self._scale * weights["L0.W_Q"][0] @ weights["L0.W_K"][0].T) @ codebook.T,
                bilinear=self._scale * weights["L1.W_Q"][0] @ weights["L1.W_K"][0].T,
                direct=direct,
                attended=weights["L1.W_V"][0] @ (weights["L1.W_O"][0] @ direct),
            )

    def _unfold(self, tables: Tables, sums: Sums) -> dict[str, Array]:
        """Apply the chain rule from the tables back to the trained weights."""
        weights = self._weights
        codebook = self._codebook
        gradients: dict[str, Array] = {}
        with single_threaded_blas():
            if "L0.W_K" in self.trained:
                circuit = codebook.T @ (sums.scores @ codebook)
                gradients["L0.W_K"] = self._scale * (circuit.T @ weights["L0.W_Q"][0])[None]
            if "L1.W_K" in self.trained:
                gradients["L1.W_K"] = self._scale * (sums.bilinear.T @ weights["L1.W_Q"][0])[None]
            if "L1.W_O" in self.trained:
                gradients["L1.W_O"] = (weights["L1.W_V"][0].T @ (sums.attended @ tables.direct.T))[None]
            if "L1.W_F" in self.trained:
                through_head = weights["L1.W_O"][0].T @ (weights["L1.W_V"][0].T @ sums.attended)
                gradients["L1.W_F"] = (sums.direct + through_head) @ weights["W_U"].T
        return {name: gradients[name] for name in self.trained}

    def _checked(self, tokens: Array, targets: Array, mask: Array) -> Batch:
        if tokens.ndim != 2 or not tokens.shape == targets.shape == mask.shape:
            raise BirthlensError(
                f"tokens, targets and mask have shapes {tokens.shape}, {targets.shape} and {mask.shape}; "
                "all three must be [batch pos]."
            )
        if tokens.shape[1] > self.n_ctx:
            raise BirthlensError(f"tokens have {tokens.shape[1]} positions; this model has n_ctx = {self.n_ctx}.")
        if mask.dtype != np.bool_:
            raise BirthlensError(f"mask has dtype {mask.dtype}; it must be bool.")
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.d_vocab:
                raise BirthlensError(f"{name} go from {ids.min()} to {ids.max()}; valid are 0 to {self.d_vocab - 1}.")
        rows, positions = np.nonzero(mask)
        starts = np.searchsorted(rows, np.arange(len(mask) + 1))
        return Batch(tokens, starts, np.ascontiguousarray(positions), targets[mask].astype(np.int64))


def obstacle(n_ctx: int, d_vocab: int) -> str | None:
    """Return why a context and a vocabulary are too large to be folded, or return None if they are not."""
    if n_ctx + d_vocab <= MAX_ENTRIES:
        return None
    return f"n_ctx + d_vocab = {n_ctx + d_vocab}: the tables of the simplified step hold at most {MAX_ENTRIES}"


def single_threaded_blas() -> AbstractContextManager[Any]:
    """Run the BLAS of numpy and scipy on one thread, so that results do not depend on the number of cores.

    Idle BLAS threads, which spin for a while after each product, then also leave the cores to the step.
    """
    limited: AbstractContextManager[Any] = _blas().limit(limits=1)
    return limited


@cache
def _blas() -> Any:
    import scipy.linalg.cython_blas  # noqa: F401  scipy has its own BLAS, which must be loaded before the search
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _check_weights(weights: Mapping[str, Array], trained: Sequence[str]) -> None:
    if missing := [name for name in ("W_E", "W_pos") if name not in weights]:
        raise BirthlensError(f"{missing[0]} is missing; the simplified step needs embeddings and absolute positions.")
    d_vocab, d_model = weights["W_E"].shape
    n_ctx = len(weights["W_pos"])
    square = {f"L{layer}.{name}": (1, d_model, d_model) for layer in (0, 1) for name in ("W_Q", "W_K", "W_V", "W_O")}
    shapes = {"W_E": (d_vocab, d_model), "W_pos": (n_ctx, d_model), **square, "W_U": (d_model, d_vocab)}
    if "L1.W_F" in weights:
        shapes["L1.W_F"] = (d_model, d_model)
    if unknown := set(weights) - set(shapes):
        raise BirthlensError(f"the simplified step has no weight {', '.join(sorted(unknown))}; train it by autograd.")
    for name, shape in shapes.items():
        found = f"{weights[name].dtype} {weights[name].shape}" if name in weights else "missing"
        if found != f"float32 {shape}":
            raise BirthlensError(
                f"{name} is {found}; the simplified step (two layers of one head) needs float32 {shape}."
            )
    if too_large := obstacle(n_ctx, d_vocab):
        raise BirthlensError(f"{too_large}; train by autograd.")
    if unknown := set(trained) - (set(TRAINABLE) & set(shapes)):
        valid = ", ".join(name for name in TRAINABLE if name in shapes)
        raise BirthlensError(f"trained names {', '.join(sorted(unknown))}; this model has gradients for {valid} only.")
