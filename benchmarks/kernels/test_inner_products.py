"""What a certificate does beside its product, against plain JAX and against memory traffic.

The residual of one pair reads a product and two rows of the basis; the Gram matrix reads ten rows.
`sum` reads as many bytes of float32. How often the compiled certificate goes over its vectors is
counted: that must be what the baseline says on any machine, at any size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.lib.interleaved import SMOKE, medians

from curvax import _native
from curvax.device import programs, storage

assert _native.available()

LENGTH, ROWS = (200_000 if SMOKE else 20_000_000), 10


def compiled(monkeypatch, implementation, program, *arguments):
    monkeypatch.setenv("CURVAX_IMPL", implementation)
    return jax.jit(lambda *args: program.fun(*args)).lower(*arguments).compile()


def sweeps(call):
    """Calls of the kernel and loops of XLA, and of these, what a condition may leave out."""
    lines = call.as_text().splitlines()
    kernel = sum('custom_call_target="curvax.' in line for line in lines)
    loops = sum(" while(" in line for line in lines)
    return kernel + loops, sum(" conditional(" in line for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["residuals", "gram"])
def test_certificate(benchmark, monkeypatch, name, dtype):
    with jax.enable_x64(True):
        rows = jax.random.normal(jax.random.key(0), storage.shape(ROWS, LENGTH, dtype), jnp.float32)
        basis = jax.block_until_ready(rows.astype(dtype))
        del rows
        if name == "gram":
            given = basis, np.zeros(ROWS, np.int32)
            read = basis.nbytes
        else:
            product = jax.random.normal(jax.random.key(1), (1, LENGTH), jnp.float32)
            small = np.int32(1), np.int32(7), np.full(1, 0.1), np.full((1, 1), 0.3)
            given = basis, product, *small
            read = product.nbytes + 2 * basis.nbytes // ROWS
        program = getattr(programs, name)
        kernel = compiled(monkeypatch, "auto", program, *given)
        plain = compiled(monkeypatch, "reference", program, *given)
        for got, want in zip(
            *(jax.tree.leaves(call(*given)) for call in (kernel, plain)), strict=True
        ):
            np.testing.assert_allclose(
                got, want, rtol=1e-12, atol=1e-12 * abs(np.asarray(want)).max()
            )
        same = jnp.ones(read // 4, jnp.float32)
        ways = {
            "sum": functools.partial(jax.jit(jnp.sum), same),
            "kernel": functools.partial(kernel, *given),
            "jnp": functools.partial(plain, *given),
        }
        seconds = medians(
            {way: ((lambda: None), lambda _, call=call: call()) for way, call in ways.items()}
        )
        (total, conditional), title = sweeps(kernel), f"{name} {dtype}"
        benchmark.extra_info.update(
            seconds=seconds,
            ratios={
                f"{title}: jnp / kernel": seconds["jnp"] / seconds["kernel"],
                f"{title}: kernel / sum of the same bytes": seconds["kernel"] / seconds["sum"],
            },
            counts={
                f"{title}: sweeps over the vectors": total - conditional,
                f"{title}: sweeps under a condition": conditional,
            },
        )
        benchmark.pedantic(ways["kernel"], rounds=3)
