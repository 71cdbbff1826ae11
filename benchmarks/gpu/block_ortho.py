"""`block_ortho` at m = 64 rows and n = 10^8, against `jnp.dot` at the highest precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.gpu.timing import clock, interleaved

from curvax.ops.block_ortho import orthonormalize_block

USED = 64


def _dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _twice(q: Any, w: Any) -> Any:
    """Classical Gram-Schmidt twice, with a Cholesky factorisation: what one would write."""
    basis = q[:USED]
    for _ in range(2):
        w = w - _dot(_dot(w, basis.T), basis)
        factor = jnp.linalg.cholesky(_dot(w, w.T))
        inverse = jax.scipy.linalg.solve_triangular(
            factor, jnp.eye(len(w), dtype=w.dtype), lower=True
        )
        w = _dot(inverse, w)
    return w


def _kernel(q: Any, w: Any) -> Any:
    q, _, _, info = orthonormalize_block(q, w, np.int32(USED), 0, impl="ffi")
    return q, info


def _basis(rows: int, n: int) -> Any:
    """Orthonormal rows without a factorisation: each is 0 but for its own share of the elements."""

    def fill() -> Any:
        owner = jnp.arange(n) % USED
        size = (USED / n) ** 0.5
        values = jnp.where(owner[None, :] == jnp.arange(USED)[:, None], jnp.float32(size), 0.0)
        return jnp.concatenate([values, jnp.zeros((rows - USED, n), jnp.float32)])

    return jax.jit(fill)()


def run(bandwidth: float, smoke: bool) -> dict[str, Any]:
    """Seconds, passes, and the share of the copy bandwidth that three reads of Q make."""
    n = 10**5 if smoke else 10**8
    out = {}
    for b in (1, 4, 8):
        # One basis for all calls, handed from one to the next.
        held = [_basis(USED + b, n)]
        make = jax.jit(lambda key, b=b: jax.random.normal(key, (b, n), jnp.float32))
        keys = iter(jax.random.split(jax.random.key(0), 64))
        passes = []
        kernel = jax.jit(_kernel, donate_argnums=(0,))

        def call(w: Any, held: list[Any] = held, kernel: Any = kernel, passes: Any = passes) -> Any:
            held[0], info = kernel(held[0], w)
            passes.append(info[0])
            return info

        plain = jax.jit(_twice)
        with jax.enable_x64(True):
            seconds = interleaved(
                {
                    "curvax": clock(call, lambda make=make, keys=keys: (make(next(keys)),)),
                    "jnp.dot, HIGHEST": clock(
                        lambda w, held=held, plain=plain: plain(held[0], w),
                        lambda make=make, keys=keys: (make(next(keys)),),
                    ),
                }
            )
        # Q three times; W read, read and written, read, and its rows of the basis written.
        moved = 4 * n * (3 * USED + 5 * b)
        out[f"b={b}"] = {
            "seconds": seconds,
            "passes": float(max(passes)),
            "share_of_copy_at_three_reads": moved / seconds["curvax"] / bandwidth,
        }
        held.clear()
    return out
