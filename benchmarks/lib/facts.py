"""What a figure was measured on."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib

from curvax import _native


def machine_facts() -> dict[str, Any]:
    """Processor, threads, versions, the kernels' target, and the commit."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": models[0] if models else platform.processor(),
        "threads": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "kernels": _native.build_info(),
        "cuda_kernels": _native.build_info("cuda"),
        "commit": commit,
    }


def publish(report: dict[str, Any], path: Path | None) -> None:
    """Print a report as JSON, and write it if a path is given."""
    text = json.dumps(report, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")
