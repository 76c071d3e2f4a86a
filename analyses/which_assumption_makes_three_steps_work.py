"""Which assumption makes three gradient steps work? The theorem's setting, each assumption dropped alone, and all dropped.

python analyses/which_assumption_makes_three_steps_work.py --tier laptop
"""

from __future__ import annotations

import pandas as pd
from asking import options, tell

from birthlens.analysis.three_steps import Recipe, ablation_table, ablations
from birthlens.config import CorpusConfig
from birthlens.corpus import statistics_of

SCALES = {"laptop": (1024, 256, 64, 3), "paper": (8192, 512, 128, 5)}


def main() -> None:
    """Take the steps in every case and seed; keep what is recalled after the third."""
    arguments = options(__file__, __doc__)
    sequences, d_model, context, seeds = SCALES[arguments.tier]
    cases = ablations(statistics_of(CorpusConfig()), d_model, context, Recipe(sequences=sequences))
    table = ablation_table(cases, range(arguments.seeds or seeds))
    last = table[table["step"] == 3].rename(columns={"metric": "quantity"})
    tell(arguments, pd.DataFrame(last[["case", "seed", "quantity", "value"]]))


if __name__ == "__main__":
    main()
