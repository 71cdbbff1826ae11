"""Batches of data as stacks of equal microbatches, so that one program serves each stack."""

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from curvax.arrays import to_array
from curvax.checks import check_integer, cut, shown
from curvax.filters import leaf_names
from curvax.operators.placement import check_not_typed_by_shards
from curvax.program import default_platform
from curvax.typing import Batch, Batches, PyTree, PyTreeDef
from curvax.warnings import warn

_log = logging.getLogger("curvax")

Microbatches: TypeAlias = int | Callable[[Batch], Iterable[Batch]] | None


# A rest becomes powers of it: of 2 a third fewer pieces than of 4, but twice as many to compile.
_RADIX = 4


class Numbered(NamedTuple):
    """A batch whose samples are numbered, whatever microbatches they are split into.

    Attributes:
        data: the batch.
        numbers: `(N,)` int32, each sample's place among those of all batches.
    """

    data: PyTree
    numbers: PyTree


def read_batches(batches: Batches, num_batches: int | None) -> list[Batch]:
    """The batches, as arrays of JAX.

    Args:
        batches: one batch (any pytree but a list), a list of batches, or an iterator of batches,
            which is read once.
        num_batches: how many batches are read, the first ones; None for all.

    Raises:
        TypeError: what is no array of numbers, a masked array, or a `num_batches` that is no
            integer.
        ValueError: no batch, an empty batch, an array whose type is sharded, numbers that JAX would
            narrow to others, or a `num_batches` below 1 or above the number of batches.
    """
    num_batches = check_integer("num_batches", num_batches, low=1)
    listed = list(itertools.islice(_each(batches), num_batches))
    if not listed:
        raise ValueError("batches must hold at least one batch, got an empty list or generator")
    if num_batches is not None and len(listed) < num_batches:
        raise ValueError(
            f"batches must hold the num_batches={num_batches} that are to be read, but end after "
            f"{len(listed)}: pass more batches, or a num_batches of at most {len(listed)}"
        )
    return [_as_arrays(batch, f"batch {i}") for i, batch in enumerate(listed)]


def _as_arrays(batch: Batch, what: str) -> PyTree:
    leaves, treedef = jax.tree.flatten(batch)
    if not leaves:
        raise ValueError(f"{what} has no arrays, got {shown(batch)}")
    places = [f"leaf {name!r} of {what}" if name else what for name in leaf_names(batch)]
    arrays = [to_array(leaf, place) for leaf, place in zip(leaves, places, strict=True)]
    check_not_typed_by_shards(jax.tree.unflatten(treedef, arrays), f"{what}, array")
    if leading_size(arrays) == 0:
        raise ValueError(f"{what} is empty: its leading axis has length 0")
    return jax.tree.unflatten(treedef, arrays)


def stack_batches(
    batches: Sequence[Batch], microbatch_size: Microbatches, numbered: bool
) -> list[tuple[Batch, list[int]]]:
    """Split batches into microbatches and stack those of equal shapes.

    Each shape is traced and compiled by itself. Batches of many lengths leave as many rests, which
    are cut into powers of `_RADIX` where these are far fewer.

    Args:
        batches: what `read_batches` returned.
        microbatch_size: the largest number of samples per microbatch; a function that returns the
            microbatches of a batch; None for whole batches.
        numbered: whether each microbatch becomes a `Numbered`.

    Returns:
        The stacks: batches whose leaves have one more leading axis, each with the positions, in
        the list of batches, that its entries came from.

    Raises:
        TypeError: `microbatch_size` is neither an integer nor a function of microbatches.
        ValueError: leading axes that differ within a batch (when it is to be split by size, or
            numbered), a function that returns no microbatch, or `microbatch_size` below 1.
    """
    if not callable(microbatch_size):
        microbatch_size = check_integer("microbatch_size", microbatch_size, low=1)
    groups: dict[Hashable, tuple[list[Batch], list[int]]] = {}
    samples = 0
    lengths = [leading_size(batch) or 0 for batch in batches]
    cut_rests = isinstance(microbatch_size, int) and _many_rests(lengths, microbatch_size)
    for position, batch in enumerate(batches):
        for piece in _split(batch, microbatch_size, position, cut_rests):
            if numbered:
                piece = Numbered(piece, _numbers(piece, position, samples))
                samples += len(piece.numbers)
            pieces, positions = groups.setdefault(_looks(piece), ([], []))
            pieces.append(piece)
            positions.append(position)
    if microbatch_size is None and _many_rests(lengths, longest := max(lengths) + 1):
        _log.info(
            "batches of %d shapes, each of which is compiled; if the loss of a batch is the mean "
            "of those of its parts, microbatch_size=%d needs few",
            len(groups),
            longest - 1,
        )
    return [(jax.tree.map(_stacked, *pieces), positions) for pieces, positions in groups.values()]


