"""The bigram task's distribution, drawn on any device from a counter-based generator: the sampler named "counter".

    uniform(seed, index, sequence, position) = Philox4x32-10(counter, key) / 2^32

The key is the seed, and the counter contains the batch's index, the sequence and the place of the draw in it. Nothing else
enters, so any part of any batch can be drawn again, on any device, with equal bits. The draws use inverse CDFs of these
uniforms, with the tables of `sampling`. The distribution is exactly that of `BigramTask.sample`; the batches are
different.

Philox: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.task import Task

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def check_countable(task: Task) -> None:
    """Raise BirthlensError if a task has no sampler by counter."""
    if type(task) is not BigramTask:
        raise BirthlensError(f"sampler = 'counter': the task {task.config.kind!r} has none; use sampler numpy.")


def counter_batch(task: Task, n: int, seed: int, index: int = 0, device: str = "cpu") -> TokenBatch:
    """Draw batch number `index` of the stream `seed` on a device; it depends on nothing else.

    Raises:
        BirthlensError: for a task that has no sampler by counter.

    Example:
        >>> from birthlens.config.task import TaskConfig
        >>> from birthlens.tasks.corpus import from_text
        >>> task = BigramTask(TaskConfig(context=16, n_triggers=2), from_text("to be or not to be"))
        >>> few, many = counter_batch(task, 2, seed=0, index=5), counter_batch(task, 4, seed=0, index=5)
        >>> bool((few.tokens == many.tokens[:2]).all())
        True
    """
    return counter_batches(task, n, [seed], [index], device)[0]


def counter_batches(task: Task, n: int, seeds: list[int], indices: list[int], device: str = "cpu") -> list[TokenBatch]:
    """Draw several batches in one program, because separate programs would leave a GPU idle: `counter_batch` of each."""
    whole = counter_program(task, n, seeds, indices, device)
    return [whole[first : first + n] for first in range(0, len(whole), n)]


@torch.no_grad()
def counter_program(task: Task, n: int, seeds: list[int], indices: list[int], device: str = "cpu") -> TokenBatch:
    """Draw several batches of n sequences as one batch: those of seeds[0] and indices[0] come first."""
    check_countable(task)
    assert isinstance(task, BigramTask)
    config = task.config
    k = config.n_triggers
    d_vocab = len(task.statistics)
    length = config.context + 1
    places = length + k + (d_vocab if task.fixed_triggers is None else 0)
    draws = uniforms(n, places, seeds, indices, device).flatten(0, 1)
    triggers = _triggers(task, draws[:, length + k :])
    outputs = _outputs(task, triggers, draws[:, length : length + k])
    listed = k if config.show_latents else 0
    sequence = _chain(task, triggers, outputs, draws[:, :length], listed)
    tokens = sequence[:, :-1]
    occurrence = torch.zeros_like(tokens)
    absorbed = torch.zeros_like(tokens, dtype=torch.bool)
    doomed = _cycling(triggers, outputs)
    for number in range(k):
        here = tokens == triggers[:, number, None]
        here[:, :listed] = False
        occurrence += here * here.cumsum(1)
        absorbed |= here & doomed[:, number, None]
    return TokenBatch(tokens, sequence[:, 1:], triggers, outputs, occurrence, absorbed)


def uniforms(
    n: int, places: int, seeds: list[int], indices: list[int], device: str = "cpu"
) -> Float[Tensor, "batch sequence place"]:
    """Return the uniforms of n sequences of each (seed, index): multiples of 2^-32 in [0, 1), the same on every device."""
    blocks = -(-places // 4)

    def word(values: list[int], shift: int) -> Tensor:
        return torch.tensor([value >> shift & _WORD for value in values], device=device)[:, None, None]

    zero = torch.zeros(len(seeds), n, blocks, dtype=torch.int64, device=device)
    place = torch.arange(blocks, device=device) + zero
    sequence = torch.arange(n, device=device)[:, None] + zero
    counter = (place, sequence, word(indices, 0) + zero, word(indices, 32) + zero)
    words = philox(counter, (word(seeds, 0), word(seeds, 32)))
    return torch.stack(words, dim=-1).flatten(2)[..., :places].double() * 2.0**-32


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 of counters and keys whose words are int64 tensors of values below 2^32."""
    a, b, c, d = counter
    low, high = key
    for _ in range(_ROUNDS):
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ low, low_c, high_a ^ d ^ high, low_a
        low = low + _WEYL[0] & _WORD
        high = high + _WEYL[1] & _WORD
    return a, b, c, d


