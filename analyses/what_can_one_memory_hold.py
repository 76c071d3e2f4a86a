"""What can one memory hold? Outer products learned by gradient descent under Zipf data, and stored at once, by d.

Gradient descent: 100 tokens with p(x) ~ 1/x and random unit codebooks, at several step sizes and widths; margins,
interference, and how often the loss rises. Stored at once: how many of 256 tokens a weighted sum of outer products
recalls as d grows (a second table).

python analyses/what_can_one_memory_hold.py --tier laptop        # 5 s on one core
"""

from __future__ import annotations

import pandas as pd
from asking import options, tell
from matplotlib.figure import Figure

from birthlens.analysis.theory.outer_products import STORAGES, ZipfMemory, capacity_table, memory_training_table
from birthlens.viz.figures.style import COLOURS, DASHES, panels, save, styled

RATES = (1.0, 10.0, 100.0, 1000.0)
TOKENS, SHOWN = 100, (1, 10, 100)
SCALES = {"laptop": (200, (8, 32), 256, 5), "paper": (2000, (8, 16, 32, 64), 1024, 20)}
READ = {"loss": "loss", "error": "error", "recall": "recall", "margin": "mean margin", "least_margin": "least margin",
        "frequent_margin": "margin of the most frequent", "interference": "interference"}  # fmt: skip


def descent(width: int, steps: int, seed: int) -> pd.DataFrame:
    """Run gradient descent at one width: `memory_training_table` with the columns case and seed."""
    table = memory_training_table(ZipfMemory(TOKENS, width, seed=seed), RATES, steps)
    cases = [f"d = {width}, rate {rate:g}" for rate in table["rate"]]
    return table.assign(case=cases, seed=seed)


def read(table: pd.DataFrame) -> pd.DataFrame:
    """Select some steps of the descent, and count how often the loss rose in each half: case, seed, quantity, value."""
    rows = []
    last = int(table["step"].max())
    for (case, seed), group in table.groupby(["case", "seed"], sort=False):
        for step in (*SHOWN, last):
            found = group[group["step"] == step].iloc[0]
            rows += [(case, seed, f"step {step}: {name}", float(found[column])) for column, name in READ.items()]
        late = group["step"] > last // 2
        rows.append((case, seed, "times the loss rose, first half", float(group[~late]["rose"].sum())))
        rows.append((case, seed, "times the loss rose, second half", float(group[late]["rose"].sum())))
    return pd.DataFrame(rows, columns=["case", "seed", "quantity", "value"])


def stored(tokens: int, seeds: range) -> pd.DataFrame:
    """Measure how much weighted sums recall at each width: case (the weights), seed, quantity, value."""
    widths = [2**power for power in range(3, tokens.bit_length() + 1)]
    table = capacity_table(tokens, widths, storages=STORAGES, seeds=seeds).rename(columns={"storage": "case"})
    long = table.melt(["case", "seed", "d_model"], ["error", "recall", "capacity"], "quantity")
    long["quantity"] += [f", d = {width}" for width in long["d_model"]]
    return long[["case", "seed", "quantity", "value"]]


@styled
def picture(table: pd.DataFrame, held: pd.DataFrame, widths: tuple[int, ...]) -> Figure:
    """Draw the loss of one seed and the recall of all during descent, at two widths, and the error by d and storage."""
    narrow, wide = widths[0], widths[-1]
    figure, axes = panels(1, 4, 2.4, 2.4)
    drawn = (
        ("loss", narrow, table[table["seed"] == 0]),
        ("loss", wide, table[table["seed"] == 0]),
        ("recall", wide, table),
    )
    for ax, (name, width, chosen) in zip(axes[0], drawn, strict=False):
        for rate, colour, dashes in zip(RATES, COLOURS, DASHES, strict=False):
            rows = chosen[chosen["case"] == f"d = {width}, rate {rate:g}"].groupby("step")[name].mean()
            ax.plot(rows.index, rows, color=colour, linestyle=dashes, linewidth=1.2, label=f"rate {rate:g}")
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlabel("step")
        ax.set_ylabel(name)
        ax.set_title(f"descent, d = {width}")
        if name == "loss":
            ax.set_yscale("log")
    axes[0][2].legend(loc="upper left")
    errors = held[held["quantity"].str.startswith("error")]
    sizes = [int(quantity.split("= ")[1]) for quantity in errors["quantity"].unique()]
    for storage, colour, dashes in zip(STORAGES, COLOURS, DASHES, strict=False):
        mean = errors[errors["case"] == storage].groupby("quantity", sort=False)["value"].mean()
        axes[0][3].plot(sizes, mean, color=colour, linestyle=dashes, marker="o", markersize=3, label=storage)
    axes[0][3].set_xscale("log", base=2)
    axes[0][3].set_xticks(sizes, map(str, sizes))
    axes[0][3].set_xlabel("d")
    axes[0][3].set_ylabel("error")
    axes[0][3].set_title("stored at once")
    axes[0][3].legend(loc="upper right")
    return figure


def main() -> None:
    """Run the descent, store the sums, write both tables, print and draw them."""
    arguments = options(__file__, __doc__)
    steps, widths, tokens, seeds = SCALES[arguments.tier]
    drawn = range(arguments.seeds or seeds)
    table = pd.concat([descent(width, steps, seed) for width in widths for seed in drawn], ignore_index=True)
    held = stored(tokens, drawn)
    save(picture(table, held, widths), arguments.out.with_suffix(".svg"))
    tell(arguments, read(table), at_once=held)


if __name__ == "__main__":
    main()
