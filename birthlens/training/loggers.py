"""Optional logging of training records to TensorBoard or Weights & Biases, each behind an extra of the same name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from birthlens.errors import BirthlensError
from birthlens.training.loop import StepRecord


def log_to(kind: str, path: Path) -> Callable[[StepRecord], None]:
    """Return a function that logs a record: event files under path/tensorboard, or a W&B run named after the directory.

    Nothing is opened before the first record, because until then the directory may turn out to contain another run.

    Raises:
        BirthlensError: if the extra is not installed; the message says how to install it.
    """
    if kind == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing(kind) from None
        writer: SummaryWriter | None = None

        def to_tensorboard(record: StepRecord) -> None:
            nonlocal writer
            if writer is None:
                writer = SummaryWriter(str(path / "tensorboard"))
            for row in record.metrics:
                writer.add_scalar(f"{row['split']}/{row['metric']}", row["value"], record.step)
            if record.step >= record.trainer.config.training.steps:
                writer.close()

        return to_tensorboard
    try:
        import wandb
    except ImportError:
        raise _missing(kind) from None
    session = None

    def to_wandb(record: StepRecord) -> None:
        nonlocal session
        if session is None:
            config = record.trainer.config.to_data()
            try:
                session = wandb.init(project="birthlens", name=path.name, config=config)
            except Exception as error:  # W&B has errors of many kinds: no key, no network, a server that refuses
                reason = str(error).partition("\n")[0]
                raise BirthlensError(
                    f"log = 'wandb': Weights & Biases refused the run ({reason}); log in with `wandb login`, or set "
                    "WANDB_MODE=offline; training continues with --resume."
                ) from None
        session.log({f"{row['split']}/{row['metric']}": row["value"] for row in record.metrics}, step=record.step)
        if record.step >= record.trainer.config.training.steps:
            session.finish()

    return to_wandb


def _missing(kind: str) -> BirthlensError:
    return BirthlensError(f"log = {kind!r} is not installed; run `pip install 'birthlens[{kind}]'`.")