def _stacked(*leaves: Array | np.ndarray) -> Array:
    views = [_view(leaf) for leaf in leaves]
    if len(leaves) == 1 or not all(isinstance(view, np.ndarray) for view in views):
        return jnp.stack(leaves)
    return jax.device_put(np.stack(views))


def _view(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """An array in the host's memory as NumPy's, without a copy; another as it is.

    XLA compiles a program for each place that it cuts an array at, and for each number of arrays
    that it stacks, which takes longer than to compute with them.
    """
    if isinstance(leaf, np.ndarray) or isinstance(leaf, jax.core.Tracer):
        return leaf
    # One that is bound to a device stays there; a weak type is none of NumPy.
    plain = isinstance(leaf.dtype, np.dtype) and not (leaf.committed or leaf.weak_type)
    on_host = default_platform() == "cpu" and all(d.platform == "cpu" for d in leaf.devices())
    same = plain and leaf.dtype == jax.dtypes.canonicalize_dtype(leaf.dtype)
    return np.asarray(leaf) if same and on_host else leaf


def _looks(batch: Batch) -> tuple[PyTreeDef, Hashable]:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def match_stacks(
    stacks: Sequence[tuple[Batch, list[int]]], wanted: Sequence[Batch]
) -> list[tuple[Batch, list[int]]]:
    """The stacks in the order of others, which have the same structures and shapes.

    Raises:
        ValueError: they have not.
    """
    known = {_looks(stack): (stack, positions) for stack, positions in stacks}
    order = [_looks(stack) for stack in wanted]
    if set(known) != set(order):
        needed, got = (
            "; ".join(_described(stack) for stack in some)
            for some in (wanted, [stack for stack, _ in stacks])
        )
        raise ValueError(
            "batches must be as many, and of the structure and shapes, as those that the operator "
            f"was made of, so that nothing is compiled again: expected {needed}, got {got}. For "
            "others make the operator anew"
        )
    return [known[looks] for looks in order]


def _described(stack: object) -> str:
    leaves = jax.tree.leaves(stack)
    arrays = [f"{leaf.dtype.name}{list(leaf.shape[1:])}" for leaf in leaves]
    return f"{leaves[0].shape[0]} microbatches of {shown(arrays)} in {cut(str(_looks(stack)[0]))}"


def _numbers(batch: Batch, position: int, start: int) -> np.ndarray:
    if len(lengths := leading_sizes(batch)) != 1:
        raise ValueError(
            "to draw a label for each sample, all arrays of a batch must have one leading length, "
            f"that of the samples; batch {position} has {sorted(lengths)}"
        )
    return np.arange(start, start + lengths.pop(), dtype=np.int32)


def leading_size(batch: Batch) -> int | None:
    """The length of the leading axis of a batch's first array that has one; None if none has."""
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0]
    return int(sizes[0]) if sizes else None


def leading_sizes(batch: Batch) -> set[int]:
    """The lengths of the leading axes of a batch's arrays."""
    return {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0}


_LIST = (
    "batches is a list, which means several batches: the loss gets each of its arrays (of shapes "
    "{shapes}) by itself. If they make one batch, pass them as a tuple, (x, y)."
)


def add_hint(error: Exception, batches: Batches) -> None:
    """Add a note to what a loss raised if `batches` looks like a list in place of a tuple, or v.v.

    An array in a list may be a batch, and so may a tuple of tuples: only the loss can tell.
    """
    parts = batches if isinstance(batches, (list, tuple)) else []
    if isinstance(batches, list) and jax.tree_util.all_leaves(parts):
        error.add_note(_LIST.format(shapes=_shapes(batches)))
    elif isinstance(batches, tuple) and all(isinstance(part, tuple) for part in parts):
        error.add_note(
            "batches is a tuple, which means one batch: the loss gets it whole. If its "
            f"{len(parts)} tuples are batches, pass them as a list, [(x, y), ...]."
        )


