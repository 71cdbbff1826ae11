"""Run a benchmark of a CUDA device.

python -m benchmarks.gpu CASE [--out out/gpu]

With CURVAX_BENCH_SMOKE=1 it runs in seconds at small sizes, on any device: its figures mean
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import block_ortho, gpt, peers, shape, softmax_ce
from benchmarks.gpu.report import SMOKE, write
from benchmarks.gpu.timing import copy_bandwidth

Rows = list[tuple[str, str]]


def _copy() -> tuple[dict[str, Any], Rows]:
    copy = copy_bandwidth(SMOKE)
    return copy, [("copy", f"{copy['best'] / 1e12:.2f} TB/s read and written")]


def _kernel(run: Callable[[float, bool], dict[str, Any]]) -> tuple[dict[str, Any], Rows]:
    copy, rows = _copy()
    results = run(copy["best"], SMOKE)
    for size, entry in results.items():
        times = ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in entry["seconds"].items())
        share = f"{100 * entry['share_of_copy']:.0f} % of copy"
        if "target_share" in entry:
            share += f" (target {100 * entry['target_share']:.0f})"
        rows.append((size, f"{share}; {times}"))
    return {"copy": copy, **results}, rows


def _solve(size: shape.Shape, precision: str) -> tuple[dict[str, Any], Rows]:
    entry = gpt.run(shape.SMOKE if SMOKE else size, precision)
    target = entry.get("target_seconds_per_product")
    return entry, [
        (
            "solve",
            f"{entry['seconds']:.1f} s, of it products {100 * entry['share_of_products']:.0f} %",
        ),
        (
            "product",
            f"{entry['seconds_per_product']:.3f} s, precision {precision}"
            + (f" (target {target})" if target else ""),
        ),
        ("products", "{} and {} to verify".format(*entry["matvecs"])),
        ("memory", f"{entry['peak_device_GB']:.1f} GB"),
        ("converged", str(entry["all_converged"])),
    ]


CASES: dict[str, Callable[[], tuple[dict[str, Any], Rows]]] = {
    "copy": _copy,
    "softmax_ce": lambda: _kernel(softmax_ce.run),
    "block_ortho": lambda: _kernel(block_ortho.run),
    "gpt": lambda: _solve(shape.SMALL, "highest"),
    "gpt-bf16x3": lambda: _solve(shape.SMALL, "bf16x3"),
    "large": lambda: _solve(shape.LARGE, "highest"),
    "large-bf16x3": lambda: _solve(shape.LARGE, "bf16x3"),
    "peers": lambda: peers.run(SMOKE),
}


def main() -> None:
    """Runs one case: the device's memory is best when it is a process's alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args()
    results, rows = CASES[args.case]()
    write(f"bench-{args.case}", results, rows, args.out)


if __name__ == "__main__":
    main()
