"""What computations need that does not depend on the clock, held to `baselines/counts.json`.

    python -m benchmarks.products.counts [--write]

Page faults, bytes, compiled programs, products and operations of the shipped GPT, of a network of
layers in a scan, of convolutions and of ragged batches. A count may be lower than the baseline's,
and higher by what `ALLOWED` says: XLA lays memory out anew for each processor, and products until
convergence depend on rounding. Exits with 1 if one is higher. `--write` makes the baseline anew.
"""

import argparse
import functools
import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from benchmarks.products import microbatches, ragged

import curvax as cx
from curvax.device.programs import multiply, solve_clock
from curvax.models import gpt
from curvax.operators.base import Operator
from curvax.operators.curvature import Curvature

BASELINE = Path(__file__).parents[1] / "baselines" / "counts.json"
ALLOWED = 1.1
# A page here and there is not the product's.
SLACK = {"page faults of a product in a solve": 20}


def _vector(op: Operator) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (1, op.shape[0]))


def _compiled(op: Operator) -> Any:
    return jax.jit(op.product, donate_argnums=0).lower(_vector(op)).compile()


def _temporary(op: Operator) -> int:
    return int(_compiled(op).memory_analysis().temp_size_in_bytes)


@functools.cache
def _gpt() -> tuple[Any, jax.Array]:
    params, batch = gpt.load()
    return params, jnp.asarray(batch)


@functools.cache
def _hessian() -> Curvature:
    return cx.hessian(gpt.loss, *_gpt())


def _faults() -> int:
    """Of a product in a solve, when its memory has been used before."""
    op, clock = _hessian(), solve_clock()
    with cx.keep_memory():
        block, found = _vector(op), []
        for _ in range(7):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = jax.block_until_ready(multiply(clock, op, block))
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(found)[3]


def _layers_in_a_scan() -> int:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        out, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params)
        return jnp.mean(out**2)

    return _temporary(cx.hessian(loss, jnp.full((24, 256, 256), 0.01), jnp.ones((64, 256))))


def _slow_convolutions() -> int:
    """Those in a loop over microbatches whose batch is not their first axis and the last none."""
    params, batch = microbatches._problem()
    op = cx.hessian(microbatches._loss, params, batch, microbatch_size=microbatches.PART)
    orders = re.findall(r"dim_labels=(\w+)_\w+->", _compiled(op).as_text())
    assert orders
    return sum(not (order.startswith("b") and order.endswith("f")) for order in orders)


def _fisher() -> Curvature:
    params, batch = _gpt()
    return cx.fisher(
        lambda p, batch: gpt.forward(p, batch[:, :-1]),
        cx.losses.SoftmaxCrossEntropy(labels=lambda batch: batch[:, 1:]),
        params,
        batch,
    )


def _sizes() -> int:
    op = cx.hessian(
        ragged._loss, ragged._params(), ragged._batches(0, True), microbatch_size=ragged.LONGEST
    )
    return len(op.stacks)


def _solve() -> int:
    result = cx.eigsh(_hessian(), 10, tol=1e-3, seed=0, return_eigenvectors=False)
    assert result.all_converged
    return result.num_matvecs + result.num_verification


COUNTS: dict[str, Callable[[], float]] = {
    "page faults of a product in a solve": _faults,
    "temporary bytes of a linearised product": lambda: _temporary(_hessian()),
    "bytes of its residuals": lambda: sum(
        leaf.nbytes for stack in _hessian().stacks for leaf in stack.product.residuals
    ),
    "temporary bytes of a product of 24 layers in a scan": _layers_in_a_scan,
    "convolutions in slow orders, over microbatches": _slow_convolutions,
    "sizes of 500 batches of 57 lengths": _sizes,
    "operations of a product of the Fisher matrix": lambda: _compiled(_fisher()).cost_analysis()[
        "flops"
    ],
    "products to 10 eigenpairs, verified": _solve,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the baseline anew")
    arguments = parser.parse_args()
    found = {name: float(count()) for name, count in COUNTS.items()}
    if arguments.write:
        BASELINE.write_text(json.dumps(found, indent=1) + "\n")
    baseline = json.loads(BASELINE.read_text())
    higher = 0
    for name, value in found.items():
        bad = value > ALLOWED * baseline[name] + SLACK.get(name, 0)
        higher += bad
        print(f"{name:52} {value:12.0f} {baseline[name]:12.0f} {'HIGHER' if bad else ''}")
    return int(higher > 0)


if __name__ == "__main__":
    sys.exit(main())
