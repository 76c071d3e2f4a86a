"""Frozen, validated descriptions of a run: corpus, task, model, training, checkpoints, seeds.

A config rejects unknown keys, round-trips through YAML and JSON, and holds no device, logger or open file.
Every error is one sentence that names the field, its value and what would be valid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from birthlens.config import clamp_text, clamps
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

    `embedded` is the Shakespeare text that is included in birthlens; `text` reads the UTF-8 file at `path`; `counts` reads a
    table of bigram counts at `path`; `markov` draws a random chain.
    """

    section: ClassVar[str] = "corpus"
    source: Literal["embedded", "text", "counts", "markov"] = "embedded"
    """Where the bigrams come from: the embedded text, a text file, a table of counts, or a random Markov chain."""
    path: str | None = None
    """The file of a text or of a table of counts."""
    vocabulary: Annotated[int, Meta(ge=2, le=2**14)] = 64
    """Number of tokens of the Markov chain."""
    zipf_exponent: Rate = 1.0
    """Exponent of the Zipf distribution of the chain's unigrams."""
    concentration: Annotated[float, Meta(gt=0, le=1e15)] = 0.3
    """Concentration of the chain's Dirichlet rows, per token; with large values the rows are close to the unigrams."""
    seed: Count = 0
    """Seed of the Markov chain."""

    def _check(self) -> None:
        if self.source in ("text", "counts") and not self.path:
            raise BirthlensError(f"corpus.path = {self.path!r}: source {self.source!r} needs the path of a file.")


class OptimiserConfig(Section):
    """SGD with momentum, or AdamW.

    The learning rate grows linearly over the first `warm_up` steps, and with `decay` falls from there to zero at the end.
    """

    section: ClassVar[str] = "optimiser"
    kind: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: Rate = 0.2
    """The learning rate."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    weight_decay: Rate = 1e-4
    """Weight decay; in SGD it is added to the gradient, in AdamW it is decoupled."""
    betas: tuple[Share, Share] = (0.9, 0.99)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    warm_up: Count = 0
    """Steps over which the learning rate grows linearly to its value."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to zero after the warm-up: not at all, linearly, or as a half cosine."""

    added: ClassVar[frozenset[str]] = frozenset({"warm_up", "decay"})


class TrainingConfig(Section):
    """The length of training, its loss, and which matrices are trained from when on."""

    section: ClassVar[str] = "training"
    steps: Count = 300
    """Number of updates."""
    batch_size: Positive = 512
    """Sequences per update, drawn afresh for each update."""
    loss: str = "in_context"
    """Positions that count in the loss: in_context, all, or another role of the task."""
    trained: tuple[str, ...] | None = None
    """Names of the trained matrices; null trains the paper's choice for the model."""
    freeze_until: Steps = {}
    """For each matrix named here, the step from which it is trained."""
    engine: Literal["auto", "fused", "handwritten", "functional", "reference"] = "auto"
    """How gradients are computed; auto takes the fastest valid engine, reference is TransformerLens with autograd."""
    clamps: tuple[clamps.AnyClamp, ...] = ()
    """Interventions during training, each over a span of steps: mappings or texts such as 'freeze L0.W_K until=50'."""

    added: ClassVar[frozenset[str]] = frozenset({"clamps"})

    def __init__(self, **values: Any) -> None:
        if "clamps" in values:
            values["clamps"] = clamp_text.parsed(values["clamps"])
        super().__init__(**values)


class CheckpointConfig(Section):
    """Which steps are kept on disk.

    With `sensitivity` above 0, checkpoints are denser where the model changes fast.
    """

    section: ClassVar[str] = "checkpoints"
    schedule: Literal["linear", "log", "explicit"] = "linear"
    """Which steps are kept: evenly spaced (linear), a number per factor of ten (log), or only those of steps (explicit)."""
    every: Positive = 10
    """Distance between kept steps in the linear schedule."""
    per_decade: Positive = 20
    """Kept steps per factor of ten in the log schedule."""
    steps: tuple[Count, ...] = ()
    """Further steps to keep; the first and the last step are always kept."""
    sensitivity: Rate = 0.0
    """A step is also kept when the held-out loss has changed by this share since the last kept step; 0 turns this off."""


