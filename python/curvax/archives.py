"""Checks of `.npz` archives before NumPy allocates what their headers claim."""

import math
import zipfile
from typing import IO

import numpy as np


def check_headers(stream: IO[bytes]) -> None:
    """Refuse an archive with an array whose header claims more bytes than there are.

    Args:
        stream: of the archive; it is read from its start, and left somewhere.

    Raises:
        ValueError: as said, or a header that cannot be read.
        zipfile.BadZipFile: no archive.
    """
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                    continue  # which NumPy takes for bytes
                _check(file, member)


def _check(file: IO[bytes], member: zipfile.ZipInfo) -> None:
    version = tuple(file.read(2))
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"{member.filename} has a header of the unknown version {version}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        return  # which NumPy refuses
    claimed, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if claimed != held or min(shape, default=0) < 0:
        raise ValueError(
            f"the header of {member.filename} claims {claimed} bytes, of an array of shape {shape} "
            f"and dtype {dtype}, where there are {held}"
        )
