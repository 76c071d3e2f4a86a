"""Committed scorecards of the further papers: verdicts follow from every seed's numbers, and no claim is left out."""

import math
from pathlib import Path

import pandas as pd
import pytest

from birthlens.claims.catalogue import claims_named
from birthlens.claims.scorecard import read_results, scorecard_table

RESULTS = Path(__file__).parents[2] / "analyses" / "results"


PAPERS = sorted(path.stem.removeprefix("scorecard_") for path in RESULTS.glob("scorecard_*.json"))


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if paper != "laptop"])
def test_a_committed_scorecard_is_what_its_numbers_say(paper: str, tmp_path: Path) -> None:
    text = (RESULTS / f"scorecard_{paper}.json").read_text(encoding="utf-8")
    (tmp_path / "scorecard.json").write_text(text, encoding="utf-8")
    claims = claims_named((), paper)
    results = read_results(tmp_path, claims)
    committed = pd.read_csv(RESULTS / f"scorecard_{paper}.csv")
    assert set(committed["claim"]) == {claim.id for claim in claims}
    assert {result.claim.id for result in results} == set(committed["claim"])
    for result in results:
        rows = committed[committed["claim"] == result.claim.id].set_index("quantity")
        assert set(rows["verdict"]) == {result.verdict}
        assert len(result.measured) >= 3
        for row in scorecard_table([result]).to_dict("records"):
            said = rows.loc[row["quantity"]]
            assert (said["holds"], said["wanted"]) == (row["holds"], row["wanted"])
            for name in ("value", "low", "high"):
                assert said[name] == pytest.approx(row[name], nan_ok=True) and not math.isinf(row[name])