def _product(a: Int[Tensor, "*axes"], multiplier: int) -> tuple[Int[Tensor, "*axes"], Int[Tensor, "*axes"]]:
    """Return the high and the low word of a 64-bit product, within the range of int64."""
    upper = a * (multiplier >> 16)
    lower = a * (multiplier & 0xFFFF)
    return upper + (lower >> 16) >> 16, (upper << 16) + lower & _WORD


def _triggers(task: BigramTask, draws: Float[Tensor, "sequence d_vocab"]) -> Int[Tensor, "sequence n_triggers"]:
    fixed = task.fixed_triggers
    if fixed is not None:
        return torch.from_numpy(fixed).to(draws.device).expand(len(draws), -1)
    # The K smallest of Exp(1)/p, in order, have the distribution of K draws without replacement.
    p = torch.from_numpy(task.statistics.unigram).to(draws.device)
    clocks = (-torch.log1p(-draws) / p).masked_fill(p == 0, torch.inf)
    return clocks.argsort(dim=1, stable=True)[:, : task.config.n_triggers]


def _outputs(
    task: BigramTask, triggers: Int[Tensor, "sequence n_triggers"], draws: Float[Tensor, "sequence n_triggers"]
) -> Int[Tensor, "sequence n_triggers"]:
    device = draws.device
    n, k = draws.shape
    fixed = task.fixed_triggers
    if fixed is not None:
        laws = torch.from_numpy(task.output_distribution(fixed[None])[0]).to(device)
        return _drawn(laws, torch.arange(k, device=device).expand(n, k), draws)
    laws = torch.from_numpy(task.output_distribution(triggers.cpu().numpy())).to(device)
    return _drawn(laws.flatten(0, 1), torch.arange(n * k, device=device).view(n, k), draws)


def _drawn(
    laws: Float[Tensor, "row d_vocab"], row: Int[Tensor, "*axes"], draws: Float[Tensor, "*axes"]
) -> Int[Tensor, "*axes"]:
    """Draw one token from each given row by inverse CDF."""
    return torch.searchsorted(_flat_cdf(laws), row + draws, right=True) - row * laws.shape[1]


def _flat_cdf(laws: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " entry"]:
    """Return the CDFs of all rows as one sorted array: row number + CDF (as in `sampling.Categorical`, on the CPU)."""
    cdf = laws.cpu().cumsum(-1)
    cdf = cdf / cdf[:, -1:]
    return (cdf + torch.arange(len(laws))[:, None]).flatten().to(laws.device)


def _chain(
    task: BigramTask,
    triggers: Int[Tensor, "sequence n_triggers"],
    outputs: Int[Tensor, "sequence n_triggers"],
    draws: Float[Tensor, "sequence length"],
    listed: int,
) -> Int[Tensor, "sequence length"]:
    n, length = draws.shape
    device = draws.device
    statistics = task.statistics
    d_vocab = len(statistics)
    forced = torch.full((n, d_vocab), -1, dtype=torch.int64, device=device).scatter(1, triggers, outputs)
    rows = _flat_cdf(torch.from_numpy(statistics.bigram)).to(device)
    first = _flat_cdf(torch.from_numpy(statistics.unigram[None])).to(device)
    sequence = torch.empty(length, n, dtype=torch.int64, device=device)
    sequence[:listed] = triggers[:, :listed].T
    last = torch.searchsorted(first, draws[:, listed].contiguous(), right=True)
    sequence[listed] = last
    for t in range(listed + 1, length):
        override = forced.gather(1, last[:, None])[:, 0]
        free = torch.searchsorted(rows, last + draws[:, t], right=True) - last * d_vocab
        last = torch.where(override >= 0, override, free)
        sequence[t] = last
    return sequence.T.contiguous()


def _cycling(
    triggers: Int[Tensor, "sequence n_triggers"], outputs: Int[Tensor, "sequence n_triggers"]
) -> Bool[Tensor, "sequence n_triggers"]:
    """Return, for each trigger, whether following outputs from it meets triggers indefinitely (`bigram.cycling`)."""
    match = outputs[:, :, None] == triggers[:, None, :]
    alive = match.any(-1)
    if match.shape[-1]:
        onward = match.byte().argmax(-1)
        for _ in range(triggers.shape[1] - 1):
            alive = alive & alive.gather(1, onward)
    return alive
