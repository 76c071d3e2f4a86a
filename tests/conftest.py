"""Shapes in signatures are checked while the tests run: jaxtyping's annotations, by beartype."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

# Two cores: BLAS threads of several processes only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")

MODULES = """
    task corpus sampling weights initialisation forward model oracles training.engines
    analysis.memories analysis.duals analysis.behaviour analysis.readings analysis.strongest analysis.circuits
    analysis.layer_norms analysis.recall analysis.series analysis.ledger analysis.nulls analysis.ledger_tables
    analysis.birth_order analysis.terms
"""
install_import_hook([f"birthlens.{name}" for name in MODULES.split()], "beartype.beartype")

# A landing is judged by the same examples each time; new ones are looked for where somebody can look at what they found.
settings.register_profile("birthlens", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("birthlens")
