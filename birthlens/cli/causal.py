"""`birthlens ablate` and `scores`: what heads do, asked of a run, a model directory or a series of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.options import device_option, refuse_idle
from birthlens.cli.probing import steps_option
from birthlens.cli.prompting import on_prompts
from birthlens.cli.subjects import load, names, sample_options, working_folder
from birthlens.cli.tables import check_counts, deliver, format_option, out_option

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.tasks.batch import TokenBatch


@click.command(
    epilog="Example: birthlens ablate runs/demo --heads all --methods zero,mean --steps every:5 --out ablation.csv"
)
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@click.option("--heads", default="all", show_default=True, help="all, pairs, or addresses: L0H0,L0H1+L1H0.")
@click.option(
    "--methods",
    default="zero,mean,resample",
    show_default=True,
    help="Comma-separated; also mean_position, mean_role, ...",
)
@click.option("--components", is_flag=True, help="Also ablate feed-forwards and the token and position inputs.")
@click.option("--metrics", help="role.quantity, comma-separated; the default covers accuracy, loss and KL by role.")
@click.option(
    "--suite", "suite_file", type=click.Path(), help="A YAML or JSON description instead of the options above."
)
@click.option(
    "--prompts", type=click.Path(), help="Sentences or ids of your own with answers, as YAML or JSON (docs/how_to.md)."
)
@steps_option("last")
@sample_options(256)
@device_option
@out_option
@format_option
def ablate(
    subject: str,
    heads: str,
    methods: str,
    components: bool,
    metrics: str | None,
    suite_file: str | None,
    prompts: str | None,
    steps: str,
    batch_size: int,
    seed: int,
    device: str,
    out: str | None,
    style: str,
) -> None:
    """Ablate heads (and more) of a RUN or of a Hugging Face model directory, at its checkpoints.

    One row per step, case (what is ablated, and by which method; 'none' is the whole model) and metric by role of the
    token: value, change from the whole model, 95 % bootstrap intervals of both, and n, the number of positions.
    docs/tables.md explains every column.

    With --out, results are also written to OUT.suite/ as they come, with a manifest. The same command continues an
    interrupted suite without repeating finished work.
    """
    from birthlens.analysis.interventions.suite import Suite, execute
    from birthlens.reading import read_mapping

    if suite_file is not None:
        refuse_idle("the suite's file says this", "heads", "methods", "components", "metrics", "seed")
        suite = Suite.from_data(read_mapping(suite_file, "suite"))
    else:
        data: dict[str, Any] = {"heads": heads, "methods": names("methods", methods), "components": components}
        data |= {"seed": seed} | ({} if metrics is None else {"metrics": names("metrics", metrics)})
        suite = Suite.from_data(data)
    loaded = load(subject, steps, suite.seed)
    described = loaded.described
    wrong = None
    if prompts is None:
        batch = loaded.batch(batch_size, 0)
        reference: TokenBatch | None = loaded.batch(batch_size, 1)
    else:
        refuse_idle("--prompts says which sequences", "batch_size")
        asked = loaded.prompts(prompts)
        suite, batch, reference, wrong = on_prompts(suite, asked)
        described = {**described, "prompts": [vars(prompt) for prompt in asked]}
    loaded.use(device, batch, 1 + len(suite.cases_for(loaded.sizes)))
    with working_folder(out) as folder, loaded.progress() as advance:
        table = execute(
            suite,
            loaded.models(),
            batch.to(loaded.device),
            None if reference is None else reference.to(loaded.device),
            folder,
            described,
            loaded.statistics,
            progress=advance,
            initial=None if loaded.run is None else loaded.run.weights(loaded.run.steps[0]),
            alternatives=None if wrong is None else wrong.to(loaded.device),
        )
    deliver(check_counts(table, "role"), out, style)


SCORE_KINDS = ("heads", "weights", "attention", "composition", "transfer", "in-context-learning", "sinks")


@click.command(epilog="Example: birthlens scores runs/demo --kind transfer")
@click.argument("subject", metavar="RUN|MODEL_DIR|SERIES", type=click.Path())
@click.option("--kind", type=click.Choice(SCORE_KINDS), default="heads", show_default=True, help="Which scores.")
@steps_option("last")
@sample_options(64)
@device_option
@out_option
@format_option
def scores(
    subject: str, kind: str, steps: str, batch_size: int, seed: int, device: str, out: str | None, style: str
) -> None:
    """Score every head of a RUN or of a model directory, with the chance level of each score.

    heads: previous-token, duplicate-token and induction scores from patterns; weights: the same and copying from
    weights; attention: the paper's probes; composition: Q, K, V; transfer: repeated random sequences, trigger and other
    tokens apart; sinks: attention to the first token, and the norms that go with it. docs/tables.md explains every
    column.
    """
    import numpy as np

    from birthlens.analysis.behaviour.attention import attention_table
    from birthlens.analysis.behaviour.head_scores import in_context_learning_table, scores_table, transfer_table
    from birthlens.analysis.behaviour.head_weights import composition_table, weight_scores_table
    from birthlens.analysis.behaviour.sinks import sink_table

    if kind in ("weights", "composition"):
        refuse_idle(f"--kind {kind} reads weights and no sequences", "batch_size", "device")
    if kind == "weights":
        refuse_idle("--kind weights draws nothing", "seed")
    loaded = load(subject, steps, seed)
    generator = np.random.default_rng([seed, 7])
    batch = loaded.batch(batch_size, 0)
    loaded.use(device, batch)
    batch = batch.to(loaded.device)
    with loaded.progress() as advance:
        models = loaded.models(advance)
        calls: dict[str, Callable[[], pd.DataFrame]] = {
            "heads": lambda: scores_table(models, batch),
            "weights": lambda: weight_scores_table(models),
            "attention": lambda: attention_table(models, batch),
            "composition": lambda: composition_table(models, generator),
            "transfer": lambda: transfer_table(
                models, generator, batch_size, triggers=loaded.triggers, device=loaded.device
            ),
            "in-context-learning": lambda: in_context_learning_table(models, batch),
            "sinks": lambda: sink_table(models, batch),
        }
        table = calls[kind]()
    counted = {"heads": "score", "weights": "score", "attention": "probe", "transfer": "score"}.get(kind)
    deliver(table if counted is None else check_counts(table, counted), out, style)
