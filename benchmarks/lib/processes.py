"""Cases of a benchmark, each in a process of its own, and what one measures of itself."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.lib.facts import machine_facts, publish

Case = Callable[[int, int], dict[str, Any]]

MEASURED = ("seconds", "processor_seconds", "peak_growth_MB")


class Meter:
    """What has passed since it was made: seconds, those of all processors, growth of the memory.

    That is the peak of the resident size, less the size at the beginning. What was freed before is
    given back to the system first, and earlier peaks are forgotten: they hide nothing.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._resident = status("VmRSS")
        self._begin = self._times()

    def read(self) -> dict[str, float]:
        passed = {name: value - self._begin[name] for name, value in self._times().items()}
        return {**passed, "peak_growth_MB": status("VmHWM") - self._resident}

    @staticmethod
    def _times() -> dict[str, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "seconds": time.perf_counter(),
            "processor_seconds": usage.ru_utime + usage.ru_stime,
        }


def status(name: str) -> float:
    """A size in MB from what the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def run_case(module: str, case: str, number: int, seed: int) -> dict[str, Any]:
    """What a case returns: `CASES[case](number, seed)` of a module, in a new process."""
    command = [sys.executable, "-m", module, "--case", case]
    command += ["--number", str(number), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-4000:]}")
    found = dict(json.loads(done.stdout.splitlines()[-1]))
    measured = [f"{name} {found[name]:.2f}" for name in MEASURED if name in found]
    print(f"{case}, {number}, seed {seed}:", *measured, file=sys.stderr, flush=True)
    return found


def medians(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """By what is measured, the median of each case over the rounds."""
    return {
        f"median_{name}": {
            case: float(np.median([found[case][name] for found in rounds])) for case in rounds[0]
        }
        for name in MEASURED
    }


def main(
    description: str, cases: dict[str, Case], compare: Callable[[int], dict[str, Any]], repeats: int
) -> None:
    """Run one case, for `run_case`, or the comparison, which takes the number of repeats."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=cases)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.case:
        found = cases[args.case](args.number, args.seed)
        arrays = {k: np.asarray(v).tolist() for k, v in found.items() if hasattr(v, "dtype")}
        print(json.dumps({**found, **arrays}))
    else:
        publish({"machine": machine_facts(), **compare(args.repeats)}, args.json)
