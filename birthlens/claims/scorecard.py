"""From measurements over seeds to verdicts: the scorecard, one row an expectation, and its files.

scorecard.csv    the table
scorecard.json   the table with what made it: versions, tier, command, every measured number of every seed
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birthlens.claims.claim import Claim, Verdict, interval, joint
from birthlens.disk import write_atomically
from birthlens.run_files import versions

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["claim", "verdict", "quantity", "says", "wanted", "holds", "value", "low", "high", "seeds", "note", "runs",
           "seconds", "cpu_seconds"]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a statistic found for one seed, or why it found nothing, and what that cost."""

    seed: int
    values: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """A claim at a tier with its measurements; the cost is that of all its runs (shared ones too) and statistics."""

    claim: Claim
    tier: str
    measured: Sequence[Measured] = ()
    runs: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        """Say what could not be measured."""
        return [f"seed {one.seed}: {one.problem}" for one in self.measured if one.problem]

    @property
    def verdict(self) -> Verdict:
        """Judge the claim."""
        if self.claim.reason(self.tier):
            return "not checked"
        return joint([row["holds"] for row in self.rows()])

    def rows(self) -> list[dict[str, Any]]:
        """Judge each expectation: its columns of the table."""
        out = []
        for expectation in self.claim.expectations if not self.claim.reason(self.tier) else ():
            values = [float(one.values.get(expectation.quantity, math.nan)) for one in self.measured]
            known = [value for value in values if math.isfinite(value)]
            mean, low, high = interval(known)
            # A seed that gave no number keeps the verdict open, whatever the others say.
            holds = expectation.verdict(low, high) if len(known) == len(values) else "inconclusive"
            row = {"quantity": expectation.quantity, "says": expectation.says, "wanted": expectation.wanted}
            out.append({**row, "holds": holds, "value": mean, "low": low, "high": high, "seeds": len(known)})
        return out

    def note(self) -> str:
        """Say why nothing was checked, or what went wrong."""
        return self.claim.reason(self.tier) or "; ".join(self.problems)


def scorecard_table(results: Sequence[Result]) -> pd.DataFrame:
    """Tabulate results, one row an expectation.

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


def report(results: Sequence[Result], command: str, totals: Mapping[str, float]) -> dict[str, Any]:
    """Return everything as plain data: what made it, and each claim with all numbers of all seeds."""
    return {
        "versions": versions(),
        "command": command,
        "totals": dict(totals),
        "claims": [
            {
                "id": result.claim.id,
                "sentence": result.claim.sentence,
                "verdict": result.verdict,
                "note": result.note(),
                "tier": result.tier,
                "cases": {case: list(words) for case, words in result.claim.cases.items()},
                "settings": result.claim.settings_at(result.tier),
                "expectations": [plain(row) for row in result.rows()],
                "measured": [{"seed": one.seed, "values": plain(one.values)} for one in result.measured],
                "runs": result.runs,
                "seconds": round(result.seconds, 1),
                "cpu_seconds": round(result.cpu_seconds, 1),
            }
            for result in results
        ],
    }


def write_scorecard(results: Sequence[Result], folder: Path, command: str, totals: Mapping[str, float]) -> None:
    """Write scorecard.csv and scorecard.json, whole or not at all."""
    table = scorecard_table(results)
    numbers = ["value", "low", "high"]
    table[numbers] = table[numbers].astype(float).round(4)
    write_atomically(folder / "scorecard.csv", table.to_csv(index=False).encode())
    text = json.dumps(report(results, command, totals), indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "scorecard.json", text.encode())


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make numbers fit for JSON: rounded, and null where they are none."""
    return {
        name: (round(value, 6) if math.isfinite(value) else None) if isinstance(value, float) else value
        for name, value in values.items()
    }
