"""Time one Hessian-vector product of the demo GPT, and of a deep one, against its rivals.

    python -m benchmarks.products.hvp [--repeats 25] [--json benchmarks/baselines/hvp.json]

All JAX programs run interleaved in one process with 2 threads, in the calling thread, and keep the
memory that they free: as curvax runs its own. hessian-eigenthings runs in a process of its own,
before and after, since two thread pools in one process hinder each other. Figures are
medians, and what counts is their ratio. A "gradient" is the fastest of: XLA's default, XLA without
its fusion pass, and the fenced one. Needs the extra `bench`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.lib.compiled import compile_program, median_seconds, relative_difference
from benchmarks.lib.facts import machine_facts, publish

import curvax as cx
from curvax.models import gpt
from curvax.ops.fence import fence

NO_FUSION = {"xla_disable_hlo_passes": "fusion"}


def _gradient(params: Any, batch: Any) -> Any:
    return jax.grad(gpt.loss)(params, batch)


def _hvp(params: Any, batch: Any, vector: Any) -> Any:
    return jax.jvp(lambda p: jax.grad(gpt.loss)(p, batch), (params,), (vector,))[1]


def _peer(products: int = 11) -> list[float]:
    """Seconds of hessian-eigenthings' products, in a process of its own, without the first."""
    command = [sys.executable, "-m", "benchmarks.products.hvp", "--peer", str(products)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(json.loads(out.splitlines()[-1]))


def _time_peer(products: int) -> list[float]:
    import torch
    from benchmarks.lib.torch_gpt import operator

    op = operator(*gpt.load())
    vector = torch.randn(op.size, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(products):
        start = time.perf_counter()
        op.matvec(vector)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def demo_model(repeats: int) -> dict[str, Any]:
    """Products on the shipped model, one batch of 16x64 tokens."""
    before = _peer()
    params, batch = gpt.load()
    batch = jnp.asarray(batch)
    op = cx.hessian(gpt.loss, params, batch, linearize=True)
    gauss_newton = cx.ggn(
        lambda p, b: gpt.forward(p, b[:, :-1]),
        cx.losses.SoftmaxCrossEntropy(lambda b: b[:, 1:]),
        params,
        batch.astype(jnp.int32),
        linearize=True,
    )
    flat = jax.random.normal(jax.random.key(0), (op.shape[0],))
    vector = op.unravel(flat)
    _, linear = jax.jit(lambda p, b: jax.linearize(lambda q: jax.grad(gpt.loss)(q, b), p))(
        params, batch
    )
    compiled = {
        "gradient, default": compile_program(_gradient, params, batch),
        "gradient, no fusion pass": compile_program(_gradient, params, batch, options=NO_FUSION),
        "gradient, fenced": compile_program(fence(_gradient), params, batch),
        "HVP, curvax (linearised, fenced)": compile_program(
            lambda o, v: o.product(v), op, flat[None]
        ),
        "GGN product, curvax": compile_program(lambda o, v: o.product(v), gauss_newton, flat[None]),
        "HVP, jit(jvp(grad))": compile_program(_hvp, params, batch, vector),
        "HVP, jit of the linearised": compile_program(lambda lin, v: lin(v), linear, vector),
    }
    programs = {name: program for name, (program, _) in compiled.items()}
    ours = op.ravel(op @ vector)
    errors = {
        "jit(jvp(grad))": relative_difference(ours, op.ravel(programs["HVP, jit(jvp(grad))"]())),
    }
    seconds = median_seconds(programs, repeats)
    seconds["HVP, hessian-eigenthings"] = float(np.median(before + _peer()))
    fastest = min(value for name, value in seconds.items() if name.startswith("gradient"))
    product = seconds["HVP, curvax (linearised, fenced)"]
    return {
        "seconds": seconds,
        "compile_seconds": {name: time_ for name, (_, time_) in compiled.items()},
        "relative_difference": errors,
        "ratios": {
            "to the fastest gradient (target <= 1.4)": product / fastest,
            "GGN product to the fastest gradient (target <= 1.5)": seconds["GGN product, curvax"]
            / fastest,
            "to hessian-eigenthings (target <= 0.7)": product / seconds["HVP, hessian-eigenthings"],
            "to jit(jvp(grad)) (target <= 0.65)": product / seconds["HVP, jit(jvp(grad))"],
            "to jit of the linearised": product / seconds["HVP, jit of the linearised"],
        },
    }


def deep_model(repeats: int, layers: int = 24) -> dict[str, Any]:
    """The plain product of a deep model, where recomputation grows with the square of the depth."""
    params = gpt.init(jax.random.key(0), layers=layers)
    batch = jax.random.randint(jax.random.key(1), (4, gpt.CONTEXT + 1), 0, gpt.VOCAB)
    op = cx.hessian(gpt.loss, params, batch, linearize=False)
    flat = jax.random.normal(jax.random.key(2), (op.shape[0],))
    compiled = {
        "curvax": compile_program(lambda o, v: o.product(v), op, flat[None]),
        "jit(jvp(grad))": compile_program(_hvp, params, batch, op.unravel(flat)),
    }
    programs = {name: program for name, (program, _) in compiled.items()}
    products = [programs["curvax"]()[0], op.ravel(programs["jit(jvp(grad))"]())]
    seconds = median_seconds(programs, repeats)
    compile_seconds = {name: time_ for name, (_, time_) in compiled.items()}
    return {
        "layers": layers,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "relative_difference": relative_difference(*products),
        "ratios": {
            "speed-up (target >= 3.5)": seconds["jit(jvp(grad))"] / seconds["curvax"],
            "compiles sooner by (target >= 3)": compile_seconds["jit(jvp(grad))"]
            / compile_seconds["curvax"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-deep", action="store_true")
    parser.add_argument("--peer", type=int, help="only time this many products of the peer")
    args = parser.parse_args()
    if args.peer:
        print(json.dumps(_time_peer(args.peer)))
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with cx.keep_memory():
        report = {"machine": machine_facts(), "demo": demo_model(args.repeats)}
        if not args.skip_deep:
            report["deep"] = deep_model(max(args.repeats // 3, 5))
    publish(report, args.json)


if __name__ == "__main__":
    main()
