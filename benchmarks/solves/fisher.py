"""Time and memory to the top 10 of the demo GPT's empirical Fisher matrix, at a residual of 1e-3.

    python -m benchmarks.solves.fisher [--repeats 3] [--json benchmarks/baselines/fisher.json]

Each solve is a process of its own; the cases take turns. A sample is a sequence. Every rival gets
the smallest number of products with which its own method reaches the residual, found beforehand;
the residuals of all are measured by one referee. Time, and growth of the peak memory, run from the
weights in memory to the eigenpairs, after compilation and one product; the gradients that curvax
keeps of the samples are part of both. curvax runs with its defaults, and with microbatches of one
sample, which let it keep gradients without knowing that samples do not mix. matfree has no Fisher
matrix: its product is what one writes in JAX, a forward and a reverse pass, jitted. Needs
the extra `bench`. 2 threads.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from benchmarks.lib.processes import Meter, main, medians, run_case

K, TOL = 10, 1e-3

# Sequences, and so the rank: with fewer steps than one more, no rival reached the residual.
RANK = 16


def _operator(microbatch_size: int | None) -> tuple[Any, Any, Any]:
    """The operator, its parameters and its batch."""
    import jax.numpy as jnp

    import curvax as cx
    from curvax.models import gpt

    params, batch = gpt.load()
    batch = jnp.asarray(batch)
    loss = cx.losses.SoftmaxCrossEntropy(labels=lambda batch: batch[:, 1:])
    op = cx.fisher(
        lambda p, batch: gpt.forward(p, batch[:, :-1]),
        loss,
        params,
        batch,
        microbatch_size=microbatch_size,
    )
    return op, params, batch


def case_curvax(products: int, seed: int, microbatch_size: int | None) -> dict[str, Any]:
    import curvax as cx

    op, params, _ = _operator(microbatch_size)
    cx.eigsh(op, K, tol=TOL, seed=seed)
    # What the operator keeps is let go, and computed again as part of what is measured.
    stacks = [replace(stack, product=stack.product.holding(())) for stack in op.stacks]
    op = replace(op, stacks=tuple(stacks))
    del stacks
    meter = Meter()
    op = op.at(params)
    result = cx.eigsh(op, K, tol=TOL, seed=seed)
    return {
        **meter.read(),
        "kept_MB": op.residual_bytes / 1e6,
        "parts": result.seconds,
        "products": result.num_matvecs + result.num_verification,
        "residual": _residual(
            result.eigenvalues, op.space.ravel(result.eigenvectors, batch_axes=1)
        ),
    }


def case_hessian_eigenthings(products: int, seed: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from benchmarks.lib.torch_gpt import TorchGPT
    from hessian_eigenthings import EmpiricalFisherOperator, lanczos

    from curvax.models import gpt

    params, batch = gpt.load()
    torch.set_num_threads(2)

    def loss(model: Any, tokens: Any) -> Any:
        logits = model(tokens[None, :-1])
        return F.cross_entropy(logits.reshape(-1, gpt.VOCAB), tokens[1:])

    tokens = torch.tensor(np.array(batch), dtype=torch.long)
    op = EmpiricalFisherOperator(TorchGPT(params), [tokens], loss)
    # Without it, every product keeps its graph.
    with torch.no_grad():
        op.matvec(torch.ones(op.size))
        meter = Meter()
        result = lanczos(op, k=K, max_iter=products, tol=TOL, seed=seed)
    length = tokens.shape[1] - 1
    return {
        **meter.read(), "products": products,
        # The mean over sequences of products of mean gradients; curvax's is per label.
        "residual": _residual(length * result.eigenvalues.numpy(), result.eigenvectors.numpy()),
    }  # fmt: skip


def case_matfree(products: int, seed: int) -> dict[str, Any]:
    import jax
    from matfree import decomp

    product, arguments, n = _jax_product()
    decompose = decomp.tridiag_sym(products, reortho="full", materialize=True)

    @jax.jit
    def solve(v0: Any, *arguments: Any) -> Any:
        out = decompose(lambda v, *args: product(v, *args), v0, *arguments)
        values, y = jax.numpy.linalg.eigh(out.J_small)
        order = jax.numpy.argsort(-jax.numpy.abs(values))[:K]
        return values[order], jax.numpy.matmul(y[:, order].T, out.Q_tall, precision="highest")

    v0 = jax.random.normal(jax.random.key(seed), (n,))
    compiled = solve.lower(v0, *arguments).compile()
    jax.block_until_ready(jax.jit(product)(v0, *arguments))
    meter = Meter()
    values, vectors = jax.block_until_ready(compiled(v0, *arguments))
    return {**meter.read(), "products": products, "residual": _residual(values, vectors)}


def _jax_product() -> tuple[Any, Any, int]:
    """`v, params, batch -> F v`, its arguments, and the number of parameters."""
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    from curvax.models import gpt

    params, batch = gpt.load()
    batch = jnp.asarray(batch)
    flat, unravel = ravel_pytree(params)

    def totals(flat: Any, batch: Any) -> Any:
        """The summed loss of each sequence."""
        logits = jax.nn.log_softmax(gpt.forward(unravel(flat), batch[:, :-1]))
        return -jnp.take_along_axis(logits, batch[:, 1:, None], axis=-1).sum((1, 2))

    def product(v: Any, flat: Any, batch: Any) -> Any:
        _, along = jax.jvp(lambda f: totals(f, batch), (flat,), (v,))
        _, back = jax.vjp(lambda f: totals(f, batch), flat)
        return back(along)[0] / batch[:, 1:].size

    return product, (flat, batch), flat.size


def _residual(values: Any, vectors: Any) -> float:
    """The worst `‖Fx − λx‖/‖x‖` of all pairs, relative to the largest λ."""
    import jax

    product, arguments, _ = _jax_product()
    jitted = jax.jit(product)
    values, worst = np.asarray(values, np.float64), 0.0
    if len(values) < K:
        return float("inf")
    for value, vector in zip(values, np.asarray(vectors, np.float64), strict=True):
        x = vector / np.linalg.norm(vector)
        found = np.asarray(jitted(jax.numpy.asarray(x, np.float32), *arguments), np.float64)
        worst = max(worst, float(np.linalg.norm(found - value * x)))
    return worst / float(np.abs(values).max())


CASES = {
    "curvax": lambda m, s: case_curvax(m, s, None),
    "curvax, microbatches of a sample": lambda m, s: case_curvax(m, s, 1),
    "hessian-eigenthings": case_hessian_eigenthings,
    "matfree": case_matfree,
}


def _run(case: str, products: int, seed: int) -> dict[str, Any]:
    return run_case("benchmarks.solves.fisher", case, products, seed)


def _smallest(case: str, seed: int) -> int:
    """The fewest products that reach the residual: past the rank, and no further."""
    return next(m for m in range(RANK + 1, 41) if _run(case, m, seed)["residual"] <= TOL)


def product_seconds() -> dict[str, float]:
    """One product and one gradient, in turn."""
    import jax
    from benchmarks.lib.compiled import median_seconds

    from curvax.models import gpt
    from curvax.operators.checked_product import compiled_product

    op, params, batch = _operator(None)
    v = jax.random.normal(jax.random.key(0), (1, op.shape[0]))
    gradient = jax.jit(jax.grad(gpt.loss))
    programs = {
        "gradient": lambda: jax.block_until_ready(gradient(params, batch)),
        "product": lambda: jax.block_until_ready(compiled_product(op, v)),
    }
    return median_seconds(programs, repeats=9)


def compare(repeats: int) -> dict[str, Any]:
    rivals = [case for case in CASES if not case.startswith("curvax")]
    steps = {(c, s): _smallest(c, s) for c in rivals for s in range(repeats)}
    rounds = [
        {case: _run(case, steps.get((case, seed), 0), seed) for case in CASES}
        for seed in range(repeats)
    ]
    found = medians(rounds)
    seconds, growth = found["median_seconds"], found["median_peak_growth_MB"]
    kept = {case: found["kept_MB"] for case, found in rounds[0].items() if "kept_MB" in found}
    fastest, leanest = (min(x[c] for c in rivals) for x in (seconds, growth))
    return {
        **found,
        "median_product_seconds": product_seconds(),
        "ratios": {
            case: {
                "fastest rival / curvax (target >= 1.2)": fastest / seconds[case],
                "peak growth, curvax / smallest of the rivals (target <= 1.1)": growth[case]
                / leanest,
                "the same without the gradients kept": (growth[case] - kept[case]) / leanest,
            }
            for case in CASES
            if case not in rivals
        },
        "rounds": rounds,
    }


if __name__ == "__main__":
    main(__doc__, CASES, compare, repeats=3)
