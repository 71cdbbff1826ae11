"""JSON and a short table of a stage of `benchmarks/gpu.sh`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jaxlib

from curvax import _native

# Small sizes, whose figures mean nothing.
SMOKE = os.environ.get("CURVAX_BENCH_SMOKE") == "1"


def facts() -> dict[str, Any]:
    """What was run, and on which device."""
    return {
        "commit": os.environ.get("CURVAX_COMMIT", "unknown"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "kernels": _native.build_info("cuda"),
        "smoke": SMOKE,
    }


def write(stage: str, results: dict[str, Any], rows: list[tuple[str, str]], out: Path) -> None:
    """Writes ``out/gpu-<stage>.json`` and prints the rows."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{stage}.json"
    path.write_text(json.dumps({**facts(), "results": results}, indent=1) + "\n")
    width = max((len(name) for name, _ in rows), default=0)
    print(f"\n{facts()['device']}, commit {facts()['commit']}: {path}")
    for name, value in rows:
        print(f"  {name:{width}}  {value}")


def tests(path: Path) -> dict[str, Any]:
    """Counts from pytest's XML; it is not there if pytest did not live to write it."""
    if not path.is_file():
        return {"passed": 0, "failed": ["pytest ended before its report"], "skipped": 0}
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    cases = list(suite.iter("testcase"))
    wrong = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(wrong) - len(skipped),
        "failed": [f"{c.get('classname')}::{c.get('name')}" for c in wrong],
        "skipped": len(skipped),
        "seconds": float(suite.get("time", 0)),
    }


def sanitized(log: str) -> tuple[str, bool]:
    """What a log of compute-sanitizer says, and whether that is no failure.

    Only a tool that is absent, or that says that it does not support the device, is skipped: what
    it then counts is its own failure to start.
    """
    status = re.findall(r"exit status (\d+)", log)[-1]
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", log)
    found = sum(int(a or b) for a, b in counts)
    if status == "127":
        return "skipped: compute-sanitizer is not installed", True
    if "Device not supported" in log:
        return "skipped: the device does not support it", True
    if found:
        return f"{found} errors, exit status {status}", False
    if not counts or status != "0":
        return f"no errors counted, but exit status {status}", False
    return "no errors", True


def driver(log: str) -> list[tuple[str, str]]:
    """What the driver timed, and what it found wrong: `name: value` in each line."""
    pairs = re.findall(r"^(.+?): (.+)$", log, re.MULTILINE)
    return [
        (name, value) for name, value in pairs if " of copy" in value or "FAILED" in name + value
    ]


def main() -> None:
    """Reads what a stage has left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--log", type=Path, action="append", default=[])
    args = parser.parse_args()
    failed = False
    if args.stage == "build":
        results: dict[str, Any] = {"seconds": args.seconds}
        rows = [("seconds", f"{args.seconds:.0f}"), ("kernels", str(facts()["kernels"]))]
    elif args.junit:
        results = tests(args.junit)
        rows = [(name, str(value)) for name, value in results.items()]
    elif args.stage == "driver":
        rows = driver("".join(log.read_text() for log in args.log))
        results = dict(rows)
    else:
        verdicts = {log.stem: sanitized(log.read_text(errors="replace")) for log in args.log}
        results = {name: text for name, (text, _) in verdicts.items()}
        rows = list(results.items())
        failed = not all(fine for _, fine in verdicts.values())
    write(args.stage, results, rows, args.out)
    sys.exit(failed)


if __name__ == "__main__":
    main()
