"""The paper's claims, declared as data and checked automatically: a config, a statistic, a tolerance, and seeds.

    claim                          what a claim is, and when it passes, fails or is inconclusive
    catalogue, tiers               the claims, and the scales at which they are checked
    statistics                     the claims' statistics: small functions from runs to named numbers
    reproduction, book, scorecard  train what is missing, measure, judge, save; identity
    grids                          a statistic over a grid of runs, for experiments

A new claim is one entry in the catalogue; `birthlens reproduce` does the rest.
"""

from __future__ import annotations

from birthlens.claims.claim import Claim as Claim
from birthlens.claims.claim import Evidence as Evidence
from birthlens.claims.claim import Expectation as Expectation
