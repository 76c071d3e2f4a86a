"""The claims of the theory, as data: three gradient steps, and the first of them predicted from data counts.

None needs a run: the statistics of `theory` draw their own sequences. Bounds were chosen as in `catalogue`.
"""

from __future__ import annotations

from collections.abc import Sequence

from birthlens.analysis.theory.first_step import PREDICTIONS
from birthlens.claims.claim import Claim, Expectation
from birthlens.claims.statistics import theory

HOW = {"uniform": "p_hat = 1/N", "frequency": "p_hat = p(y)", "model": "the model's own p_hat"}
_RECOVERED = (
    Expectation("least_recall", "recall of the memory with the lowest recall", 0.9),
    Expectation("accuracy", "in-context accuracy after the third step", 0.9),
)


VARIANTS = {
    "three-steps-unprojected",
    "three-steps-naive",
    "three-steps-gaussian",
    "three-steps-bigrams",
    "first-step-from-counts",
    "first-step-orthogonal",
    "first-step-orthogonal-frequency",
}
"""Claims that change an assumption of the theory, to show which ones it needs."""


def _three(
    id: str,
    sentence: str,
    case: str = "theorem",
    order: Sequence[str] = (),
    expectations: tuple[Expectation, ...] = _RECOVERED,
) -> Claim:
    small = {"sequences": 4096, "d_model": 256, "context": 64, "case": case}
    if order:
        small["order"] = tuple(order)
    return Claim(
        id=id,
        variant=id in VARIANTS,
        sentence=sentence,
        statistic=theory.three_steps,
        settings=small,
        tiers={"paper": {"sequences": 8192, "d_model": 512}},
        expectations=expectations,
    )


def _first(id: str, sentence: str, init: str, expectations: tuple[Expectation, ...]) -> Claim:
    return Claim(
        id=id,
        variant=id in VARIANTS,
        sentence=sentence,
        statistic=theory.first_step,
        settings={"widths": (64, 512), "context": 64, "sequences": 512, "init": init},
        tiers={"paper": {"widths": (64, 1024), "context": 256, "sequences": 2048}},
        expectations=expectations,
    )


def _level(prediction: str) -> Expectation:
    says = f"off-diagonal correlation at the largest d, {HOW[prediction]}"
    return Expectation(f"off_diagonal_{prediction}", says, 0.9)


def _growth(prediction: str) -> Expectation:
    says = f"off-diagonal correlation gained from the smallest to the largest d, {HOW[prediction]}"
    return Expectation(f"growth_{prediction}", says, 0)


THEORY: tuple[Claim, ...] = (
    _three(
        "three-steps",
        "Three gradient steps in the order W_O^2, W_K^2, W_K^1, each step projected on its own family's span, make an "
        "induction head, under the theorem's assumptions.",
    ),
    _three(
        "three-steps-unprojected",
        "They do so without the projection, everything else unchanged.",
        "not projected",
    ),
    _three(
        "three-steps-naive",
        "They do so with the authors' embeddings, the corpus's bigrams, absorbed sequences and the plain gradient, without "
        "projection.",
        "none",
    ),
    _three(
        "three-steps-gaussian",
        "They do so with the authors' embeddings, each step projected on its own family's span, everything else unchanged.",
        "gaussian embeddings",
    ),
    _three(
        "three-steps-bigrams",
        "They do so with the corpus's bigrams, each step projected on its own family's span, everything else unchanged.",
        "corpus bigrams",
    ),
    _three(
        "three-steps-wrong-order",
        "Another order stores nothing: before W_O^2 has moved, W_K^2 has a gradient of zero.",
        order=("L1.W_K", "L1.W_O", "L0.W_K"),
        expectations=(Expectation("first_gradient", "norm of the gradient of W_K^2 as the first step", below=1e-12),),
    ),
    _first(
        "first-step-grows",
        "Data counts predict the first step on W_O^2 on the diagonal; off it, the predictions improve with d.",
        "authors",
        (
            *map(_growth, PREDICTIONS),
            *(
                Expectation(f"diagonal_{name}", f"correlation on the diagonal at the largest d, {HOW[name]}", 0.9)
                for name in PREDICTIONS
            ),
        ),
    ),
    _first(
        "first-step-from-counts",
        "At the largest d tried, with the authors' embeddings, they also predict it off the diagonal.",
        "authors",
        tuple(map(_level, PREDICTIONS)),
    ),
    _first(
        "first-step-orthogonal",
        "With orthogonal codebooks, the theory's limit of large d, they also predict it off the diagonal.",
        "orthogonal",
        (_level("uniform"), _level("model")),
    ),
    _first(
        "first-step-orthogonal-frequency",
        "With orthogonal codebooks they do so with p(y) for p_hat too, which is not what the model predicts there.",
        "orthogonal",
        (_level("frequency"),),
    ),
)
