"""The sizes of the GPT-2-shaped models, which curvax and its peer solve alike."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model, of the batch, and what is asked for."""

    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    pairs: int
    steps: int  # of training
    basis_dtype: str | None = None
    max_basis: int | None = None


SMALL = Shape(12, 768, 12, 50304, 1024, 8, pairs=10, steps=30)
# By calculation 32 rows of 2.1 GB fit the 139 GiB of an H200, beside 45 GB of the product's.
LARGE = Shape(19, 2048, 16, 50304, 1024, 2, pairs=5, steps=10, basis_dtype="float16", max_basis=32)
SMOKE = Shape(2, 32, 2, 503, 16, 2, pairs=2, steps=5)
