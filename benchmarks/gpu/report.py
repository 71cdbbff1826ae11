"""JSON and a short table of a stage of `benchmarks/gpu.sh`."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax

from curvax import _native


def facts() -> dict[str, Any]:
    """What was run, and on which device."""
    return {
        "commit": os.environ.get("CURVAX_COMMIT", "unknown"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "kernels": _native.build_info("cuda"),
    }


def write(stage: str, results: dict[str, Any], rows: list[tuple[str, str]], out: Path) -> None:
    """Writes ``out/gpu-<stage>.json`` and prints the rows."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{stage}.json"
    path.write_text(json.dumps({**facts(), "results": results}, indent=1) + "\n")
    width = max(len(name) for name, _ in rows)
    print(f"\n{facts()['device']}, commit {facts()['commit']}: {path}")
    for name, value in rows:
        print(f"  {name:{width}}  {value}")


def _tests(path: Path) -> dict[str, Any]:
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


def _sanitized(path: Path) -> str:
    """What a log of compute-sanitizer says: errors, none, or that the device is not supported."""
    text = path.read_text(errors="replace")
    if re.search(r"[Dd]evice not supported|Unable to|LibraryNotLoaded", text):
        return "skipped: the device does not support it"
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    found = sum(int(a or b) for a, b in counts)
    status = re.findall(r"exit status (\d+)", text)[-1]
    if status == "127":
        return "skipped: compute-sanitizer is not installed"
    if not counts:
        return f"did not finish: exit status {status}"
    return "no errors" if found == 0 and status == "0" else f"{found} errors, exit status {status}"


def main() -> None:
    """Reads what a stage has left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["build", "test", "sanitize"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--log", type=Path, action="append", default=[])
    args = parser.parse_args()
    if args.stage == "build":
        results: dict[str, Any] = {"seconds": args.seconds}
        rows = [("seconds", f"{args.seconds:.0f}"), ("kernels", str(facts()["kernels"]))]
    elif args.stage == "test":
        results = _tests(args.junit)
        rows = [(name, str(value)) for name, value in results.items()]
    else:
        results = {log.stem: _sanitized(log) for log in args.log}
        rows = list(results.items())
    write(args.stage, results, rows, args.out)


if __name__ == "__main__":
    main()
