"""What a claim's numbers depend on, to make sure that only measurements of the same things are reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from birthlens.claims.claim import Claim
from birthlens.claims.tiers import Tier
from birthlens.config.run import CorpusConfig, RunConfig
from birthlens.runs.files import versions
from birthlens.runs.provenance import TRAINING, code_digest, corpus_digest
from birthlens.tasks.corpus import statistics_of
from birthlens.training.grid import Grid
from birthlens.training.sweep import run_path


def configs_of(claim: Claim, tier: Tier, seeds: Sequence[int]) -> dict[tuple[str, int], RunConfig]:
    """Return the config of every case and seed of a claim at a tier."""
    return Grid(tier.config, claim.cases_at(tier.name), seeds).configs()


def made_of(claim: Claim, tier: Tier) -> dict[str, Any]:
    """Return everything that a claim's measurements depend on, except seeds: code, packages, corpora, settings, configs."""
    configs = {case: config for (case, _), config in configs_of(claim, tier, (0,)).items()}
    corpora = {config.corpus for config in configs.values()} or {CorpusConfig()}
    statistic = claim.statistic
    found = {
        "claim": claim.id,
        "statistic": getattr(statistic, "__qualname__", ""),
        "code": code_digest(statistic.__module__) if statistic else "",
        "training": code_digest(TRAINING) if configs else "",
        "versions": versions(),
        "corpus": sorted(corpus_digest(statistics_of(corpus)) for corpus in corpora),
        "settings": claim.settings_at(tier.name),
        "runs": {case: run_path(config, Path()).name for case, config in configs.items()},
    }
    return dict(json.loads(json.dumps(found)))  # tuples become lists, as in the file


def digest(identity: Mapping[str, Any]) -> str:
    """Return the digest of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which parts of an identity differ from another."""
    parts = [name for name in now if then.get(name) != now[name]]
    names = {"code": "code", "training": "training code", "versions": "versions of packages", "corpus": "text"}
    return "other " + ", ".join(names.get(part, part) for part in parts)
