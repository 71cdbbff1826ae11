"""Batches of data as stacks of equal microbatches, so that one program serves each stack."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.checks import check_integer
from curvax.operators.placement import check_not_typed_by_shards


class Numbered(NamedTuple):
    """A batch whose samples are numbered, whatever microbatches they are split into.

    Attributes:
        data: the batch.
        numbers: `(N,)` int32, each sample's place among those of all batches.
    """

    data: Any
    numbers: Any


def stack_batches(
    batches: Any,
    microbatch_size: int | None,
    num_batches: int | None,
    numbered: bool = False,
) -> tuple[list[Any], list[list[int]]]:
    """Split batches into microbatches and stack those of equal shapes.

    Args:
        batches: one batch (any pytree but a list), a list of batches, or an iterator of batches,
            which is read once.
        microbatch_size: the largest number of samples per microbatch; None for whole batches.
        num_batches: the most batches that are read; None for all.
        numbered: whether each batch becomes a `Numbered`.

    Returns:
        The stacks: batches whose leaves have one more leading axis; and for each stack the
        positions, in the list of batches, that its entries came from.

    Raises:
        TypeError: `microbatch_size` or `num_batches` is not an integer.
        ValueError: no batch, an empty batch, an array whose type is sharded, leading axes that
            differ within a batch (when microbatches or numbers are asked for), or
            `microbatch_size` or `num_batches` below 1.
    """
    microbatch_size = check_integer("microbatch_size", microbatch_size, low=1)
    num_batches = check_integer("num_batches", num_batches, low=1)
    listed = list(itertools.islice(_each(batches), num_batches))
    if not listed:
        raise ValueError("batches must hold at least one batch, got an empty list or generator")
    groups: dict[Any, tuple[list[Any], list[int]]] = {}
    samples = 0
    for position, batch in enumerate(listed):
        batch = jax.tree.map(jnp.asarray, batch)
        check_not_typed_by_shards(batch, f"batch {position}, array")
        if not jax.tree.leaves(batch):
            raise ValueError(f"batch {position} has no arrays, got {batch!r}")
        if numbered:
            batch = Numbered(batch, _numbers(batch, position, samples))
            samples += len(batch.numbers)
        for piece in _split(batch, microbatch_size, position):
            leaves, treedef = jax.tree.flatten(piece)
            key = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
            pieces, positions = groups.setdefault(key, ([], []))
            pieces.append(piece)
            positions.append(position)
    stacks = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces) for pieces, _ in groups.values()
    ]
    return stacks, [positions for _, positions in groups.values()]


def _numbers(batch: Any, position: int, start: int) -> np.ndarray[Any, Any]:
    if len(lengths := leading_sizes(batch)) != 1:
        raise ValueError(
            "to draw a label for each sample, all arrays of a batch must have one leading length, "
            f"that of the samples; batch {position} has {sorted(lengths)}"
        )
    return np.arange(start, start + lengths.pop(), dtype=np.int32)


def leading_size(batch: Any) -> int | None:
    """The length of the leading axis of a batch's first array that has one; None if none has."""
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0]
    return int(sizes[0]) if sizes else None


def leading_sizes(batch: Any) -> set[int]:
    """The lengths of the leading axes of a batch's arrays."""
    return {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0}


def add_hint(error: Exception, batches: Any) -> None:
    """Add a note to what a loss raised if `batches` looks like a list in place of a tuple, or v.v.

    An array in a list may be a batch, and so may a tuple of tuples: only the loss can tell.
    """
    parts = batches if isinstance(batches, (list, tuple)) else []
    if isinstance(batches, list) and jax.tree_util.all_leaves(parts):
        shapes = ", ".join(str(np.shape(part)) for part in parts[:3])
        error.add_note(
            "batches is a list, which means several batches: the loss gets each of its arrays (of "
            f"shapes {shapes}) by itself. If they make one batch, pass them as a tuple, (x, y)."
        )
    elif isinstance(batches, tuple) and all(isinstance(part, tuple) for part in parts):
        error.add_note(
            "batches is a tuple, which means one batch: the loss gets it whole. If its "
            f"{len(parts)} tuples are batches, pass them as a list, [(x, y), ...]."
        )


def _each(batches: Any) -> Iterable[Any]:
    if isinstance(batches, (list, Iterator)):
        return batches
    # A loader: iterable, and neither an array nor a container that JAX knows as a pytree.
    is_leaf = jax.tree_util.all_leaves([batches])
    if is_leaf and isinstance(batches, Iterable) and not hasattr(batches, "shape"):
        return batches
    return [batches]


def _split(batch: Any, size: int | None, position: int) -> Iterator[Any]:
    samples = leading_size(batch)
    if samples == 0:
        raise ValueError(f"batch {position} is empty: its leading axis has length 0")
    if size is None or samples is None:
        yield batch
        return
    if len(lengths := leading_sizes(batch)) > 1:
        raise ValueError(
            "to split a batch by microbatch_size, all its arrays must have one leading length; "
            f"batch {position} has {sorted(lengths)}"
        )
    for start, stop in itertools.pairwise([*range(0, samples, size), samples]):
        yield jax.tree.map(
            lambda leaf, a=start, b=stop: leaf[a:b] if np.ndim(leaf) > 0 else leaf, batch
        )
