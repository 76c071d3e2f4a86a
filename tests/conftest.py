"""Shapes in signatures are checked while the tests run: jaxtyping's annotations, by beartype."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

# Two cores: BLAS threads of several processes only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")

CHECKED = ["birthlens.task", "birthlens.corpus", "birthlens.sampling", "birthlens.weights", "birthlens.initialisation",
           "birthlens.forward", "birthlens.model", "birthlens.oracles", "birthlens.training.engines",
           "birthlens.analysis.memories", "birthlens.analysis.behaviour", "birthlens.analysis.readings",
           "birthlens.analysis.strongest", "birthlens.analysis.circuits", "birthlens.analysis.layer_norms",
           "birthlens.analysis.recall", "birthlens.analysis.ledger", "birthlens.analysis.nulls",
           "birthlens.analysis.ledger_tables", "birthlens.analysis.birth_order", "birthlens.analysis.terms"]  # fmt: skip
install_import_hook(CHECKED, "beartype.beartype")

# A landing is judged by the same examples each time; new ones are looked for where somebody can look at what they found.
settings.register_profile("birthlens", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("birthlens")
