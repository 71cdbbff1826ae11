"""Reading Keras's files."""

from pathlib import Path

import keras


def load(path: Path, compiled: bool) -> keras.Model:
    """The model of a file; no code of it is run.

    Args:
        path: of the file.
        compiled: whether the loss that it was compiled with is wanted.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no model of Keras.
    """
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise ValueError(
            f"a Keras model must be a .keras or .h5 file, got {str(path)!r}; for weights alone see "
            "adapters.files.load"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    begins = {".keras": b"PK"}.get(path.suffix, b"\x89HDF")
    with path.open("rb") as file:
        if not file.read(4).startswith(begins):
            kind = "Keras archive" if path.suffix == ".keras" else "HDF5 file"
            raise ValueError(f"{str(path)!r} is not the {kind} that its name says")
    try:
        return keras.saving.load_model(path, safe_mode=True, compile=compiled)
    except Exception as error:
        if compiled:  # Keras cannot read its own losses from every HDF5 file
            return load(path, compiled=False)
        raise ValueError(
            f"{str(path)!r} cannot be loaded as a Keras model ({type(error).__name__}: {error})"
        ) from error
