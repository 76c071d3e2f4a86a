"""The named tensors of one checkpoint, or of a stack of them, as numpy arrays, in TransformerLens's orientation.

Vectors are rows and maps act from the right, `x @ W`. The circuits are transposes of the paper's matrices:

    qk(head) = W_Q @ W_K.T   score(query t, key s) = x_t @ qk @ x_s   (paper: x_s^T W_K x_t, read the other way round)
    ov(head) = W_V @ W_O     x_s @ ov is what the head writes when it attends to s   (paper: W_O W_V x_s)

Nothing here imports torch, so reading weights is fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from birthlens.config.model import ModelConfig, parameter_names, parameter_shapes
from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.model.sites import Head
from birthlens.shapes import Float
from birthlens.system import write_atomically

Array = np.ndarray


class Weights(Mapping[str, Array]):
    """All parameters of one model at one step, by the names of `architecture.parameter_shapes`.

    `stacked` joins those of several checkpoints: tensors that training moves then have a leading step axis. With a tied
    unembedding, W_U is always W_E transposed, and need not be given.

    Raises:
        BirthlensError: if a name is missing or unknown for the config, or a tied W_U is not W_E transposed.

    Example:
        >>> from birthlens.model.initialisation import initial_weights
        >>> weights = initial_weights(ModelConfig(d_model=8), d_vocab=5, n_ctx=4, generator=np.random.default_rng(0))
        >>> weights.qk(Head(1, 0)).shape, weights.n_layers
        ((8, 8), 2)
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Array]) -> None:
        names = parameter_names(config)
        if config.tied and "W_E" in tensors:
            tensors = {"W_U": np.asarray(tensors["W_E"]).swapaxes(-1, -2), **tensors}
        missing = [n for n in names if n not in tensors]
        unknown = [n for n in tensors if n not in names]
        if missing or unknown:
            raise BirthlensError(
                f"weights: missing {missing}, unknown {unknown}; the model has exactly {', '.join(names)}."
            )
        self.config = config
        self._tensors = {name: np.asarray(tensors[name]) for name in names}
        if config.tied and not np.array_equal(self["W_U"], self["W_E"].swapaxes(-1, -2), equal_nan=True):
            raise BirthlensError(
                "W_U: this model has a tied unembedding, W_U is W_E transposed; give W_E alone, and W_U follows."
            )

    def __getitem__(self, name: str) -> Array:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{name!r} is no parameter of this model; it has {', '.join(self._tensors)}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.config.n_layers

    @property
    def n_heads(self) -> int:
        """Number of heads in each layer."""
        return self.config.n_heads

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.d_model

    @property
    def moving(self) -> set[str]:
        """Names of the tensors with a step axis, which `stacked` gives to those that differ between checkpoints."""
        shapes = parameter_shapes(self.config, d_vocab=1, n_ctx=1)
        return {name for name, tensor in self.items() if tensor.ndim > len(shapes[name])}

    @property
    def score_scale(self) -> float:
        """The factor of attention scores: 1/sqrt(d_head), or 1 for unscaled models."""
        return float(self.config.d_head**-0.5) if self.config.scaled_scores else 1.0

    @property
    def n_ctx(self) -> int | None:
        """The longest sequence that has positions; None for rotary ones, which have no end."""
        table = self.get("W_pos", self.get("L0.W_R"))
        return None if table is None else int(table.shape[-2])

    @property
    def heads(self) -> list[Head]:
        """Every head, by layer and number."""
        return [Head(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def of_head(self, head: Head, matrix: str) -> Float[Array, "*step row column"]:
        """Return one head's own matrix: "W_Q", "W_K", "W_V" or "W_O"."""
        if head not in self.heads:
            valid = ", ".join(map(str, self.heads))
            raise BirthlensError(f"head = {head} does not exist in this model; valid heads are {valid}.")
        return np.asarray(self[f"L{head.layer}.{matrix}"][..., head.head, :, :])

    def qk(self, head: Head) -> Float[Array, "*step d_model d_model"]:
        """Return the QK circuit W_Q W_K^T of a head: query side left, key side right, unscaled."""
        return np.asarray(self.of_head(head, "W_Q") @ self.of_head(head, "W_K").swapaxes(-1, -2))

    def ov(self, head: Head) -> Float[Array, "*step d_model d_model"]:
        """Return the OV circuit W_V W_O of a head: attended side left, written side right."""
        return np.asarray(self.of_head(head, "W_V") @ self.of_head(head, "W_O"))

    def replaced(self, tensors: Mapping[str, Array]) -> Weights:
        """Return the same weights with some tensors replaced; shapes must agree. A tied W_U follows W_E."""
        for name, tensor in tensors.items():
            if name in self and tensor.shape != self[name].shape:
                raise BirthlensError(f"{name} has shape {tensor.shape}; this model needs {self[name].shape}.")
        kept = dict(self._tensors)
        if self.config.tied and "W_E" in tensors:
            del kept["W_U"]
        return Weights(self.config, {**kept, **tensors})

    def untied(self) -> Weights:
        """Return the same weights as those of a model whose unembedding is a matrix of its own."""
        return Weights(self.config.changed(unembedding="own"), self._tensors) if self.config.tied else self


def stacked(checkpoints: Sequence[Weights]) -> Weights:
    """Return the weights of several checkpoints of one model as one, with a leading step axis for tensors that differ.

    Tensors that are the same in all checkpoints are stored once, without this axis.
    """
    first, *others = checkpoints

    def stack(name: str) -> Array:
        start = first[name]
        rest = [weights[name] for weights in others]
        same = all(tensor is start or np.array_equal(tensor, start) for tensor in rest)
        return start if same else np.stack([start, *rest])

    return Weights(first.config, {name: stack(name) for name in first})


def save_tensors(
    path: Path,
    tensors: Mapping[str, Array],
    metadata: Mapping[str, str] | None = None,
    seal: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """Write tensors to a safetensors file, atomically, and return its bytes; `seal` may add a digest to them."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    data: bytes = save(contiguous, dict(metadata) if metadata else None)
    if seal is not None:
        data = seal(data)
    write_atomically(path, data)
    return data


def load_tensors(path: Path, check: Callable[[bytes], None] | None = None) -> dict[str, Array]:
    """Read a safetensors file; `check` gets its bytes first, and may raise BirthlensError with a reason.

    Raises:
        BirthlensError: if the file is missing, damaged, or fails the check; the message names the file.
    """
    return load_with_metadata(path, check)[0]


def load_with_metadata(
    path: Path, check: Callable[[bytes], None] | None = None
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; errors are those of `load_tensors`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
        if check is not None:
            check(data)
        tensors = dict(sorted(load(data).items()))  # the library gives another order in each process
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, header.get("__metadata__") or {}
    except FileNotFoundError:
        raise BirthlensError(f"{path} is missing; the run is incomplete, or only a part of it was moved.") from None
    except OSError as error:
        raise BirthlensError(f"{path} cannot be read: {error.strerror}.") from None
    except BirthlensError as error:
        raise BirthlensError(f"{path} is damaged ({error}); restore it or train again.") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise BirthlensError(
            f"{path} is damaged or not a safetensors file ({error}); restore it or train again."
        ) from None


def check_tensors(file: Path, tensors: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise BirthlensError, naming the file, if tensors are not exactly those of `shapes`, in finite float32."""
    if missing := [name for name in shapes if name not in tensors]:
        raise BirthlensError(f"{file} lacks {', '.join(missing)}; the run is damaged.")
    if unknown := sorted(name for name in tensors if name not in shapes):
        raise BirthlensError(f"{file} also holds {shown(unknown)}, which does not belong there; the run is damaged.")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise BirthlensError(
                f"{file} has {name} of shape {tensor.shape}, not {shape}; the run is damaged, train again."
            )
        if tensor.dtype != np.float32:
            raise BirthlensError(f"{file} has {name} in {tensor.dtype}, not float32; the run is damaged.")
        if not _is_finite(tensor):
            raise BirthlensError(f"{file} has numbers in {name} that are not finite; the run is damaged.")


def _is_finite(tensor: Array) -> bool:
    flat = tensor.reshape(-1)
    with np.errstate(all="ignore"):
        square = np.dot(
            flat, flat
        )  # a single pass; it overflows for very large numbers, which are then checked one by one
    return bool(np.isfinite(square)) or bool(np.isfinite(flat).all())
