"""Which claims hold? Put the results of `birthlens reproduce` into the committed scorecards, and write their pages.

Each paper has results/scorecard_NAME.csv and .json (NAME is `laptop` for Birth of a Transformer). A result in FOLDER
replaces that of the same claim; all others stay. The pages are docs/scorecard.html for that paper, and
docs/scorecard_papers.html for the further papers.

birthlens reproduce --paper noise --out runs/reproduce
python analyses/scorecards.py runs/reproduce
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from birthlens.claims.catalogue import CLAIMS, claims_named
from birthlens.claims.claim import PAPERS, Claim
from birthlens.claims.scorecard import Result, Scorecard, read_scorecard, write_scorecard
from birthlens.claims.tiers import TIERS
from birthlens.viz.report.scorecard import write_scorecard_page

HERE = Path(__file__).parent
TIER = TIERS["laptop"].name


def name_of(paper: str) -> str:
    """Return the name of a paper's committed scorecard."""
    return f"scorecard_{'laptop' if paper == 'birth' else paper}"


def committed(paper: str, folder: Path = HERE / "results") -> Scorecard:
    """Read a paper's committed scorecard, with all its claims: also those that were not measured."""
    card = read_scorecard(folder / f"{name_of(paper)}.json", CLAIMS)
    return replace(card, results=_all(claims_named((), paper), {result.claim.id: result for result in card.results}))


def merged(card: Scorecard, other: Scorecard) -> Scorecard:
    """Return a scorecard in which the results of another one replace its own; all of them replace its command too."""
    claims = [result.claim for result in card.results]
    new = {result.claim.id: result for result in other.results}
    old = {result.claim.id: result for result in card.results if not result.pending}
    results = _all(claims, old | new)
    whole = all(result.claim.id in new for result in results if result.rows())
    return replace(other if whole else card, results=results)


def _all(claims: tuple[Claim, ...] | list[Claim], known: dict[str, Result]) -> list[Result]:
    return [known.get(claim.id) or Result(claim, TIER, pending="not measured yet") for claim in claims]


def main() -> None:
    """Merge the results of the given folders, and write files and pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="--out of `birthlens reproduce`")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the scorecards are")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where the pages are")
    arguments = parser.parse_args()
    cards = {paper: committed(paper, arguments.results) for paper in PAPERS}
    for folder in arguments.folders:
        found = read_scorecard(folder / "scorecard.json", CLAIMS)
        for paper, card in cards.items():
            of_paper = [result for result in found.results if result.claim.paper == paper and result.tier == TIER]
            if of_paper:
                cards[paper] = merged(card, replace(found, results=of_paper))
    for paper, card in cards.items():
        write_scorecard(card, arguments.results, name_of(paper))
    write_scorecard_page(arguments.docs / "scorecard.html", cards["birth"])
    others = [card for paper, card in cards.items() if paper != "birth"]
    write_scorecard_page(arguments.docs / "scorecard_papers.html", *others)


if __name__ == "__main__":
    main()
