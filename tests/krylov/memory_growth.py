"""Growth of the peak memory of a solve against its forecast; run by `test_plan` as a process.

python -m tests.krylov.memory_growth network|smollm2 BASIS_DTYPE RETURN_EIGENVECTORS
"""

import functools
import json
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx


def network(width=1600, depth=4, samples=8):
    """The Hessian of a perceptron of 9 million parameters.

    Its vectors are longer than what glibc would rather keep than give back, 32 MiB.
    """
    rng = np.random.default_rng(0)
    sizes = [784] + [width] * depth + [10]
    params = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        w = rng.normal(size=(fan_in, fan_out)) / fan_in**0.5
        params.append({"w": jnp.asarray(w, jnp.float32), "b": jnp.ones(fan_out)})
    x, y = rng.normal(size=(samples, 784)), rng.normal(size=(samples, 10))

    def loss(params, batch):
        x, y = batch
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2)

    return cx.hessian(loss, params, (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)))


def smollm2():
    """The Hessian of SmolLM2 on 128 tokens."""
    from curvax.models import llama, smollm2

    params, config = smollm2.load()
    return cx.hessian(functools.partial(llama.loss, config=config), params, smollm2.batch(128))


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def settled():
    """The resident memory once what was freed has been given back, in other threads."""
    size = -1
    while size != (size := resident("VmRSS")):
        time.sleep(0.5)
    return size


def solve(op, products, options):
    result = cx.eigsh(op, 5, seed=0, max_matvecs=products, **options)
    jax.block_until_ready(result.eigenvectors)
    return result


def main(model, dtype, keep):
    warnings.simplefilter("ignore", cx.ConvergenceWarning)
    op = {"network": network, "smollm2": smollm2}[model]()
    options = {"basis_dtype": dtype, "max_basis": 12, "return_eigenvectors": keep}
    plan = cx.plan(op, 5, **options)
    solve(op, 5, options)  # compiles
    before = settled()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    result = solve(op, 13, options)
    growth = resident("VmHWM") - before
    assert result.num_restarts > 0 and op.shape[0] >= 5e6
    print(json.dumps([plan.bytes.peak, growth]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "True")
