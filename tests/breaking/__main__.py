"""Break runs in every way: `PYTHONPATH=tests python -m breaking --count 500`."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from breaking.kills import JOBS, kills
from breaking.runs import cuts, edits, flips, swaps, trained, tried


def main(count: int, seed: int = 0) -> int:
    """Break runs, print what was tried and found, and return the number of cases that must not be."""
    torch.set_num_threads(1)  # a process that has had threads hangs where it is forked
    chance = random.Random(seed)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished = trained(folder / "finished")
        stopped = trained(folder / "stopped", until=7)
        other = trained(folder / "other", "seeds.data=1", "seeds.init=1")
        parts = {
            "bits flipped in a finished run": flips(finished, count - count // 3, chance),
            "bits flipped in an unfinished run": flips(stopped, count // 3, chance),
            "files swapped": swaps(finished, other),
            "edits of run.json and metrics.jsonl": edits(finished),
            "files cut, lengthened or removed": cuts(finished),
            **{
                f"kills during {name}": kills(folder / name, count // share, chance, job)
                for name, (job, share) in JOBS.items()
            },
        }
        for part, cases in parts.items():
            counts, wrong = tried(cases)
            bad += len(wrong)
            listed = ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
            print(f"{part}: {sum(counts.values())} tried; {listed}")
            for case in wrong[:20]:
                print(f"  {case}")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(1 if main(given.count, given.seed) else 0)
