"""Run the benchmarks of a CUDA device.

python -m benchmarks.gpu [copy softmax_ce block_ortho gpt large] [--out out/gpu]

With CURVAX_BENCH_SMOKE=1 all run in seconds at small sizes, on any device: their figures mean
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import block_ortho, gpt, softmax_ce
from benchmarks.gpu.report import SMOKE, write
from benchmarks.gpu.timing import copy_bandwidth

CASES = ("copy", "softmax_ce", "block_ortho", "gpt", "large")


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "copy", f"{results['copy']['best'] / 1e12:.2f} TB/s read and written"
    for case in ("softmax_ce", "block_ortho"):
        for size, entry in results.get(case, {}).items():
            times = ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in entry["seconds"].items())
            share = next(v for k, v in entry.items() if k.startswith("share"))
            yield f"{case} {size}", f"{100 * share:.0f} % of copy; {times}"
    for case in ("gpt", "large"):
        if case in results:
            entry = results[case]
            yield (
                case,
                f"{entry['seconds']:.1f} s, {entry['matvecs']} matvecs, products "
                f"{100 * entry['share_of_products']:.0f} %, {entry['peak_device_GB']:.1f} GB, "
                f"converged: {entry['all_converged']}",
            )


def main() -> None:
    """Runs the cases in turn, each with a file of its own: nothing is lost when time runs out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}; all if none is given")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    copy = copy_bandwidth(SMOKE)
    bandwidth = copy["best"]
    run = {
        "softmax_ce": lambda: softmax_ce.run(bandwidth, SMOKE),
        "block_ortho": lambda: block_ortho.run(bandwidth, SMOKE),
        "gpt": lambda: gpt.run(gpt.SMOKE if SMOKE else gpt.SMALL),
        "large": lambda: gpt.run(gpt.SMOKE if SMOKE else gpt.LARGE),
    }
    for case in args.cases or CASES:
        results = {"copy": copy}  # what the shares in this very file refer to
        if case in run:
            results[case] = run[case]()
        write(f"bench-{case}", results, list(_rows(results)), args.out)


if __name__ == "__main__":
    main()
