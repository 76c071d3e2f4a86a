"""Which assumption makes three gradient steps work? The theorem's setting, each assumption dropped alone, and all dropped.

python analyses/which_assumption_makes_three_steps_work.py --tier laptop        # 12 minutes on one core
"""

from __future__ import annotations

import pandas as pd
from asking import joined, options, tell

from birthlens.analysis.theory.three_steps import Recipe, ablations, assumptions_table
from birthlens.config.run import CorpusConfig
from birthlens.tasks.corpus import statistics_of

SCALES = {"laptop": (4096, 256, 64, 5), "paper": (8192, 512, 128, 5)}


def main() -> None:
    """Take the steps for every case and seed; save the recalls after the third step."""
    arguments = options(__file__, __doc__)
    sequences, d_model, context, seeds = SCALES[arguments.tier]
    cases = ablations(statistics_of(CorpusConfig()), d_model, context, Recipe(sequences=sequences))
    jobs = [({name: case}, [seed]) for name, case in cases.items() for seed in range(arguments.seeds or seeds)]
    table = joined(assumptions_table, jobs, arguments.processes)
    last = table[table["step"] == 3].rename(columns={"metric": "quantity"})
    tell(arguments, pd.DataFrame(last[["case", "seed", "quantity", "value"]]))


if __name__ == "__main__":
    main()
