"""Sums of ours have the same bits whatever the number of threads."""

import os
import subprocess
import sys

import numpy as np
import pytest

from curvax.columns import row_sums

# On one core and on eight threads: XLA's CPU client reads NPROC, then the cores that it may use.
SCRIPT = """
import hashlib, os, sys
if sys.argv[1] == "1" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
import numpy as np
import curvax as cx
from curvax.program import Clock
from curvax.device import probing
from curvax.krylov import recurrence
from curvax.device.programs import residuals, squared_distance

clock, n, rng = Clock(), 150_003, np.random.default_rng(0)
basis = jnp.asarray(rng.standard_normal((5, n)), jnp.float32)
v, w = (jnp.asarray(rng.standard_normal((3, n)), jnp.float32) for _ in range(2))
coupling = np.ones((3, 3)) / 7
out = [residuals(clock, basis, w, np.int32(1), np.int32(2), np.ones(3), coupling)]
out += [squared_distance(clock, v, w)]
out += [probing.forms(clock, v, w), recurrence.subtract(clock, w + 0, v, w, np.ones(3))]
for leaf in jax.tree.leaves(out):
    print(hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest())

d = jnp.asarray(rng.standard_normal(n), jnp.float32)
op = cx.from_matvec(lambda v: d * v, n)
result = cx.eigsh(op, 2, seed=0, block_size=2, max_basis=12, tol=0.05)
print([x.hex() for x in (*result.eigenvalues.tolist(), *result.residuals.tolist())])
"""


def test_residuals_and_other_sums_have_the_same_bits_on_one_core_and_on_many_threads():
    printed = []
    for threads in ("1", "8"):
        command = [sys.executable, "-W", "error", "-c", SCRIPT, threads]
        environment = {**os.environ, "NPROC": threads}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    assert len(printed[0].splitlines()) == 12
    assert printed[0] == printed[1]


@pytest.mark.parametrize("width", [1, 2, 3, 1000, 1025])
def test_row_sums(width, rng):
    x = rng.integers(-50, 50, (3, width)).astype(np.float32)
    assert np.array_equal(row_sums(x), x.sum(axis=1))
