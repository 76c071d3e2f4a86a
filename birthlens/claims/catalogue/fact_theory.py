"""Claims of factual recall on reduced models, as data; none needs a run. Bounds and the times predicted are ours."""

from __future__ import annotations

from birthlens.claims.claim import Claim, Expectation
from birthlens.claims.statistics import fact_theory

PUBLISHED = {"subjects": 16, "relations": 4, "steps": 800}
REVERSED = {"subjects": 4, "relations": 8, "steps": 500}

FACT_THEORY: tuple[Claim, ...] = (
    Claim(
        id="facts-stage",
        paper="facts",
        sentence="Linear attention from a small init, trained by SGD, first uses the relation alone for a stage, and then "
        "learns the facts.",
        statistic=fact_theory.stages,
        settings=PUBLISHED,
        expectations=(
            Expectation("steps_later", "steps from relation accuracy 0.9 to fact accuracy 0.5", 0),
            Expectation(
                "stage_kl", "lowest KL from p(answer | relation), fact accuracy at most 0.2 (nats)", below=0.05
            ),
        ),
    ),
    Claim(
        id="facts-escape-times",
        paper="facts",
        sentence="Relations and subjects escape from a small init at the steps that their gradients predict.",
        statistic=fact_theory.stages,
        settings=PUBLISHED,
        expectations=(
            Expectation("relation_off", "distance from the predicted step, as a share of it: relations", below=0.2),
            Expectation("subject_off", "distance from the predicted step, as a share of it: subjects", below=0.2),
        ),
    ),
    Claim(
        id="facts-subjects-first",
        paper="facts",
        sentence="With few subjects and many relations, subjects escape first.",
        statistic=fact_theory.stages,
        settings=REVERSED,
        expectations=(
            Expectation("subject_later", "steps from the escape of relations to that of subjects", below=0),
            Expectation("subject_off", "distance from the predicted step of subjects, as a share of it", below=0.2),
        ),
    ),
    Claim(
        id="facts-linear-capacity",
        paper="facts",
        sentence="A learned linear memory of d^2 parameters holds N associations with N log N in proportion to d^2.",
        statistic=fact_theory.capacity,
        settings={"widths": (8, 12, 16, 24, 32)},
        expectations=(
            Expectation("off_constant", "largest distance of N log N / d^2 from its mean, as a share", below=0.2),
            Expectation("slope", "slope of log(N log N) on log d, d = 8 to 32", 1.7, 2.1),
        ),
    ),
)
