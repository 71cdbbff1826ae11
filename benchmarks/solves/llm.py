"""The top 5 eigenpairs of SmolLM2 on 128 tokens: curvax beside hessian-eigenthings.

    python -m benchmarks.solves.llm [--steps 20] [--json benchmarks/baselines/llm.json]

Each solve is a process of its own, one after the other, with 2 threads; peak memory is that of the
whole process. Time runs from the weights in memory to the eigenpairs, with compilation and with
curvax's verification. Residuals are measured with fresh products of the tool's own operator, for
the rival after its clock has stopped. Needs the extras `bench` and `llm`, and the weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lib.facts import machine_facts, publish

K, TOL, TOKENS = 5, 1e-2, 128


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def case_curvax(operator: str, limit: float) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import smollm2_spectrum

    import curvax as cx
    from curvax.models import smollm2

    params, config = smollm2.load()
    batch = smollm2.batch(TOKENS)
    start = time.perf_counter()
    op = smollm2_spectrum.make(operator, params, config, batch)
    plan = cx.plan(op, K, tol=TOL, limit=int(limit * 1e9))
    chosen = {name: getattr(plan, name) for name in ("block_size", "max_basis", "basis_dtype")}
    result = cx.eigsh(op, K, tol=TOL, seed=0, return_eigenvectors=False, **chosen)
    return {
        "loss": float(op.loss),
        "seconds": time.perf_counter() - start,
        "parts": result.seconds,
        "products": result.num_matvecs,
        "verification": result.num_verification,
        "basis": f"{plan.max_basis} in {plan.basis_dtype}",
        "values": result.eigenvalues.tolist(),
        "residuals": (result.residuals / abs(result.eigenvalues).max()).tolist(),
        "converged": bool(result.all_converged),
        "peak_gigabytes": _peak(),
    }


def case_hessian_eigenthings(steps: int) -> dict[str, Any]:
    import numpy as np
    import torch
    from benchmarks.lib import torch_smollm2
    from hessian_eigenthings import HessianOperator, lanczos

    from curvax.models import smollm2

    torch.set_num_threads(2)
    model = torch_smollm2.model()
    tokens = torch.tensor(np.asarray(smollm2.batch(TOKENS)), dtype=torch.long)
    start = time.perf_counter()
    op = HessianOperator(model, [tokens], torch_smollm2.loss)
    result = lanczos(op, k=K, max_iter=steps, tol=TOL, which="LM", seed=0)
    seconds, peak = time.perf_counter() - start, _peak()
    values = result.eigenvalues.tolist()
    rows, quotients, best = [], [], []
    # In float64: torch's float32 norm of so many numbers is 1.4 % too small, which is also why the
    # rival's eigenvalues are too large.
    for value, v in zip(values, result.eigenvectors, strict=True):
        v = v.double() / torch.linalg.norm(v.double())
        product = op.matvec(v.float()).double()
        quotients.append(float(v @ product))
        rows.append(float(torch.linalg.norm(product - value * v)))
        best.append(float(torch.linalg.norm(product - quotients[-1] * v)))
    return {
        "loss": float(torch_smollm2.loss(model, tokens).detach()),
        "seconds": seconds,
        "products": steps,
        "values": values,
        "residuals": [r / max(map(abs, values)) for r in rows],
        # Its vectors are better than its values: what Rayleigh quotients would have given.
        "rayleigh_quotients": quotients,
        "residuals_of_quotients": [r / max(map(abs, values)) for r in best],
        "peak_gigabytes": peak,
    }


def _run(*arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.solves.llm", *map(str, arguments)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=float, default=7.0, help="GB that curvax's solve may add")
    parser.add_argument("--steps", type=int, default=20, help="products of the rival")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=["hessian", "ggn", "rival"])
    args = parser.parse_args()
    if args.case:
        rival = args.case == "rival"
        case = case_hessian_eigenthings(args.steps) if rival else case_curvax(args.case, args.limit)
        print(json.dumps(case))
        return
    report = {
        "machine": machine_facts(),
        "hessian": _run("--case", "hessian", "--limit", args.limit),
        "ggn": _run("--case", "ggn", "--limit", args.limit),
        "hessian-eigenthings 1.0.0a5, hessian": _run("--case", "rival", "--steps", args.steps),
    }
    ours, theirs = report["hessian"], report["hessian-eigenthings 1.0.0a5, hessian"]
    report["ratios"] = {
        "speed-up (target >= 2)": theirs["seconds"] / ours["seconds"],
        "peak memory (target <= 0.6)": ours["peak_gigabytes"] / theirs["peak_gigabytes"],
    }
    publish(report, args.json)


if __name__ == "__main__":
    main()
