"""Rows that are orthonormal without an error in every storage type, and what is exact with them.

Rounding of 16-bit rows would hide errors of the arithmetic, which is that of float32.
"""

from __future__ import annotations

import numpy as np

EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-23, "float16": 2.0**-23}


def walsh(rows, n):
    """The Walsh functions 1 to `rows` of n = 4^k elements, all of them plus or minus 2^-k."""
    numbers, elements = np.arange(1, rows + 1)[:, None], np.arange(n)
    assert rows < n and n & (n - 1) == 0 and n.bit_length() % 2 == 1
    ones = sum((numbers & elements) >> bit & 1 for bit in range(n.bit_length()))
    return np.where(ones % 2 == 0, 1.0, -1.0) / n**0.5


def block(rng, q, b, dtype):
    """Columns with about as much in the span of the rows, mainly one of each, as outside.

    Most elements have the sign of that row's: what truncation leaves out of them adds up.
    """
    used, n = q.shape
    w = rng.normal(size=(b, n)) * 2.0 ** rng.integers(-3, 3, n)
    for c in range(b):
        w[c] += 3 * np.linalg.norm(w[c]) * q[c % used]
    return w.astype(np.float64 if dtype == "float64" else np.float32)


def check_factors(q, w, c, s, deviation, dtype):
    """What one update, and the measurements before and after it, must be for W = Q C + Q' S.

    C = Q^T W and S^T S = W^T W - C^T C within a few roundings of W; the deviation from
    orthonormality that the update leaves, within a few of what it takes from the block.
    """
    exact, rows = w.astype(np.longdouble), q.astype(np.longdouble)
    norms, want = np.linalg.norm(w.astype(np.float64), axis=1), rows @ exact.T
    rest = exact @ exact.T - want.T @ want
    eps = EPS[dtype]
    error = np.abs((c - want) / norms).max() / eps
    assert error <= 2, f"C: {error:.1f} eps"
    error = np.abs((s.T @ s - rest) / np.outer(norms, norms)).max() / eps
    assert error <= 4, f"S: {error:.1f} eps"
    growth = (norms / np.sqrt(np.diag(rest).astype(np.float64))).max()
    assert deviation <= 8 * growth * eps, f"deviation: {deviation / eps:.1f} eps, growth {growth}"
