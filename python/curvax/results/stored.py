"""Results as files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from curvax import drawing
from curvax.archives import check_headers
from curvax.options import takes_options
from curvax.results.encoding import Arrays, decode, encode, fields_of, record
from curvax.results.formats import FORMAT, upgraded
from curvax.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The member of the npz that holds the JSON text.
_FACTS = "facts"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Stored:
    """A result that can be written to files, read back, drawn and read as a table."""

    # Fields too large for the JSON file.
    _large: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        record(cls)

    def __repr__(self) -> str:
        """The table: what the cell of a notebook shows, in place of arrays."""
        return str(self)

    @takes_options()
    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write `path.npz`, from which `load` restores the result, and `path.json`.

        The JSON is for people and scripts: `class` and all fields but the largest (eigenvectors,
        diagonals, densities, bases); NaN and infinities are null in it. Nothing reads it back.
        Both files appear at once when they are complete; until then, old ones stay as they are.

        Args:
            path: the files' common stem; a suffix `.npz` or `.json` is taken off.

        Returns:
            The paths of the two files.

        Raises:
            TypeError: a field holds what no file can, such as an array of Python objects.
        """
        stem = Path(path)
        stem = stem.with_suffix("") if stem.suffix in (".npz", ".json") else stem
        stem.parent.mkdir(parents=True, exist_ok=True)
        npz, text = stem.with_name(stem.name + ".npz"), stem.with_name(stem.name + ".json")
        arrays: Arrays = {}
        written = {"format": FORMAT, "version": __version__}
        facts = written | {"result": encode(self, "", arrays)}
        arrays[_FACTS] = np.array(json.dumps(facts))
        with _replacing(text) as text_stream, _replacing(npz) as npz_stream:
            np.savez(npz_stream, **arrays)  # type: ignore[arg-type]
            text_stream.write((json.dumps(_readable(self), indent=1) + "\n").encode())
        return npz, text

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Restore a result from the `.npz` file that `save` wrote.

        Numbers, strings, tuples and None are as they were, NaN and infinities too; arrays are
        NumPy arrays of the same dtype and bits. Of pytrees, nested dicts, lists, tuples and None
        are restored; any other node (a NamedTuple, a registered class) comes back as a dict of
        its arrays by name, the name being the path joined by dots.

        Args:
            path: what `save` was given, or the path of the `.npz` file.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: the file holds a result of another class.
            ValueError: the file is damaged, was not written by `save`, or by a newer version.
        """
        result = load(path)
        if not isinstance(result, cls):
            name = type(result).__name__
            raise TypeError(
                f"{_source(path)} holds a {name}, expected a {cls.__name__}: use {name}.load or "
                "curvax.load"
            )
        return result

    @takes_options()
    def plot(self, path: str | Path | None = None, title: str | None = None) -> Figure:
        """Draw the result with matplotlib; `curvax.plot` says what each picture shows.

        Args:
            path: where to write the picture; the suffix (`.png`, `.pdf`, `.svg`) picks the format.
            title: text above the picture.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return drawing.draw(self, path, title)


@takes_options()
def load(path: str | Path) -> Stored:
    """Restore a result of whichever class the file holds; see `Stored.load`.

    Args:
        path: what `save` was given, or the path of the `.npz` file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, was not written by `save`, or by a newer version.
    """
    file = _source(path)
    with file.open("rb") as stream:
        facts, arrays = _read(file, stream)
    if facts["format"] > FORMAT:
        raise ValueError(
            f"{file} was written by curvax {facts.get('version', '(unknown)')} in format "
            f"{facts['format']}, but this is curvax {__version__}, which reads formats up "
            f"to {FORMAT}: pip install --upgrade curvax, or compute the result again"
        )
    with _damage_reported(file):
        result = decode(upgraded(facts["result"], facts["format"]), arrays)
        if not isinstance(result, Stored):
            raise ValueError(f"it holds a {type(result).__name__}, which is no result")
    return result


def _source(path: str | Path) -> Path:
    given = Path(path)
    if given.suffix == ".json":
        raise ValueError(
            f"{given} is the copy for people and scripts, which lacks the large arrays: load "
            f"{given.with_suffix('.npz')}"
        )
    file = given if given.suffix == ".npz" else given.with_name(given.name + ".npz")
    if not file.exists():
        renamed = f"; {given} exists, but a result's suffix is .npz" if given.exists() else ""
        raise FileNotFoundError(
            f"no result at {file}: pass the path that save was given, or its .npz file{renamed}"
        )
    return file


def _read(file: Path, stream: IO[bytes]) -> tuple[dict[str, Any], Arrays]:
    with _damage_reported(file):
        # Reading an array whose header is damaged can end before its checksum is compared.
        with zipfile.ZipFile(stream) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        check_headers(stream)
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as stored:
            if _FACTS not in stored.files:
                raise ValueError("it has no facts")
            arrays = {name: stored[name] for name in stored.files}
        facts = json.loads(str(arrays.pop(_FACTS)))
        known = isinstance(facts, dict) and isinstance(facts.get("format"), int)
        if not known or facts["format"] < 1:
            raise ValueError("its facts are not a result's")
    return facts, arrays


@contextlib.contextmanager
def _damage_reported(file: Path) -> Iterator[None]:
    """Name the file in whatever a damaged or foreign one makes the readers raise."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{file} is damaged, or was not written by a result's save ({error}): copy it again "
            "from where it was saved, or compute and save the result again"
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a new file in the same folder, which takes the place of `path` at the end."""
    temporary = path.with_name(f".curvax-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _readable(value: object) -> Any:
    """Plain JSON, for people: records as objects, arrays as lists, nonfinite numbers as null."""
    if isinstance(value, Stored):
        kept = {k: v for k, v in fields_of(value).items() if k not in value._large}
        return {"class": type(value).__name__} | _readable(kept)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _readable(entry) for key, entry in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_readable(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
