"""Frozen, validated descriptions of a run: corpus, task, model, training, checkpoints, seeds.

A config rejects unknown keys, round-trips through YAML and JSON, and holds no device, logger or open file.
Every error is one sentence that names the field, its value and what would be valid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from birthlens.config.base import Count, Positive, Rate, Section, Steps
from birthlens.config.model import ModelConfig, parameter_names, trained_by_default
from birthlens.config.task import TaskConfig as TaskConfig
from birthlens.config.task import TaskSection, section_of
from birthlens.errors import BirthlensError
from birthlens.labels import shortened, shown
from birthlens.reading import parse_yaml, read_mapping

Share = Annotated[float, Meta(ge=0, lt=1)]


class CorpusConfig(Section):
    """Where the global bigrams come from.

    `embedded` is the Shakespeare text that ships with birthlens; `text` reads the UTF-8 file at `path`; `counts` reads a
    table of bigram counts at `path`; `markov` draws a chain of `vocabulary` tokens with Zipf unigrams of the given
    `zipf_exponent` and Dirichlet rows of the given `concentration` (times the vocabulary size, around the unigrams).
    """

    section: ClassVar[str] = "corpus"
    source: Literal["embedded", "text", "counts", "markov"] = "embedded"
    path: str | None = None
    vocabulary: Annotated[int, Meta(ge=2, le=2**14)] = 64
    zipf_exponent: Rate = 1.0
    concentration: Annotated[float, Meta(gt=0, le=1e15)] = 0.3
    seed: Count = 0

    def _check(self) -> None:
        if self.source in ("text", "counts") and not self.path:
            raise BirthlensError(f"corpus.path = {self.path!r}: source {self.source!r} needs the path of a file.")


class OptimiserConfig(Section):
    """SGD with momentum, or AdamW.

    The learning rate grows linearly over the first `warm_up` steps, and with `decay` falls from there to zero at the end.
    """

    section: ClassVar[str] = "optimiser"
    kind: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Rate = 0.2
    momentum: Share = 0.9
    weight_decay: Rate = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.99)
    warm_up: Count = 0
    decay: Literal["none", "linear", "cosine"] = "none"

    added: ClassVar[frozenset[str]] = frozenset({"warm_up", "decay"})


class TrainingConfig(Section):
    """How long, on what loss, and which matrices move when.

    `loss` is the role of the positions that count: in_context, all, or another role of the task. `trained=None` trains the
    paper's choice for the family; `freeze_until` maps a matrix to the step from which it moves.
    `engine` names the training step: `auto` takes the fastest valid one, `reference` is TransformerLens with autograd.
    """

    section: ClassVar[str] = "training"
    steps: Count = 300
    batch_size: Positive = 512
    loss: str = "in_context"
    trained: tuple[str, ...] | None = None
    freeze_until: Steps = {}
    engine: Literal["auto", "fused", "handwritten", "functional", "reference"] = "auto"


class CheckpointConfig(Section):
    """Which steps are kept: every `every`-th (linear) or `per_decade` a factor of ten (log), and always the ends.

    `steps` are kept besides. With `sensitivity` above 0, a step is also kept as soon as the evaluated loss has moved by
    that share of its value since the last kept step, so that checkpoints are denser where the model changes fast.
    """

    section: ClassVar[str] = "checkpoints"
    schedule: Literal["linear", "log", "explicit"] = "linear"
    every: Positive = 10
    per_decade: Positive = 20
    steps: tuple[Count, ...] = ()
    sensitivity: Rate = 0.0


class EvaluationConfig(Section):
    """The held-out batch: its size, and every how many steps the model is evaluated on it (and at each checkpoint)."""

    section: ClassVar[str] = "evaluation"
    batch_size: Positive = 128
    every: Positive = 10


class SeedConfig(Section):
    """Separate seeds for the initial weights, the training batches and the held-out batch."""

    section: ClassVar[str] = "seeds"
    init: Count = 0
    data: Count = 0
    evaluation: Count = 1_000_003


class RunConfig(Section):
    """Everything that determines a run.

    Example:
        >>> config = RunConfig.parse({"model": {"d_model": 64}}, ["training.steps=40"])
        >>> config.model.d_model, config.training.steps
        (64, 40)
        >>> RunConfig.parse({"task": {"context": 1}})
        Traceback (most recent call last):
        birthlens.errors.BirthlensError: task.context = 1: expected int >= 2.
    """

    corpus: CorpusConfig = CorpusConfig()
    task: TaskSection = TaskConfig()
    model: ModelConfig = ModelConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seeds: SeedConfig = SeedConfig()

    def _check(self) -> None:
        valid = dict.fromkeys(parameter_names(self.model))
        trained = dict.fromkeys(self.trained)
        for name in self.training.trained or ():
            if name not in valid:
                raise BirthlensError(
                    f"training.trained = {name!r} names no matrix of the model; valid: {shortened(', '.join(valid), 300)}."
                )
        for name in self.model.zeroed:
            if name not in valid:
                raise BirthlensError(
                    f"model.zeroed = {name!r} names no matrix of the model; valid: {shortened(', '.join(valid), 300)}."
                )
        for name, step in self.training.freeze_until.items():
            if name not in trained:
                raise BirthlensError(
                    f"training.freeze_until = {name!r} (until step {step}) names no trained matrix; "
                    f"valid: {shortened(', '.join(trained), 300)}."
                )
        if beyond := [step for step in self.checkpoints.steps if step > self.training.steps]:
            raise BirthlensError(
                f"checkpoints.steps = {beyond[0]}: training ends at step training.steps = {self.training.steps}; "
                "name steps up to that."
            )

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the matrices that training moves, in the order of the forward pass."""
        chosen = self.training.trained
        if chosen is None:
            return trained_by_default(self.model)
        wanted = set(chosen)
        return tuple(name for name in parameter_names(self.model) if name in wanted)

    @classmethod
    def parse(cls, data: dict[Any, Any] | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
        """Build a config from nested plain data and `section.key=value` overrides (values in YAML spelling)."""
        tree: dict[str, Any] = _sections({} if data is None else data)
        before = dict(tree.get("task", {}))
        for override in overrides:
            section, key, value = _split_override(override)
            tree.setdefault(section, {})[key] = value
        if "task" in tree:
            tree["task"] = _of_the_kind(before, tree["task"])
        return cls(**tree)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
        """Read a YAML or JSON file."""
        return cls.parse(read_mapping(path, "config"), overrides)

    def save(self, path: str | Path) -> None:
        """Write the config as YAML, or as JSON where the name ends in .json."""
        from birthlens.system import write_atomically

        path = Path(path)
        text = json.dumps(self.to_data(), indent=2) if path.suffix == ".json" else self.to_yaml()
        write_atomically(path, text.encode())

    def to_yaml(self) -> str:
        """Spell the whole config as YAML."""
        import yaml

        return str(yaml.safe_dump(self.to_data(), sort_keys=False))


def _sections(data: Any) -> dict[str, dict[str, Any]]:
    """Copy nested plain data as sections; one with nothing in it keeps its defaults."""
    if not isinstance(data, dict):
        raise BirthlensError(f"config = {shown(data)}: it must map sections to keys.")
    tree: dict[str, dict[str, Any]] = {}
    for section, keys in data.items():
        if not isinstance(keys, dict | Section | None):
            raise BirthlensError(f"{section} = {shown(keys)}: it must be a section with keys of its own.")
        tree[section] = keys.to_data() if isinstance(keys, Section) else dict(keys or {})
        if wrong := [name for name in (section, *tree[section]) if not isinstance(name, str)]:
            raise BirthlensError(f"{section} has the key {wrong[0]!r}; sections and keys are names.")
    return tree


def _of_the_kind(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Drop what an override of `task.kind` leaves behind: keys of the kind before, at their defaults, that nobody set."""
    then = before.get("kind", TaskConfig.kind)
    if after.get("kind", then) == then:
        return after
    defaults = section_of(then)().to_data()
    kept = section_of(after["kind"]).kinds
    untouched = {key for key, value in before.items() if key in defaults and value == defaults[key]}
    return {key: value for key, value in after.items() if key in kept or key == "kind" or key not in untouched}


def _split_override(override: object) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise BirthlensError(
            f"override = {shown(override)}: write it as section.key=value, for instance training.steps=100."
        )
    return section, key, parse_yaml(text, f"{shortened(name, 80)} = {shown(text, 80)}")
