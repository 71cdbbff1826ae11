"""Results as files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Stored:
    """A result that can be written to files and read back."""

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write `path.npz` (all arrays) and `path.json` (all but the eigenvectors).

        Args:
            path: the files' common stem; a suffix `.npz` or `.json` is taken off.

        Returns:
            The paths of the two files.
        """
        stem = Path(path)
        stem = stem.with_suffix("") if stem.suffix in (".npz", ".json") else stem
        stem.parent.mkdir(parents=True, exist_ok=True)
        npz, text = stem.with_name(stem.name + ".npz"), stem.with_name(stem.name + ".json")
        facts: dict[str, Any] = {}
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "eigenvectors":
                for key, leaf in jax.tree_util.tree_leaves_with_path(value):
                    arrays["eigenvectors" + jax.tree_util.keystr(key)] = np.asarray(leaf)
            elif field.name == "history":
                facts[field.name] = [entry._asdict() for entry in value]
            elif isinstance(value, np.ndarray):
                arrays[field.name] = value
                facts[field.name] = value.tolist()
            else:
                facts[field.name] = value._asdict() if hasattr(value, "_asdict") else value
        np.savez(npz, **arrays)  # type: ignore[arg-type]
        text.write_text(json.dumps(_without_nonfinite(facts), indent=1) + "\n")
        return npz, text


def _without_nonfinite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
