"""The book of a reproduction: new results, earlier results that are still valid, and the files of the scorecard."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from birthlens.claims import catalogue
from birthlens.claims.claim import PAPERS, Claim
from birthlens.claims.identity import digest, made_of
from birthlens.claims.scorecard import Measured, Result, Scorecard, read_results, write_scorecard
from birthlens.claims.tiers import Tier
from birthlens.runs.files import commit
from birthlens.training.sweep import Outcome

Also = Callable[[Scorecard], object]
"""Further work whenever the scorecard's files are written, such as writing a page."""


class Book:
    """Results in the order of the claims, with the cost of every run.

    A requested claim is listed as "not yet run" until it is judged. Results of other claims in the folder's earlier
    scorecard are kept if they were measured at the same tier, with the same code and the same settings. Otherwise such
    a claim is listed as not yet run, with the reason.
    """

    def __init__(
        self, claims: Sequence[Claim], tier: Tier, folder: Path, seeds: int | None = None, also: Also | None = None
    ) -> None:
        self.tier = tier
        self.folder = folder
        self.also = also
        self.seeds = seeds
        self.costs: dict[Path, Outcome] = {}
        self._started = time.perf_counter()
        others = [claim for claim in catalogue.CLAIMS if claim.id not in {asked.id for asked in claims}]
        found = [self._kept(result) for result in read_results(folder, others)]
        found += [Result(claim, tier.name, pending="requested, and not judged yet") for claim in claims]
        order = {claim.id: place for place, claim in enumerate(catalogue.CLAIMS)}
        self._results = {
            result.claim.id: result for result in sorted(found, key=lambda one: order.get(one.claim.id, -1))
        }
        self._write()

    def judge(self, claim: Claim, measured: Sequence[Measured], paths: set[Path]) -> Result:
        """Enter a claim's measurements and the runs that they come from; return the result."""
        spent = [(self.costs[path].seconds, self.costs[path].cpu_seconds) for path in paths]
        spent += [(one.seconds, one.cpu_seconds) for one in measured]
        seconds, cpu_seconds = (sum(column) for column in zip(*spent, strict=True)) if spent else (0.0, 0.0)
        cost = (len(paths), round(seconds, 3), round(cpu_seconds, 3))
        in_order = sorted(measured, key=lambda one: one.seed)
        result = Result(claim, self.tier.name, in_order, *cost, digest(made_of(claim, self.tier)), commit=commit())
        self._results[claim.id] = result
        self._write()
        return result

    def _kept(self, old: Result) -> Result:
        if old.tier != self.tier.name:
            return Result(old.claim, self.tier.name, pending=f"it was checked at tier {old.tier}")
        if old.made_of != digest(made_of(old.claim, self.tier)):
            return Result(old.claim, self.tier.name, pending="it was checked with other code; check it again")
        return old

    def _write(self) -> None:
        results = list(self._results.values())
        cpu = sum(outcome.cpu_seconds for outcome in self.costs.values())
        cpu += sum(one.cpu_seconds for result in results for one in result.measured)
        spent = time.perf_counter() - self._started
        totals = {"runs": len(self.costs), "cpu_seconds": round(cpu, 1), "seconds_this_time": round(spent, 1)}
        command = command_of([result.claim for result in results], self.tier, self.seeds)
        card = Scorecard(results, command, totals)
        write_scorecard(card, self.folder)
        if self.also:
            self.also(card)


def command_of(claims: Sequence[Claim], tier: Tier, seeds: int | None = None) -> str:
    """Return the command that checks these claims.

    Example:
        >>> from birthlens.claims.tiers import TIERS
        >>> command_of(catalogue.CLAIMS, TIERS["laptop"])
        'birthlens reproduce all --paper all --tier laptop'
    """
    ids = [claim.id for claim in claims]
    papers = (*PAPERS, "all")
    whole = next((paper for paper in papers if ids == [c.id for c in catalogue.claims_named((), paper)]), None)
    asked = " ".join(ids) if whole is None else "all" if whole == "birth" else f"all --paper {whole}"
    return f"birthlens reproduce {asked} --tier {tier.name}" + (f" --seeds {seeds}" if seeds else "")
