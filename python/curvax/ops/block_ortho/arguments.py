"""What an orthonormalisation is given, checked: one value for the kernel and for the reference."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array


class Arguments(NamedTuple):
    """The arguments of `api.orthonormalize_block`.

    Attributes:
        basis: `(rows, columns)`, stored rows.
        block: `(b, n)`, in the type that is computed in.
        used: int32 scalar.
        seed: `(2,)` uint32.
        scale: factor of stored rows.
        lazy_below: the last update leaves the basis out below this deviation; 0 for never.
    """

    basis: Array
    block: Array
    used: Array
    seed: Array
    scale: float
    lazy_below: float
