"""Committed scorecards of the further papers: verdicts follow from every seed's numbers, and no claim is left out."""

import html
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from birthlens.claims.catalogue import claims_named
from birthlens.claims.scorecard import read_results, scorecard_table

RESULTS = Path(__file__).parents[2] / "analyses" / "results"


PAPERS = sorted(path.stem.removeprefix("scorecard_") for path in RESULTS.glob("scorecard_*.json"))


@pytest.mark.parametrize("paper", PAPERS)
def test_a_committed_scorecard_is_what_its_numbers_say(paper: str, tmp_path: Path) -> None:
    text = (RESULTS / f"scorecard_{paper}.json").read_text(encoding="utf-8")
    (tmp_path / "scorecard.json").write_text(text, encoding="utf-8")
    claims = claims_named((), "birth" if paper == "laptop" else paper)
    results = read_results(tmp_path, claims)
    committed = pd.read_csv(RESULTS / f"scorecard_{paper}.csv")
    assert set(committed["claim"]) == {claim.id for claim in claims}
    assert {result.claim.id for result in results} == {claim.id for claim in claims if not claim.reason("laptop")}
    for result in results:
        rows = committed[committed["claim"] == result.claim.id].set_index("quantity")
        assert set(rows["verdict"]) == {result.verdict}
        assert len(result.measured) >= 3
        for row in scorecard_table([result]).to_dict("records"):
            said = rows.loc[row["quantity"]]
            assert (said["holds"], said["wanted"]) == (row["holds"], row["wanted"])
            for name in ("value", "low", "high"):
                assert said[name] == pytest.approx(row[name], nan_ok=True) and not math.isinf(row[name])


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: Path) -> dict[str, str]:
    """Write scorecards and pages from copies of the committed ones; return their texts by name."""
    folder.mkdir()
    for file in RESULTS.glob("scorecard_*.json"):
        shutil.copy(file, folder)
    words = [*map(str, more), "--results", str(folder), "--docs", str(folder)]
    monkeypatch.setattr(sys, "argv", ["scorecards.py", *words])
    runpy.run_path(str(RESULTS.parent / "scorecards.py"), run_name="__main__")
    return {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}


def test_the_committed_tables_and_pages_are_what_the_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = drawn(tmp_path / "again", monkeypatch)
    for name, text in written.items():
        home = RESULTS.parents[1] / "docs" if name.endswith(".html") else RESULTS
        kept = (home / name).read_text(encoding="utf-8")
        if name.endswith(".html"):  # the style of pages may change without them
            kept, text = (page[page.index("<header") : page.index("</main>")] for page in (kept, text))
        assert kept == text, f"{name}: run python analyses/scorecards.py"
    for paper in PAPERS:
        page = written["scorecard.html" if paper == "laptop" else "scorecard_papers.html"]
        sections = dict(re.findall(r'<section id="([\w-]+)".*?</h2>(.*?)</section>', page, re.DOTALL))
        of = "" if paper == "laptop" else f"-{paper}"
        for claim in claims_named((), "birth" if paper == "laptop" else paper):
            name = ("variants" if claim.variant else "verdicts") + of
            assert html.escape(claim.sentence) in sections[name]


def test_new_results_replace_those_of_the_same_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = json.loads((RESULTS / "scorecard_noise.json").read_text(encoding="utf-8"))
    other |= {"commit": "feedface", "claims": [one for one in other["claims"] if one["id"] == "noise-first"]}
    other["claims"][0] |= {"commit": "feedface", "seconds": 12345.0}
    (tmp_path / "scorecard.json").write_text(json.dumps(other), encoding="utf-8")
    written = drawn(tmp_path / "merged", monkeypatch, tmp_path)
    before = json.loads((RESULTS / "scorecard_noise.json").read_text(encoding="utf-8"))
    after = json.loads(written["scorecard_noise.json"])
    assert after["claims"][0] == {**before["claims"][0], "commit": "feedface", "seconds": 12345.0}
    assert after["claims"][1:] == before["claims"][1:] and after["commit"] == before["commit"] != "feedface"
    assert "measured by feedface" in written["scorecard_papers.html"]
    assert written["scorecard_facts.json"] == (RESULTS / "scorecard_facts.json").read_text(encoding="utf-8")
