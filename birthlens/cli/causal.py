"""`birthlens ablate`, `patch`, `edges` and `scores`: causal questions, asked of a run or of a model directory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from birthlens.cli.probing import steps_option
from birthlens.cli.tables import deliver, format_option, out_option
from birthlens.errors import BirthlensError

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.analysis.ablation import Models
    from birthlens.analysis.corruptions import Pair
    from birthlens.corpus import BigramStatistics
    from birthlens.runs import Run
    from birthlens.task import TokenBatch

_FRESH = 2**40 + 1  # index of batches that neither training nor its evaluation ever drew


def sample_options(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add `--batch-size` and `--seed`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        size = click.option(
            "--batch-size", type=click.IntRange(min=1), default=default, show_default=True, help="Sequences."
        )
        seed = click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of data and draws."
        )
        return size(seed(function))

    return decorate


@click.command(
    epilog="Example: birthlens ablate runs/demo --heads all --methods zero,mean --steps every:5 --out ablation.csv"
)
@click.argument("subject", metavar="RUN|MODEL_DIR", type=click.Path())
@click.option("--heads", default="all", show_default=True, help="all, pairs, or addresses: L0H0,L0H1+L1H0.")
@click.option("--methods", default="zero,mean,resample", show_default=True, help="Also mean_position, mean_role, ...")
@click.option("--components", is_flag=True, help="Also feed-forwards and the token and position inputs.")
@click.option("--metrics", help="role.quantity, comma-separated; the default covers accuracy and loss by role.")
@click.option(
    "--suite", "suite_file", type=click.Path(), help="A YAML or JSON description instead of the options above."
)
@steps_option("last")
@sample_options(256)
@out_option
@format_option
def ablate(
    subject: str,
    heads: str,
    methods: str,
    components: bool,
    metrics: str | None,
    suite_file: str | None,
    steps: str,
    batch_size: int,
    seed: int,
    out: str | None,
    style: str,
) -> None:
    """Ablate heads (and more) of a RUN or of a Hugging Face model directory, at its checkpoints.

    With --out, results also go to OUT.suite/ as they come, with a manifest; an interrupted suite is continued by the same
    command, and what is done is not done again.
    """
    from birthlens.analysis.suite import Suite, execute
    from birthlens.config import read_tree

    if suite_file is not None:
        suite = Suite.from_data(read_tree(suite_file))
    else:
        data: dict[str, Any] = {"heads": heads, "methods": _list(methods), "components": components, "seed": seed}
        suite = Suite.from_data(data | ({"metrics": _list(metrics)} if metrics else {}))
    loaded = _load(subject, steps, suite.seed)
    batch, reference = loaded.batch(batch_size, 0), loaded.batch(batch_size, 1)
    with _working_folder(out) as folder, loaded.progress() as advance:
        table = execute(
            suite, loaded.models(), batch, reference, folder, loaded.described, loaded.statistics, progress=advance
        )
    deliver(table, out, style)


@click.command(
    epilog="Example: birthlens patch runs/demo --corruption other_outputs --sites z,resid_pre --by head,role"
)
@click.argument("run", type=click.Path())
@click.option(
    "--corruption", default="other_outputs", show_default=True, help="Or first_replaced, triggers_swapped, shifted."
)
@click.option("--sites", help="Comma-separated: resid_pre, resid_post, attn_out, mlp_out, z, q, k, v, pattern.")
@click.option("--by", default="layer,head", show_default=True, help="layer (always), head, position, role.")
@click.option("--direction", default="clean_into_corrupted", show_default=True, help="Or corrupted_into_clean.")
@steps_option("last")
@sample_options(64)
@out_option
@format_option
def patch(
    run: str,
    corruption: str,
    sites: str | None,
    by: str,
    direction: str,
    steps: str,
    batch_size: int,
    seed: int,
    out: str | None,
    style: str,
) -> None:
    """Patch activations between clean and corrupted sequences of a RUN's task; 'recovered' is the share of the gap."""
    from birthlens.analysis.patching import PATCHED_SITES, patching_table

    loaded = _load_run(run, steps, seed)
    pair = loaded.pair(corruption, batch_size)
    axes = [axis for axis in _list(by) if axis != "layer"]
    chosen = _list(sites) if sites else PATCHED_SITES
    with loaded.progress() as advance:
        table = patching_table(loaded.models(advance), pair, chosen, axes, [direction], seed=seed)
    deliver(table, out, style)


@click.command(epilog="Example: birthlens edges runs/demo --attribution --steps every:10 --out edges.csv")
@click.argument("run", type=click.Path())
@click.option("--edges", "chosen", help="Comma-separated, as L0H0->L1H0.k; every edge by default.")
@click.option(
    "--corruption", default="triggers_swapped", show_default=True, help="Or other_outputs, first_replaced, shifted."
)
@click.option("--direction", default="clean_into_corrupted", show_default=True, help="Or corrupted_into_clean.")
@click.option(
    "--attribution", is_flag=True, help="Add the linear estimates (gradient, 8 integrated steps) and their errors."
)
@click.option("--births", is_flag=True, help="Instead of every step, say when each edge becomes causal.")
@steps_option("last")
@sample_options(64)
@out_option
@format_option
def edges(
    run: str,
    chosen: str | None,
    corruption: str,
    direction: str,
    attribution: bool,
    births: bool,
    steps: str,
    batch_size: int,
    seed: int,
    out: str | None,
    style: str,
) -> None:
    """Patch every edge (embeddings, positions, heads, feed-forwards -> q, k, v, logits) of a RUN's model."""
    from birthlens.analysis.paths import births_table, edge_table

    loaded = _load_run(run, steps, seed)
    pair = loaded.pair(corruption, batch_size)
    with loaded.progress() as advance:
        table = edge_table(
            loaded.models(advance),
            pair,
            _list(chosen) if chosen else None,
            direction,
            attribution_steps=(0, 8) if attribution else (),
            seed=seed,
        )
    deliver(births_table(table) if births else table, out, style)


