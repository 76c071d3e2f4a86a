"""The compiled loop of `sampling.chain`; imported only where numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def chain(start, flat, guide, overrides, uniform, tokens, occurrence):
    """Fill `tokens` and `occurrence`, one sequence after the other; return False if a number is out of range.

    Compiled code does not check indices, so what comes in from arrays is checked before it becomes one.
    """
    batch, length = tokens.shape
    n = overrides.shape[1]
    buckets = guide.shape[1]
    seen = np.empty(n, dtype=np.int64)
    for b in range(batch):
        seen[:] = 0
        for t in range(length):
            if t < start.shape[1]:
                token = start[b, t]
                if token < 0 or token >= n:
                    return False
            else:
                last = tokens[b, t - 1]
                token = overrides[b, last]
                if token >= n:
                    return False
                if token < 0:
                    u = uniform[b, t]
                    if not 0 <= u < 1:
                        return False
                    token = guide[last, int(u * buckets)]
                    target = last + u
                    while token < n - 1 and flat[last * n + token] <= target:
                        token += 1
            tokens[b, t] = token
            if t >= start.shape[1] - 1 and overrides[b, token] >= 0:
                seen[token] += 1
                occurrence[b, t] = seen[token]
            else:
                occurrence[b, t] = 0
    return True