def warn_of_pair(batches: Batches) -> None:
    """Warn of `[x, y]`, which a loss took, but which looks like the one batch `(x, y)`."""
    if not isinstance(batches, list) or len(batches) < 2:
        return
    if not jax.tree_util.all_leaves(batches):
        return
    lengths = {np.shape(part)[:1] for part in batches}
    kinds = {(np.shape(part)[1:], str(getattr(part, "dtype", ""))) for part in batches}
    if len(lengths) == 1 and lengths != {()} and (len(batches) == 2 or len(kinds) == len(batches)):
        warn(
            f"{_LIST.format(shapes=_shapes(batches))} If each is a batch, pass iter([...]), and "
            "this is not said.",
            UserWarning,
        )


def _shapes(parts: Sequence[Batch]) -> str:
    return ", ".join(str(np.shape(part)) for part in parts[:3])


class Kept:
    """The batches of an iterator, which several operators read."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = list(batches)

    def __iter__(self) -> Iterator[Batch]:
        """Each of them."""
        return iter(self._batches)


def for_several(batches: Batches) -> PyTree:
    """The batches, to be read more than once."""
    return Kept(batches) if isinstance(batches, Iterator) else batches


def _each(batches: Batches) -> Iterable[Batch]:
    if isinstance(batches, (list, Iterator)):
        return batches
    # A loader: iterable, and neither an array nor a container that JAX knows as a pytree.
    is_leaf = jax.tree_util.all_leaves([batches])
    if is_leaf and isinstance(batches, Iterable) and not hasattr(batches, "shape"):
        return batches
    return [batches]


def _many_rests(lengths: Iterable[int], size: int) -> bool:
    """Whether what microbatches of `size` leave of batches has many more lengths than pieces have.

    More pieces make products slower: they must save three quarters of the programs.
    """
    rests = {length % size for length in lengths} - {0}
    return 4 * len({piece for rest in rests for piece in _pieces(rest)}) <= len(rests)


def _pieces(rest: int) -> list[int]:
    """Powers of `_RADIX` that add up to it, the largest first."""
    powers = list(itertools.takewhile(lambda p: p <= rest, (_RADIX**i for i in itertools.count())))
    pieces = []
    for power in reversed(powers):
        count, rest = divmod(rest, power)
        pieces += [power] * count
    return pieces


def _split(batch: Batch, how: Microbatches, position: int, cut_rests: bool) -> Iterator[Batch]:
    """The microbatches of a batch; of a size, its rest in `_pieces` if `cut_rests`."""
    if callable(how):
        yield from _split_by(how, batch, position)
        return
    samples = leading_size(batch)
    if how is None or samples is None:
        yield batch
        return
    if len(lengths := leading_sizes(batch)) > 1:
        raise ValueError(
            "to split a batch by microbatch_size, all its arrays must have one leading length; "
            f"batch {position} has {sorted(lengths)}. Pass a function from a batch to its "
            "microbatches instead, microbatch_size=split"
        )
    whole, rest = divmod(samples, how)
    sizes = [how] * whole + (_pieces(rest) if cut_rests else [rest] * (rest > 0))
    views = jax.tree.map(_view, batch)
    for start, stop in itertools.pairwise(itertools.accumulate(sizes, initial=0)):
        yield jax.tree.map(
            lambda leaf, a=start, b=stop: leaf[a:b] if np.ndim(leaf) > 0 else leaf, views
        )


def _split_by(
    how: Callable[[Batch], Iterable[Batch]], batch: Batch, position: int
) -> Iterator[Batch]:
    pieces = how(batch)
    if not isinstance(pieces, (list, tuple, Iterator)):
        raise TypeError(
            "microbatch_size, a function, must return a list of microbatches or yield them, got "
            f"{shown(pieces)} for batch {position}"
        )
    count = 0
    for piece in pieces:
        yield _as_arrays(piece, f"microbatch {count} of batch {position}")
        count += 1
    if not count:
        raise ValueError(f"microbatch_size, a function, returned none for batch {position}")
