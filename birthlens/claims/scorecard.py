"""From measurements over seeds to verdicts: the scorecard, with one row for each expectation, and its files.

scorecard.csv    the table
scorecard.json   the table with its provenance: versions, tier, command, every measured number of every seed

Numbers are saved unrounded; they are rounded for display only. Claims not checked so far are listed as "not yet run".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthlens.claims.claim import BOUND, Claim, Verdict, interval, joint
from birthlens.errors import BirthlensError
from birthlens.reading import parse_json, read_text
from birthlens.runs.files import commit, versions
from birthlens.system import write_atomically

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["claim", "verdict", "quantity", "says", "wanted", "holds", "value", "low", "high", "seeds", "note", "runs",
           "seconds", "cpu_seconds"]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """The numbers of a statistic for one seed, or why there are none; its cost, and why it was measured again."""

    seed: int
    values: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    again: str = ""


@dataclass(frozen=True)
class Result:
    """A claim at a tier with its measurements; the cost includes all its runs (shared ones too) and statistics.

    `made_of` is the digest of what the numbers depend on, `commit` that of the code that judged them, if known; `pending` is
    the reason why there are none yet.
    """

    claim: Claim
    tier: str
    measured: Sequence[Measured] = ()
    runs: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    made_of: str = ""
    pending: str = ""
    commit: str | None = None

    @property
    def problems(self) -> list[str]:
        """Return what could not be measured."""
        return [f"seed {one.seed}: {one.problem}" for one in self.measured if one.problem]

    @property
    def again(self) -> str:
        """Return why seeds were measured again; empty if none was."""
        return next((one.again for one in self.measured if one.again), "")

    @property
    def verdict(self) -> Verdict:
        """Judge the claim."""
        if self.claim.reason(self.tier):
            return "not checked"
        if self.pending:
            return "not yet run"
        return joint([row["holds"] for row in self.rows()])

    def rows(self) -> list[dict[str, Any]]:
        """Judge each expectation: its columns of the table."""
        out: list[dict[str, Any]] = []
        if self.pending or self.claim.reason(self.tier):
            return out
        for expectation in self.claim.expectations:
            values = [float(one.values.get(expectation.quantity, math.nan)) for one in self.measured]
            known = [value for value in values if math.isfinite(value)]
            mean, low, high = interval(known)
            # A seed without a number makes the verdict inconclusive, whatever the other seeds show.
            holds = expectation.verdict(low, high) if len(known) == len(values) else "inconclusive"
            row = {"quantity": expectation.quantity, "says": expectation.says, "wanted": expectation.wanted}
            out.append({**row, "holds": holds, "value": mean, "low": low, "high": high, "seeds": len(known)})
        return out

    def note(self) -> str:
        """Return why nothing was checked, what failed, and which numbers are missing or bounds, with the seeds."""
        said = self.claim.reason(self.tier) or self.pending
        return said or "; ".join([*self.problems, *self._limits()])

    def _limits(self) -> list[str]:
        out = []
        for name in dict.fromkeys(expectation.quantity for expectation in self.claim.expectations):
            whole = [one for one in self.measured if not one.problem]
            missing = [one.seed for one in whole if not math.isfinite(one.values.get(name, math.nan))]
            bounds = [one.seed for one in whole if one.values.get(name + BOUND)]
            for seeds, what in ((missing, "has no number"), (bounds, "is a bound (a step never came)")):
                if seeds:
                    out.append(f"{name} {what} in seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
        return out


@dataclass(frozen=True)
class Scorecard:
    """All results, in the order of the claims, with the command that produced them, their total cost, code and packages."""

    results: Sequence[Result]
    command: str
    totals: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=commit)


def scorecard_table(results: Sequence[Result]) -> pd.DataFrame:
    """Return the results as a table, with one row for each expectation.

    Columns: claim, verdict (of the claim), quantity, says, wanted (the bound), holds (the verdict on this quantity), value
    (mean over seeds), low, high (its 95 % t interval), seeds, note (why not checked, or what failed), runs, seconds,
    cpu_seconds.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for result in results:
        common = {"claim": result.claim.id, "verdict": result.verdict, "note": result.note(), "runs": result.runs,
                  "seconds": round(result.seconds, 1), "cpu_seconds": round(result.cpu_seconds, 1)}  # fmt: skip
        rows += [{**common, **row} for row in result.rows()] or [common]
    return pd.DataFrame(rows, columns=COLUMNS)


def report(card: Scorecard) -> dict[str, Any]:
    """Return everything as plain data: its provenance, and each claim with all numbers of all seeds."""
    return {
        "versions": dict(card.versions),
        "commit": card.commit,
        "command": card.command,
        "totals": dict(card.totals),
        "claims": [
            {
                "id": result.claim.id,
                "sentence": result.claim.sentence,
                "verdict": result.verdict,
                "note": result.note(),
                "tier": result.tier,
                "cases": {case: list(words) for case, words in result.claim.cases_at(result.tier).items()},
                "settings": result.claim.settings_at(result.tier),
                "expectations": [plain(row) for row in result.rows()],
                "measured": [
                    {"seed": one.seed, "values": plain(one.values), "problem": one.problem,
                     "seconds": one.seconds, "cpu_seconds": one.cpu_seconds}
                    for one in result.measured
                ],
                "runs": result.runs,
                "seconds": result.seconds,
                "cpu_seconds": result.cpu_seconds,
                "made_of": result.made_of,
                "commit": result.commit,
            }
            for result in card.results
        ],
    }  # fmt: skip


def write_scorecard(card: Scorecard, folder: Path, name: str = "scorecard") -> None:
    """Write NAME.csv and NAME.json, each completely or not at all."""
    write_atomically(folder / f"{name}.csv", scorecard_table(card.results).to_csv(index=False).encode())
    text = json.dumps(report(card), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / f"{name}.json", text.encode())


def read_results(folder: Path, claims: Sequence[Claim]) -> list[Result]:
    """Read the results of some claims from an earlier scorecard; empty if there is none, or it is damaged."""
    try:
        return list(read_scorecard(folder / "scorecard.json", claims).results)
    except BirthlensError:
        return []


def read_scorecard(path: Path, claims: Sequence[Claim]) -> Scorecard:
    """Read a scorecard.json; claims that were not measured, and those not in `claims`, are left out.

    Raises:
        BirthlensError: if there is no such file, or it is damaged.
    """
    known = {claim.id: claim for claim in claims}
    found = []
    try:
        card: Any = parse_json(read_text(path, "scorecard"), str(path))
        for one in card["claims"]:
            measured = [
                Measured(m["seed"], numbers(m["values"]), m["problem"], m["seconds"], m["cpu_seconds"])
                for m in one["measured"]
            ]
            if one["id"] in known and one["verdict"] not in ("not checked", "not yet run"):
                cost = (one["runs"], one["seconds"], one["cpu_seconds"])
                made = {"made_of": one["made_of"], "commit": one.get("commit", card["commit"])}
                found.append(Result(known[one["id"]], one["tier"], measured, *cost, **made))
        return Scorecard(found, card["command"], card["totals"], card["versions"], card["commit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BirthlensError(f"{path} is not a scorecard ({type(error).__name__}: {error}).") from None


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert numbers for JSON: null if they are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """Reverse `plain` for numbers."""
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
