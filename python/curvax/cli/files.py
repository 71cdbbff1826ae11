"""What a command writes into its directory."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from curvax.cli.machine import device, kernels


def write_result(console: Console, result: Any, path: Path, title: str) -> None:
    """Write `path.npz`, `.json`, `.txt` and, with matplotlib, `.png`."""
    written = list(result.save(path))
    table = path.with_suffix(".txt")
    table.write_text(f"{result}\n")
    written.append(table)
    try:
        result.plot(path.with_suffix(".png"), title=title)
        written.append(path.with_suffix(".png"))
    except ImportError as error:
        console.print(f"note: no picture: {error}", style="yellow")
    for file in written:
        console.print(f"wrote {file}", soft_wrap=True)


def write_config(
    console: Console, command: str, options: dict[str, Any], op: Any, out: Path
) -> None:
    """Write `config.json`: everything that a run depends on, defaults too."""
    facts = {
        "command": ["curvax", *sys.argv[1:]],
        "subcommand": command,
        "options": options,
        "operator": {
            "class": type(op).__name__,
            "parameters": op.shape[0],
            "dtype": op.dtype.name,
            "leaves": list(op.space.names),
            "loss": float(op.loss),
        },
        "versions": {
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name)
                for name in ("curvax", "jax", "jaxlib", "numpy")
            },
        },
        "device": device(),
        "kernels": kernels(),
    }
    path = out / "config.json"
    path.write_text(json.dumps(facts, indent=2, default=str) + "\n")
    console.print(f"wrote {path}", soft_wrap=True)