class EvaluationConfig(Section):
    """The held-out batch, and how often the model is evaluated on it."""

    section: ClassVar[str] = "evaluation"
    batch_size: Positive = 128
    """Sequences in the held-out batch."""
    every: Positive = 10
    """Distance between evaluated steps; kept steps are always evaluated."""


class SeedConfig(Section):
    """Separate seeds for the initial weights, the training batches and the held-out batch."""

    section: ClassVar[str] = "seeds"
    init: Count = 0
    """Seed of the initial weights."""
    data: Count = 0
    """Seed of the training batches."""
    evaluation: Count = 1_000_003
    """Seed of the held-out batch."""


class RunConfig(Section):
    """All settings of a run.

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
        self.model.check_named("training.trained", self.training.trained or ())
        self.model.check_named("training.freeze_until", self.training.freeze_until)
        self.model.check_named("model.zeroed", self.model.zeroed)
        valid = dict.fromkeys(parameter_names(self.model))
        trained = dict.fromkeys(self.trained)
        for name in self.training.trained or ():
            if name not in valid:
                raise BirthlensError(
                    f"training.trained = {name!r}: no such matrix in the model; valid: {shortened(', '.join(valid), 300)}."
                )
        for name in self.model.zeroed:
            if name not in valid:
                raise BirthlensError(
                    f"model.zeroed = {name!r}: the model has no such matrix; valid are {shortened(', '.join(valid), 300)}."
                )
        for name, step in self.training.freeze_until.items():
            if name not in trained:
                raise BirthlensError(
                    f"training.freeze_until = {name!r} (until step {step}): this is not a trained matrix; "
                    f"valid: {shortened(', '.join(trained), 300)}."
                )
        self._check_clamps()
        if beyond := [step for step in self.checkpoints.steps if step > self.training.steps]:
            raise BirthlensError(
                f"checkpoints.steps = {beyond[0]}: training ends at step training.steps = {self.training.steps}; "
                "name steps up to that."
            )

    def _check_clamps(self) -> None:
        clamps.check_spans(self.training.clamps, self.training.steps)
        for clamp in self.training.clamps:
            matrix = getattr(clamp, "matrix", None)
            self.model.check_named("training.clamps", [matrix])
            if matrix is not None and matrix not in self.trained:
                raise BirthlensError(
                    f"clamp '{clamp}': {matrix} is not a trained matrix; valid are {', '.join(self.trained)}."
                )
            if isinstance(clamp, clamps.Set):
                self.with_setting(clamp)

    def with_setting(self, clamp: clamps.Set) -> RunConfig:
        """Return the config with the value that a clamp sets, and without clamps.

        Raises:
            BirthlensError: for a setting that cannot change during training, or a value that does not fit it.
        """
        if not clamps.can_be_set(clamp.key):
            raise BirthlensError(f"clamp '{clamp}': {clamp.key} cannot change during training; {clamps.SETTABLE}.")
        tree = self.to_data()
        tree["training"].pop("clamps", None)
        section, _, key = clamp.key.partition(".")
        tree[section] = {**tree[section], key: clamp.value}
        try:
            return RunConfig.parse(tree)
        except BirthlensError as error:
            raise BirthlensError(f"clamp '{clamp}': {error}") from None

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the trained matrices, in the order of the forward pass."""
        chosen = self.training.trained
        if chosen is None:
            return trained_by_default(self.model)
        wanted = set(chosen)
        return tuple(name for name in parameter_names(self.model) if name in wanted)

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the matrices that training moves: the trained ones, and a tied W_U with its W_E."""
        follows = self.model.tied and "W_E" in self.trained
        return (*self.trained, "W_U") if follows else self.trained

    @classmethod
    def parse(cls, data: dict[Any, Any] | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
        """Build a config from nested plain data and `section.key=value` overrides, whose values are read as YAML."""
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
        """Write the whole config as YAML."""
        import yaml

        return str(yaml.safe_dump(self.to_data(), sort_keys=False))


def _sections(data: Any) -> dict[str, dict[str, Any]]:
    """Copy nested plain data as sections; an empty section keeps its defaults."""
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
    """Drop the remains of an overridden `task.kind`: keys of the earlier kind, at their defaults, that nobody set."""
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
