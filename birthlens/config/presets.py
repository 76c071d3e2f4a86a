"""Named configs: the demo, a laptop run, the two settings of the paper, and one for each further task."""

from __future__ import annotations

from typing import Any

from birthlens.config.run import RunConfig
from birthlens.errors import BirthlensError

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "task": {"context": 48},
        "model": {"d_model": 256},
        "optimiser": {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0},
        "training": {"steps": 400, "batch_size": 96},
        "checkpoints": {"every": 10},
        "evaluation": {"batch_size": 128, "every": 10},
    },
    "laptop": {
        "task": {"context": 64},
        "model": {"d_model": 128},
        "training": {"steps": 600, "batch_size": 256},
        "checkpoints": {"every": 10},
    },
    "paper": {
        "task": {"context": 256},
        "model": {"d_model": 128},
        "training": {"steps": 300, "batch_size": 512},
        "checkpoints": {"every": 5},
        "evaluation": {"batch_size": 128, "every": 5},
    },
    "paper-full": {
        "task": {"context": 256},
        "model": {"family": "full", "d_model": 128, "n_heads": 4, "feed_forward": "relu"},
        "optimiser": {"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4},
        "training": {"steps": 600, "batch_size": 64, "loss": "all"},
        "checkpoints": {"every": 20},
        "evaluation": {"batch_size": 64, "every": 20},
    },
    "noise": {
        "task": {"kind": "noise", "context": 64},
        "model": {"d_model": 128, "feed_forward": "linear", "zeroed": ["L1.W_F"]},
        "optimiser": {"kind": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4},
        "training": {"steps": 500, "batch_size": 64, "loss": "later_occurrence"},
        "checkpoints": {"every": 25},
        "evaluation": {"batch_size": 128, "every": 25},
    },
    "sinks": {
        "task": {"kind": "backcopy", "context": 64},
        "model": {"family": "full", "d_model": 64, "n_layers": 1, "feed_forward": "relu"},
        "optimiser": {"kind": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-4},
        "training": {"steps": 600, "batch_size": 64, "loss": "all"},
        "checkpoints": {"every": 50},
        "evaluation": {"batch_size": 128, "every": 25},
    },
    "markov": {
        "task": {"kind": "markov", "context": 64},
        "model": {"family": "full", "d_model": 32, "init": "scaled"},
        "optimiser": {"kind": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-4},
        "training": {"steps": 500, "batch_size": 64, "loss": "all"},
        "checkpoints": {"every": 10},
        "evaluation": {"batch_size": 128, "every": 10},
    },
    "facts": {
        "task": {"kind": "facts", "context": 16, "relations": 8},
        "model": {
            "family": "full",
            "d_model": 32,
            "n_layers": 1,
            "n_heads": 4,
            "feed_forward": "relu",
            "block": "sequential",
        },
        "optimiser": {"kind": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0},
        "training": {"steps": 600, "batch_size": 256, "loss": "fact"},
        "checkpoints": {"every": 25},
        "evaluation": {"batch_size": 256, "every": 25},
    },
    "text": {
        "task": {"kind": "text", "context": 64},
        "model": {"family": "full", "d_model": 64, "n_heads": 4, "init": "scaled"},
        "optimiser": {
            "kind": "adamw",
            "learning_rate": 3e-3,
            "weight_decay": 0.01,
            "warm_up": 200,
            "decay": "cosine",
        },
        "training": {"steps": 12_000, "batch_size": 32, "loss": "all"},
        "checkpoints": {"schedule": "log", "per_decade": 16},
        "evaluation": {"batch_size": 256, "every": 100},
    },
}


def preset(name: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Return the named preset, with `section.key=value` overrides.

    Raises:
        BirthlensError: for an unknown name; the message lists the valid ones.

    Example:
        >>> preset("paper").training.batch_size
        512
    """
    if name not in PRESETS:
        raise BirthlensError(f"preset = {name!r} is unknown; valid presets are {', '.join(PRESETS)}.")
    return RunConfig.parse(PRESETS[name], overrides)
