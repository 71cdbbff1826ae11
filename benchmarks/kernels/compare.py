"""Prints the ratios of a kernel benchmark beside their targets.

    make bench BENCH_ARGS=--benchmark-json=out.json
    python benchmarks/kernels/compare.py out.json [--baseline FILE] [--smoke]

Exits with 1 if a count, which no machine and no size changes, is not the baseline's, or if a target
is missed, unless ``--smoke``: then ratios are only printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

BASELINE = pathlib.Path(__file__).parents[1] / "baselines" / "kernels.json"
# name of the ratio: (bound, whether it is a least value)
TARGETS = {
    "softmax_ce_hvp (512, 50257): time / (z + u)": (1.3, False),
    "softmax_ce_hvp (512, 50257): jnp / kernel": (1.7, True),
    "softmax_ce_hvp (128, 151936): time / (z + u)": (1.3, False),
    "softmax_ce_hvp (128, 151936): jnp / kernel": (1.7, True),
    "block_ortho b=1: best jnp / kernel": (1.0, True),
    "block_ortho b=4: best jnp / kernel": (1.5, True),
    "block_ortho b=4: kernel / sum(Q)": (4.5, False),
    "block_ortho b=8: best jnp / kernel": (2.0, True),
    "block_ortho float32: bandwidth / that of sum": (0.85, True),
    "block_ortho: float32 / float16": (1.7, True),
    "block_ortho: float32 / bfloat16": (1.7, True),
    "residuals float32: kernel / sum of the same bytes": (1.5, False),
    "residuals float16: kernel / sum of the same bytes": (2.0, False),
}


def recorded(path: pathlib.Path, kind: str) -> dict[str, float]:
    """All `"ratios"` or all `"counts"` that a pytest-benchmark file records."""
    found: dict[str, float] = {}
    for case in json.loads(path.read_text())["benchmarks"]:
        found |= case["extra_info"].get(kind, {})
    return found


def changed_counts(measured: pathlib.Path, baseline: pathlib.Path) -> list[str]:
    """What was counted otherwise than in the baseline."""
    now, before = (recorded(path, "counts") for path in (measured, baseline))
    return [
        f"{name}: {now.get(name)}, in the baseline {before.get(name)}"
        for name in sorted(now.keys() | before.keys())
        if now.get(name) != before.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=pathlib.Path)
    parser.add_argument("--baseline", type=pathlib.Path, default=BASELINE)
    parser.add_argument("--smoke", action="store_true", help="print the ratios, judge counts alone")
    arguments = parser.parse_args()
    measured = recorded(arguments.json, "ratios")
    before = recorded(arguments.baseline, "ratios")
    missed = 0
    print(f"{'ratio':48} {'measured':>9} {'target':>8} {'baseline':>9}")
    for name in [*TARGETS, *(n for n in measured if n not in TARGETS)]:
        value, (bound, least) = measured.get(name), TARGETS.get(name, (None, False))
        good = bound is None or (
            value is not None and (value >= bound if least else value <= bound)
        )
        missed += not good
        print(
            f"{name:48} {'-' if value is None else f'{value:.2f}':>9} "
            f"{'' if bound is None else ('>= ' if least else '<= ') + f'{bound:g}':>8} "
            f"{f'{before[name]:.2f}' if name in before else '-':>9} "
            f"{'' if good or arguments.smoke else 'MISSED'}"
        )
    changed = changed_counts(arguments.json, arguments.baseline)
    print(*changed, sep="\n")
    return 1 if changed or (missed and not arguments.smoke) else 0


if __name__ == "__main__":
    sys.exit(main())
