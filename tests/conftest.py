"""Shapes in signatures are checked while the tests run: jaxtyping's annotations, by beartype."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

# Two cores: BLAS threads of several processes only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")

CHECKED = ["birthlens.task", "birthlens.corpus", "birthlens.sampling", "birthlens.weights", "birthlens.initialisation",
           "birthlens.forward", "birthlens.model", "birthlens.oracles", "birthlens.training.engines",
           "birthlens.analysis.memories", "birthlens.analysis.behaviour"]  # fmt: skip
install_import_hook(CHECKED, "beartype.beartype")

settings.register_profile("birthlens", deadline=None, print_blob=True)
settings.load_profile("birthlens")
