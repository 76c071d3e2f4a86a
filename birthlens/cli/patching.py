"""`birthlens patch` and `edges`: what carries the difference between clean and corrupted sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.options import device_option, refuse_idle
from birthlens.cli.probing import steps_option
from birthlens.cli.prompting import pair_on_prompts
from birthlens.cli.subjects import Subject, load, load_run, names, sample_options
from birthlens.cli.tables import deliver, format_option, out_option

if TYPE_CHECKING:
    from birthlens.analysis.interventions.corruptions import Pair


def draws_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--draws`."""
    return click.option(
        "--draws",
        type=click.IntRange(min=0),
        default=200,
        show_default=True,
        help="Bootstrap resamples of sequences, for the intervals; 0 leaves them out.",
    )(function)


def quantities_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--metrics`, read at the scored positions of a pair."""
    return click.option(
        "--metrics",
        help="Comma-separated: logit_difference, logit, loss, probability, accuracy. "
        "[default: logit_difference, or logit where the corruption has no other answer]",
    )(function)


def pairs_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--prompts`, which replaces the corruption of a task."""
    return click.option(
        "--prompts",
        type=click.Path(),
        help="Sentences or ids of your own with corrupted versions and answers, as YAML or JSON (docs/how_to.md), in place "
        "of --corruption; model directories and series need them.",
    )(function)


def opened_pair(
    subject: str,
    steps: str,
    seed: int,
    prompts: str | None,
    corruption: str | None,
    preferred: str,
    batch_size: int,
    axes: Sequence[str] = (),
) -> tuple[Subject, Pair, dict[str, object]]:
    """Open what is patched: its clean and corrupted sequences, and what the manifest says of them."""
    if prompts is None:
        loaded = load_run(subject, steps, seed)
        name = loaded.corruption(corruption, preferred)
        return loaded, loaded.pair(name, batch_size), {"corruption": name}
    refuse_idle("--prompts says which sequences", "corruption", "batch_size")
    loaded = load(subject, steps, seed)
    read = loaded.prompts(prompts)
    return loaded, pair_on_prompts(read, axes), {"prompts": [vars(prompt) for prompt in read]}


@click.command(
    epilog="Example: birthlens patch runs/demo --corruption other_outputs --sites z,resid_pre --by head,role"
)
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@pairs_option
@click.option(
    "--corruption",
    help="One that the task defines (docs/tasks.md).  [default: other_outputs, or else the task's first]",
)
@click.option("--sites", help="Comma-separated: resid_pre, resid_post, attn_out, mlp_out, z, q, k, v, pattern.")
@click.option("--by", default="layer,head", show_default=True, help="layer (always), head, position, role.")
@click.option("--direction", default="clean_into_corrupted", show_default=True, help="Or corrupted_into_clean.")
@quantities_option
@draws_option
@steps_option("last")
@sample_options(64)
@device_option
@out_option
@format_option
def patch(
    subject: str,
    prompts: str | None,
    corruption: str | None,
    sites: str | None,
    by: str,
    direction: str,
    metrics: str | None,
    draws: int,
    steps: str,
    batch_size: int,
    seed: int,
    device: str,
    out: str | None,
    style: str,
) -> None:
    """Patch activations between clean and corrupted sequences: of a RUN's task, or --prompts of your own.

    One row per step, patch (site, layer, head, position) and metric: value (patched), clean, corrupted, and recovered,
    the share of the clean-corrupted gap that the patched run reaches, with its 95 % bootstrap interval. docs/tables.md
    explains every column. With --out, OUT.manifest.json records what was run on what.
    """
    from birthlens.analysis.interventions.patching import patching_cases, patching_table

    axes = [axis for axis in names("by", by) if axis != "layer"]
    chosen = None if sites is None else names("sites", sites)
    quantities = [] if metrics is None else names("metrics", metrics)
    loaded, pair, asked = opened_pair(subject, steps, seed, prompts, corruption, "other_outputs", batch_size, axes)
    listed = patching_cases(loaded.sizes, pair.clean.tokens.shape[1], chosen, axes)
    loaded.use(device, pair.clean, 2 + len(listed))
    pair = pair.to(loaded.device)
    with loaded.progress() as advance:
        table = patching_table(
            loaded.models(advance), pair, chosen, axes, [direction], quantities, seed=seed, draws=draws
        )
    deliver(table, out, style)
    loaded.note(
        out, "patch", pair, [one.to_json() for _, one in listed],
        **asked, direction=direction, metrics=quantities or [pair.default_metric], draws=draws,
    )  # fmt: skip


@click.command(epilog="Example: birthlens edges runs/demo --attribution --steps every:10 --out edges.csv")
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@pairs_option
@click.option("--edges", "chosen", help="Comma-separated, as L0H0->L1H0.k; every edge by default.")
@click.option(
    "--corruption",
    help="One that the task defines (docs/tasks.md).  [default: triggers_swapped, or else the task's first]",
)
@click.option("--direction", default="clean_into_corrupted", show_default=True, help="Or corrupted_into_clean.")
@click.option("--attribution", is_flag=True, help="Add the linear estimates (plain and integrated) and their errors.")
@click.option(
    "--integration-steps",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Steps of the integrated gradients, with --attribution.",
)
@click.option("--freeze-norms", is_flag=True, help="Hold the LayerNorms' divisors at the base run's values.")
@click.option("--births", is_flag=True, help="Instead of every step, say when each edge becomes causal.")
@quantities_option
@draws_option
@steps_option("last")
@sample_options(64)
@device_option
@out_option
@format_option
def edges(
    subject: str,
    prompts: str | None,
    chosen: str | None,
    corruption: str | None,
    direction: str,
    attribution: bool,
    integration_steps: int,
    freeze_norms: bool,
    births: bool,
    metrics: str | None,
    draws: int,
    steps: str,
    batch_size: int,
    seed: int,
    device: str,
    out: str | None,
    style: str,
) -> None:
    """Patch every edge (embeddings, positions, heads, feed-forwards -> q, k, v, logits) of a model.

    One row per step, edge and metric: value (patched), clean, corrupted, recovered with its 95 % bootstrap interval, and
    with --attribution the linear estimates of recovered and their errors. With --births, one row per edge: born, peak,
    last. docs/tables.md explains every column. With --out, OUT.manifest.json records what was run on what.
    """
    from birthlens.analysis.interventions.edge_tables import births_table, cut_edges, edge_table
    from birthlens.model.components import edges_of

    if not attribution:
        refuse_idle("it acts with --attribution only", "integration_steps")
    named = None if chosen is None else names("edges", chosen)
    quantities = [] if metrics is None else names("metrics", metrics)
    loaded, pair, asked = opened_pair(subject, steps, seed, prompts, corruption, "triggers_swapped", batch_size)
    listed = edges_of(loaded.sizes) if named is None else named
    loaded.use(device, pair.clean, 2 + len(listed))
    pair = pair.to(loaded.device)
    with loaded.progress() as advance:
        table = edge_table(
            loaded.models(advance),
            pair,
            named,
            direction,
            attribution_steps=(0, integration_steps) if attribution else (),
            freeze_norms=freeze_norms,
            quantities=quantities,
            seed=seed,
            draws=draws,
        )
    deliver(births_table(table) if births else table, out, style)
    cases = {str(edge): cut_edges([edge], "patch", freeze_norms)(loaded.sizes) for edge in listed}
    loaded.note(
        out, "edges", pair, {edge: [one.to_json() for one in case] for edge, case in cases.items()},
        **asked, direction=direction, metrics=quantities or [pair.default_metric], draws=draws,
        attribution=[0, integration_steps] if attribution else [], births=births,
    )  # fmt: skip
