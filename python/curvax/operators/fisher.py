"""Fisher matrices, by products with an exact Jacobian and its transpose."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp

from curvax.checks import check_count, check_seed, seed_word, shown
from curvax.filters import Filter
from curvax.losses.objects import FisherKind, check_kind
from curvax.operators.assembly import CurvatureOptions, assemble
from curvax.operators.batches import Microbatches
from curvax.operators.curvature import Curvature
from curvax.operators.fisher_map import FisherMap
from curvax.operators.jacobian import check_callables
from curvax.operators.model import Model, accepts_model
from curvax.operators.products import OuterProducts
from curvax.options import takes_options
from curvax.typing import Batch, Batches, LossValue, Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fisher(Curvature):
    """A Fisher matrix of the weighted mean loss over all batches, at fixed parameters.

    Attributes:
        kind: `"empirical"`, `"exact"` or `"mc"`.
        num_samples: for `"mc"`, the labels drawn for each of the data's, else None.
        seed: for `"mc"`, that of the draws, else None.
    """

    kind: str = dataclasses.field(default="", metadata={"static": True})
    num_samples: int | None = dataclasses.field(default=None, metadata={"static": True})
    seed: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        kept = ", gradients kept" if self.gradients_kept else ""
        return f"{super().__repr__().removesuffix(')')}{kept})"

    @property
    def gradients_kept(self) -> bool:
        """Whether products are passes over gradients of the samples, kept in `residual_bytes`."""
        return all(isinstance(stack.product, OuterProducts) for stack in self.stacks)

    @property
    def rank_bound(self) -> int:
        """The number of gradients that are kept, where they are; else n."""
        if not self.gradients_kept:
            return super().rank_bound
        firsts = [stack.product.residuals[0] for stack in self.stacks]
        return min(sum(x.size // self.space.sizes[0] for x in firsts), super().rank_bound)


class FisherOptions(CurvatureOptions, total=False):
    """Options of `fisher`."""

    kind: FisherKind
    num_samples: int
    seed: int | None


@overload
def fisher(model: Model, /, batches: Batches, **options: Unpack[FisherOptions]) -> Fisher: ...
@overload
def fisher(
    forward: Callable[[Params, Batch], PyTree],
    loss: Callable[[PyTree, Batch], LossValue],
    params: Params,
    batches: Batches,
    **options: Unpack[FisherOptions],
) -> Fisher: ...
@accepts_model(lambda model: (model.forward, model.loss, model.params))
@takes_options()
def fisher(
    forward: Callable[[Params, Batch], PyTree] | Model,
    loss: Callable[[PyTree, Batch], LossValue],
    params: Params,
    batches: Batches,
    *,
    kind: FisherKind = "empirical",
    num_samples: int = 1,
    seed: int | None = None,
    microbatch_size: Microbatches = None,
    num_batches: int | None = None,
    where: Filter | None = None,
    linearize: bool | Literal["auto"] = "auto",
) -> Fisher:
    """A Fisher matrix `Jᵀ F J` of a model and a loss, as an operator.

    `J` is the exact Jacobian of the outputs in the parameters, and `F` a matrix on the outputs. A
    *sample* is one element of the batch's leading axis; it has one label or, as a sequence has,
    several. With W the sum of all weights (Kunstner et al. 2019, "Limitations of the empirical
    Fisher approximation", for the first two):

    - `"empirical"`: `F = (1/W) Σ_i s_i s_iᵀ` with `s_i` the gradient in the outputs of sample i's
      *total* loss, its mean times its weight. For one label per sample and equal weights, that is
      the mean of the outer products of the samples' gradients. For sequences it is the gradient of
      the sequence's summed loss, and the matrix is per label: where the labels are the model's
      own, its expectation is the exact Fisher matrix.
    - `"exact"`: the expectation over labels drawn from the model, in closed form. For the softmax
      cross entropy it is the Gauss-Newton matrix of the loss without `z_loss`; for the mean squared
      error, the likelihood of a normal variable of variance 1/2, it is the Gauss-Newton matrix.
    - `"mc"`: as `"empirical"`, with `num_samples` sets of labels drawn from the model in place of
      the data's, without `z_loss` and `label_smoothing`. An unbiased estimate of `"exact"`. The
      labels are a function of the seed and the sample's place in the data, and so are the same in
      every product, whatever the microbatches.

    The classes in `curvax.losses` weigh by `sqrt(w_t)` each label's gradient in `s_i`, so that
    labels' weights count once. In the totals of a loss of one's own they count twice: return the
    weight of the labels, as their number, rather than that of importance.

    All are positive semidefinite. A product costs as much as one of `ggn`, and holds a
    microbatch's outputs and activations, and vectors. There is a shorter way where the samples'
    gradients, for `"mc"` one of each draw, together take at most twice the memory of the
    activations, as for long sequences, and fit: the operator keeps them in place of those. Products
    then cost two passes over the gradients, and none through the model; see `gradients_kept`.

    That takes samples that do not mix: an output depends on its own sample alone, in the traced
    model as it is, with its masks and constants. Where samples mix, as in the statistics of a
    batch, activations are kept. So they are where the operator cannot know, as behind a kernel or a
    `fisher_product` of one's own: the logger `curvax` then names the reason, once, at level INFO.
    With `microbatch_size=1` there is nothing to know, but a sample's gradient is that of a batch of
    one sample.

    Of a `Model`: `fisher(model, batches, ...)`, with the same options.

    Args:
        forward: as for `ggn`.
        loss: as for `ggn`. `"empirical"` takes any: without the method `fisher_product` (see
            `curvax.losses.Loss`) JAX differentiates it on one sample at a time, as
            `loss(outputs[i:i+1], batch[i:i+1])`; all arrays of the outputs and of the batch but
            scalars must then have the samples on their leading axis. A plain mean counts as one
            label per sample. `"exact"` needs `fisher_product`, `"mc"` that or `sample`.
        params: as for `hessian`.
        batches: as for `hessian`; for `"mc"` all arrays of a batch but scalars must have the
            samples on their leading axis.
        kind: the matrix.
        num_samples: for `"mc"`, how many labels to draw for each of the data's; the cost grows with
            it in the loss, not in the model.
        seed: for `"mc"`, that of the draws; None draws one. See the operator's `seed`.
        microbatch_size: as for `hessian`.
        num_batches: as for `hessian`.
        where: as for `hessian`.
        linearize: as for `hessian`.

    Returns:
        The operator.

    Raises:
        TypeError: as for `ggn`, a loss that does not have what `kind` needs, or `num_samples` or
            `seed` is not an integer.
        ValueError: as for `hessian`, an unknown kind, `num_samples` below 1, a negative `seed`,
            either of them for another kind than `"mc"`, or arrays without the axis of samples.
        FloatingPointError: the loss is not finite.
    """
    forward, loss = check_callables(forward, loss)
    check_kind(kind)
    draws, seed = _check_draws(kind, num_samples, seed)
    # An array: another seed is no other program.
    word = None if seed is None else jnp.asarray(seed_word(seed))
    make_map = functools.partial(
        FisherMap, forward=forward, loss=loss, kind=kind, draws=draws, seed=word
    )
    _check_loss(loss, kind)
    op = assemble(
        Fisher,
        make_map,
        params,
        batches,
        microbatch_size=microbatch_size,
        num_batches=num_batches,
        where=where,
        linearize=linearize,
        numbered=kind == "mc",
    )
    return dataclasses.replace(op, kind=kind, num_samples=draws, seed=seed)


def _check_draws(kind: str, num_samples: int, seed: object) -> tuple[int | None, int | None]:
    for name, value, low in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if value is None and name == "seed":
            continue
        check_count(name, value, low)
        if kind != "mc" and (name == "seed" or value != 1):
            raise ValueError(
                f"{name} is for kind='mc' only, got {shown(value)} with kind={shown(kind)}"
            )
    if kind != "mc":
        return None, None
    return int(num_samples), check_seed(seed)


def _check_loss(loss: object, kind: str) -> None:
    needed = {"empirical": (), "exact": ("fisher_product",), "mc": ("fisher_product", "sample")}
    if needed[kind] and not any(hasattr(loss, name) for name in needed[kind]):
        raise TypeError(
            f"kind={kind!r} needs a loss with a method {' or '.join(needed[kind])}: one of "
            "losses.SoftmaxCrossEntropy, losses.LinearCrossEntropy, losses.MeanSquaredError, or "
            f"see losses.Loss; got {shown(loss)}. kind='empirical' takes any loss"
        )
