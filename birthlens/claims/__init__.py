"""The paper's claims, declared as data and checked by machine: a config, a statistic, a tolerance, and seeds.

    claim                          what a claim is, and when it passes, fails or stays open
    catalogue, tiers               the claims, and the scales they are checked at
    orders, behaviours, copying, theory    their statistics: small functions from runs to named numbers; timing
    reproduction, book, scorecard  train what is missing, measure, judge, keep; identity
    grids                          a statistic over a grid of runs, for experiments

A new claim is one entry of the catalogue; `birthlens reproduce` does the rest.
"""

from __future__ import annotations

from birthlens.claims.claim import Claim as Claim
from birthlens.claims.claim import Evidence as Evidence
from birthlens.claims.claim import Expectation as Expectation