KINDS = ("heads", "weights", "attention", "composition", "transfer", "in-context-learning")


@click.command(epilog="Example: birthlens scores runs/demo --kind transfer")
@click.argument("subject", metavar="RUN|MODEL_DIR", type=click.Path())
@click.option("--kind", type=click.Choice(KINDS), default="heads", show_default=True, help="Which scores.")
@steps_option("last")
@sample_options(64)
@out_option
@format_option
def scores(subject: str, kind: str, steps: str, batch_size: int, seed: int, out: str | None, style: str) -> None:
    """Score every head of a RUN or of a model directory, each score beside its chance level.

    heads: previous-token, duplicate-token and induction scores from patterns; weights: the same and copying from weights;
    attention: the paper's probes; composition: Q, K, V; transfer: repeated random sequences, trigger and other tokens apart.
    """
    import numpy as np

    from birthlens.analysis.attention import attention_table
    from birthlens.analysis.head_weights import composition_table, weight_scores_table
    from birthlens.analysis.scores import in_context_learning_table, scores_table, transfer_table

    loaded = _load(subject, steps, seed)
    generator = np.random.default_rng([seed, 7])
    with loaded.progress() as advance:
        models = loaded.models(advance)
        calls: dict[str, Callable[[], pd.DataFrame]] = {
            "heads": lambda: scores_table(models, loaded.batch(batch_size, 0)),
            "weights": lambda: weight_scores_table(models),
            "attention": lambda: attention_table(models, loaded.batch(batch_size, 0)),
            "composition": lambda: composition_table(models, generator),
            "transfer": lambda: transfer_table(models, generator, batch_size, triggers=loaded.triggers),
            "in-context-learning": lambda: in_context_learning_table(models, loaded.batch(batch_size, 0)),
        }
        table = calls[kind]()
    deliver(table, out, style)


@dataclass
class _Loaded:
    """A run at some steps, or a model from a directory, as the tables want it."""

    path: str
    seed: int
    steps: list[int]
    run: Run | None
    model: Any = None

    @property
    def described(self) -> dict[str, object]:
        if self.run is None:
            return {"model": str(Path(self.path).resolve())}
        return {"run": str(Path(self.path).resolve()), "config": self.run.config.model_dump(mode="json")}

    @property
    def statistics(self) -> BigramStatistics | None:
        return None if self.run is None else self.run.statistics

    @property
    def triggers(self) -> list[int] | None:
        ids = None if self.run is None else self.run.trigger_ids
        return None if ids is None else ids.tolist()

    def models(self, advance: Callable[[int], None] | None = None) -> Models:
        if self.run is None:
            yield 0, self.model
        else:
            for step, weights in self.run.checkpoints(self.steps):
                yield step, weights
                if advance is not None:
                    advance(step)

    def batch(self, n: int, index: int) -> TokenBatch:
        if self.run is not None:
            return self.run.task.batch(n, self.seed, _FRESH + index)
        import numpy as np

        from birthlens.analysis.batches import repeated_tokens

        length = min(64, (int(self.model.cfg.n_ctx) + 1) // 2)
        return repeated_tokens(n, length, int(self.model.cfg.d_vocab), np.random.default_rng([self.seed, index]))

    def pair(self, corruption: str, n: int) -> Pair:
        import numpy as np

        from birthlens.analysis.corruptions import corrupt

        vocabulary = 0 if self.statistics is None else len(self.statistics)
        return corrupt(corruption, self.batch(n, 0), np.random.default_rng([self.seed, 11]), vocabulary)

    @contextmanager
    def progress(self) -> Iterator[Callable[[int], None]]:
        """Show a bar over steps on a terminal (and nothing elsewhere)."""
        import sys

        with click.progressbar(length=len(self.steps), label="steps", file=sys.stderr) as bar:
            yield lambda step: bar.update(1)


def _load(path: str, steps: str, seed: int) -> _Loaded:
    if (Path(path) / "run.json").exists() or not (Path(path) / "config.json").exists():
        return _load_run(path, steps, seed)
    from birthlens.model import load_pretrained

    if steps not in ("last", "all"):
        raise BirthlensError(f"steps = {steps!r}: a model directory has one state only; leave --steps out.")
    return _Loaded(path, seed, [0], None, load_pretrained(path))


def _load_run(path: str, steps: str, seed: int) -> _Loaded:
    from birthlens.runs import load_run

    run = load_run(path)
    return _Loaded(path, seed, run.select(steps), run)


@contextmanager
def _working_folder(out: str | None) -> Iterator[Path]:
    if out is not None:
        yield Path(f"{out}.suite")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
