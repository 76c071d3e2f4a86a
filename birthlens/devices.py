"""Where a call computes: its device, its precision and its sampler; none of them is part of a run's config.

device     cpu, cuda, cuda:N, mps, or auto: a GPU if there is one and the work is large enough
precision  float32, or bfloat16 for the products of a forward and backward pass (weights and sums stay float32)
sampler    numpy draws batches on the CPU; counter draws them on the device, by another generator
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, replace

from birthlens.errors import BirthlensError
from birthlens.labels import shown

DEVICES = "cpu, cuda, cuda:N, mps or auto"
PRECISIONS = ("float32", "bfloat16")
SAMPLERS = ("numpy", "counter")
WORTH_A_GPU = 50_000_000
"""From this number of trained tokens on, `auto` takes a GPU; below it, starting one costs more than it saves."""
OPERATIONS_WORTH_A_GPU = 10**12
"""The same for analyses, in multiplications and additions: about ten seconds of two CPU cores."""


@dataclass(frozen=True)
class Execution:
    """How a call computes. `device` names an existing one: `chosen` turns the text of an option into it.

    For the workers of a pool it is the text, which `here` turns into a device of theirs.

    Raises:
        BirthlensError: for a precision or a sampler that does not exist.
    """

    device: str = "cpu"
    precision: str = "float32"
    sampler: str = "numpy"

    def __post_init__(self) -> None:
        for field, value, valid in (
            ("precision", self.precision, PRECISIONS),
            ("sampler", self.sampler, SAMPLERS),
        ):
            if value not in valid:
                raise BirthlensError(f"{field} = {shown(value)}: valid are {' and '.join(valid)}.")

    @property
    def on_cpu(self) -> bool:
        """Whether products are computed on the CPU in float32, where every engine works."""
        return self.device == "cpu" and self.precision == "float32"

    @property
    def stacks(self) -> bool:
        """Whether runs of one shape are trained together, since processes cannot train them or are slower."""
        return not self.on_cpu or self.sampler != "numpy"

    @property
    def alone(self) -> Execution:
        """The same on the CPU, for runs that cannot be trained together."""
        return replace(self, device="cpu")

    def here(self, tokens: int | None = None) -> Execution:
        """Return the same on a device of this machine, for so many trained tokens.

        Raises:
            BirthlensError: if this machine does not have the device.
        """
        return replace(self, device=chosen(self.device, tokens)[0])

    def to_data(self) -> dict[str, str]:
        """Return plain data for run.json."""
        return asdict(self)


DEFAULT = Execution()
"""The default: products on the CPU in float32, and batches drawn by numpy."""


def check_text(text: object) -> str:
    """Return a text that names a device, on this machine or another; raise BirthlensError if it does not."""
    if not isinstance(text, str) or not re.fullmatch(r"cpu|cuda(:\d{1,4})?|mps|auto", text):
        raise BirthlensError(f"device = {shown(text)}: valid are {DEVICES}.")
    return text


def chosen(text: object, tokens: int | None = None, operations: int | None = None) -> tuple[str, str]:
    """Return the device that a text names, and why.

    `tokens` is the number of trained tokens, `operations` that of multiplications and additions of an analysis, if known.

    Raises:
        BirthlensError: for a text that names no device, or a device that this machine does not have.

    Example:
        >>> chosen("cpu")
        ('cpu', 'asked for')
    """
    import torch

    text = check_text(text)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        if not gpus:
            return "cpu", "this machine has no GPU that torch can use"
        if tokens is not None and tokens < WORTH_A_GPU:
            return "cpu", f"{tokens:,} trained tokens are too few to be worth a GPU"
        if operations is not None and operations < OPERATIONS_WORTH_A_GPU:
            return "cpu", f"about {operations:.0e} operations are too few to be worth a GPU"
        return "cuda:0", "there is a GPU, and the work is worth it"
    if text.startswith("cuda"):
        number = int(text.partition(":")[2] or 0)
        if number >= gpus:
            has = f"{gpus} CUDA GPU{'s' if gpus > 1 else ''}" if gpus else "no CUDA GPU that torch can use"
            raise BirthlensError(f"device = {text!r}: this machine has {has}; use cpu or auto.")
        return f"cuda:{number}", "asked for"
    if text == "mps" and not torch.backends.mps.is_available():
        raise BirthlensError("device = 'mps': this machine has no Apple GPU that torch can use; use cpu or auto.")
    return text, "asked for"


def free_memory(device: str) -> int:
    """Return the free bytes of a device; on an Apple GPU, those of the machine."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # macOS does not tell
        return 4 << 30
