"""Do population gradients store memories? What a step against the gradient writes between the codebooks, by formula.

For clean inputs w_E(z) at W = 0 (exact) and noisy ones w_E(z) + N(0, 1) (Monte Carlo), the targets follow the corpus's
bigrams, and the written table is correlated with p(z) (p(k|z) - 1/N). Attention gradients (Monte Carlo) are those of the
theorem: W_O^2 with all memories empty, W_K^2 with ideal W_O^2, W_K^1 with both ideal. `signal` is the mean right score minus
the mean of the others, over the others' standard deviation. `relative error` is the norm of all standard errors over that of
the mean. `noisy less clean` is about 1 if formula and error bars are right.

python analyses/do_population_gradients_store_memories.py --tier laptop        # 1 minute on one core
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from asking import joined, options, tell

from birthlens.analysis.memories.ideal import ideal_matrices
from birthlens.analysis.theory.first_step import zeroed
from birthlens.analysis.theory.gradients import (
    MATRICES,
    Estimate,
    clean_gradient,
    estimate,
    noisy_gradient,
    population_gradients,
)
from birthlens.analysis.theory.three_steps import Memory, memories
from birthlens.config.model import ModelConfig
from birthlens.config.run import CorpusConfig, TaskConfig
from birthlens.model.initialisation import initial_weights
from birthlens.model.weights import Weights
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.corpus import BigramStatistics, statistics_of

SCALES = {"laptop": (16, 32, 64, 5), "paper": (64, 64, 64, 5)}
CASES = [(init, d) for init in ("authors", "orthogonal") for d in (128, 256)]
DRAWS = 2000
Array = np.ndarray


def relative(found: Estimate) -> float:
    """Return the norm of the errors over the norm of the mean."""
    return float(np.linalg.norm(found.error) / np.linalg.norm(found.mean))


def one_map(weights: Weights, statistics: BigramStatistics, batches: int, seed: int) -> dict[str, float]:
    """Compare the gradients of clean and of noisy inputs at W = 0 with the table that they should store."""
    inputs, outputs = weights["W_E"].astype(float), weights["W_U"].T.astype(float)
    joint, start = statistics.unigram[:, None] * statistics.bigram, np.zeros((inputs.shape[1], outputs.shape[1]))
    stored = joint - joint.sum(1, keepdims=True) / len(statistics)
    exact, generator = clean_gradient(joint, inputs, outputs, start), np.random.default_rng(seed)

    def draw() -> Array:
        tokens, targets = np.divmod(generator.choice(joint.size, DRAWS, p=joint.reshape(-1)), len(statistics))
        noise = generator.standard_normal((DRAWS, inputs.shape[1]))
        return noisy_gradient(inputs[tokens] + noise, targets, outputs, start)

    noisy = estimate(draw() for _ in range(batches))

    def correlation(gradient: Array) -> float:
        return float(np.corrcoef((inputs @ -gradient @ outputs.T).reshape(-1), stored.reshape(-1))[0, 1])

    return {
        "clean inputs: correlation": correlation(exact),
        "noisy inputs: correlation": correlation(noisy.mean),
        "noisy inputs: relative error": relative(noisy),
        "noisy less clean, in errors (rms)": float(np.sqrt((((noisy.mean - exact) / noisy.error) ** 2).mean())),
    }


def signal(memory: Memory, written: Array) -> float:
    """Return the mean of the right scores minus that of the others, over the standard deviation of the others."""
    scores = memory.scores(written)
    scores = scores[1:, :-1] if memory.previous else scores[np.ix_(memory.candidates, memory.candidates)]
    others = scores[~np.eye(len(scores), dtype=bool)]
    return float((scores.diagonal().mean() - others.mean()) / others.std())


def gradients(init: str, width: int, batches: int, sequences: int, context: int, seed: int) -> pd.DataFrame:
    """Compute all gradients of one case and seed: columns case, seed, quantity, value."""
    statistics = statistics_of(CorpusConfig())
    task = BigramTask(TaskConfig(context=context, triggers="random"), statistics)
    model = ModelConfig(d_model=width, init=init)  # type: ignore[arg-type]
    weights = zeroed(initial_weights(model, len(statistics), context, np.random.default_rng(seed)))
    parts, ideal = memories(weights, task), ideal_matrices(weights)
    found = one_map(weights, statistics, batches, seed)
    for name in MATRICES:
        gradient = population_gradients(weights, task, batches, sequences, seed)[name]
        found[f"{name}: signal"] = signal(parts[name], -gradient.mean[0])
        found[f"{name}: relative error"] = relative(gradient)
        weights = weights.replaced({name: ideal[name].astype(np.float32)})
    rows = [(f"{init}, d = {width}", seed, quantity, value) for quantity, value in found.items()]
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def main() -> None:
    """Compute the gradients for every case and seed, write and print them."""
    arguments = options(__file__, __doc__)
    batches, sequences, context, seeds = SCALES[arguments.tier]
    drawn = range(arguments.seeds or seeds)
    jobs = [(*case, batches, sequences, context, seed) for case in CASES for seed in drawn]
    tell(arguments, joined(gradients, jobs, arguments.processes))


if __name__ == "__main__":
    main()
