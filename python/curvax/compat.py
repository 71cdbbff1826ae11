"""The classes of the post "Hessian analysis with JAX", with the same arguments and returns.

A program written for them runs with its imports changed. What differs: the eigenvalues are
certified by `curvax.eigsh` (a warning says so where they did not converge), and the seed is fixed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.flatten_util import ravel_pytree

from curvax.arrays import to_array
from curvax.checks import is_integer, shown
from curvax.krylov.eigsh import eigsh
from curvax.operators.hessian import hessian

MAX_FACTOR = 5000
"""The most parameters whose Hessian is factored for `sigma`: 0.6 GB in float64, and minutes."""


@dataclasses.dataclass
class EigshArgs:
    """Arguments of the solve, named as those of `scipy.sparse.linalg.eigsh`.

    Attributes:
        k: how many eigenvalues.
        sigma: None, or a number: the eigenvalues are then those for which `which` holds of
            `1 / (eigenvalue - sigma)`; with `"LM"` the nearest to `sigma`.
        which: `"LM"` largest magnitude, `"LA"` largest, `"SA"` smallest, `"BE"` both ends, and,
            with `sigma` or as few parameters as `sigma` takes, `"SM"` smallest magnitude.
        v0: `(n,)`, a starting vector, or None for a random one of a fixed seed.
        tol: of the residuals, relative to the largest absolute eigenvalue.
        return_eigenvectors: whether to return the vectors.
    """

    k: int
    sigma: float | None = None
    which: str = "LM"
    v0: Any = None
    tol: float = 0.001
    return_eigenvectors: bool = True


class HessianAnalyzer:
    """The Hessian of a loss of a flat vector of parameters.

    Attributes:
        params: a pytree of numbers and arrays.
        params_flat: `(n,)`, in the order of `jax.flatten_util.ravel_pytree`.
        unravel_func: from `params_flat` to the structure of `params`.
        X_train: inputs; kept for the caller.
        Y_train: targets; kept for the caller.
        forward: `forward(params, x)`; kept for the caller.
        loss: `loss(params_flat)`, a scalar.
        dtype: of the Hessian and of what is returned.
    """

    def __init__(
        self,
        params: Any,
        X_train: Any,
        Y_train: Any,
        forward: Callable[[Any, Any], Any],
        loss: Callable[[Any], Any],
        dtype: Any = jnp.float32,
    ) -> None:
        self.params = params
        flat, unravel = ravel_pytree(params)
        self.dtype = np.dtype(dtype)
        if self.dtype == np.float64 and jnp.asarray(0.0).dtype != np.float64:
            raise ValueError(
                "dtype float64 needs JAX's 64-bit mode: set "
                "jax.config.update('jax_enable_x64', True) first"
            )
        self.params_flat, self.unravel_func = flat.astype(self.dtype), unravel
        self.X_train = X_train
        self.Y_train = Y_train
        self.forward = forward
        self.loss = loss
        # The loss holds its data; the operator takes them out of it, as arguments.
        self._operator = hessian(lambda flat, _: loss(flat), self.params_flat, jnp.zeros(()))

    def get_spectrum(self, args: EigshArgs) -> tuple[Any, Any]:
        """Eigenvalues and eigenvectors.

        Returns:
            The values `(k,)`, ascending, and the vectors `(n, k)` or None, as NumPy arrays.

        Raises:
            TypeError: as for `curvax.eigsh`.
            ValueError: as for `curvax.eigsh`; or `sigma`, or `which="SM"`, with too many
                parameters to factor the Hessian.
        """
        if args.which not in ("LM", "SM", "LA", "SA", "BE"):
            raise ValueError(f"which must be one of LM, SM, LA, SA, BE, got {shown(args.which)}")
        if args.sigma is not None or args.which == "SM":
            return self._by_factoring(args)
        which: Any = args.which
        result = eigsh(
            self._operator,
            args.k,
            which=which,
            tol=args.tol,
            v0=None if args.v0 is None else to_array(args.v0, "v0", self.dtype),
            seed=0,
            return_eigenvectors=args.return_eigenvectors,
        )
        values = np.asarray(result.eigenvalues[::-1], self.dtype)
        if not args.return_eigenvectors:
            return values, None
        return values, np.asarray(result.eigenvectors)[::-1].T

    def _by_factoring(self, args: EigshArgs) -> tuple[Any, Any]:
        """Pairs of the matrix `(H - sigma)^-1`, from the spectral factorisation of `H`.

        It has every copy of a multiple eigenvalue, as networks have many near 0, where Lanczos on
        a triangular factorisation finds one (R. Grimes, J. Lewis and H. Simon, "A shifted block
        Lanczos algorithm", SIAM J. Matrix Anal. Appl. 15 (1994), section 1).
        """
        n, k = len(self.params_flat), args.k
        if n > MAX_FACTOR:
            raise ValueError(
                f"sigma={args.sigma} with which={args.which!r} asks for interior eigenvalues, for "
                f"which the Hessian is factored: {n} parameters are more than the {MAX_FACTOR} for "
                "which that is done. Where the bulk of the spectrum lies is told by "
                "curvax.spectral_density(curvax.hessian(loss, params, batches))"
            )
        if not is_integer(k) or not 1 <= k <= n:
            raise ValueError(f"k must be an integer from 1 to {n}, got {shown(k)}")
        values, vectors = scipy.linalg.eigh(self._dense())
        chosen = np.sort(_order(values, args)[:k])
        kept = vectors[:, chosen].astype(self.dtype) if args.return_eigenvectors else None
        return values[chosen].astype(self.dtype), kept

    def _dense(self) -> Any:
        """The Hessian, in float64, by products with the unit vectors."""
        n, block = len(self.params_flat), 64
        multiply = jax.jit(lambda op, block: op.matmat(block))
        rows = [
            np.asarray(multiply(self._operator, jnp.eye(min(block, n - i), n, i, self.dtype)))
            for i in range(0, n, block)
        ]
        matrix = np.concatenate(rows).astype(np.float64)
        return (matrix + matrix.T) / 2


def _order(values: Any, args: EigshArgs) -> Any:
    """The eigenvalues' positions, the wanted first."""
    if args.sigma is None:
        return np.argsort(np.abs(values), kind="stable")
    if not np.isfinite(args.sigma):
        raise ValueError(f"sigma must be a finite number or None, got {shown(args.sigma)}")
    with np.errstate(divide="ignore"):
        inverse = 1 / (values - args.sigma)
    ends = np.argsort(-inverse, kind="stable")
    orders = {
        "LM": np.argsort(-np.abs(inverse), kind="stable"),
        "SM": np.argsort(np.abs(inverse), kind="stable"),
        "LA": ends,
        "SA": ends[::-1],
        # The highest, the lowest, the next highest, and so on.
        "BE": np.stack([ends, ends[::-1]], axis=1).reshape(-1)[: len(ends)],
    }
    return orders[args.which]


def extract_pytorch_model_parameters(pytorch_model: Any) -> dict[str, Any]:
    """The parameters of a torch module by name, as NumPy arrays with all their digits."""
    return {
        name: np.array(parameter.detach().cpu().numpy())
        for name, parameter in pytorch_model.named_parameters()
    }


def generate_MSE_loss_func(
    params: Any, X: Any, Y: Any, forward_copy: Callable[[Any, Any], Any]
) -> Callable[[Any], Array]:
    """The mean over samples of the squared norm of `forward_copy(params, X[i]) - Y[i]`.

    Args:
        params: a pytree of numbers and arrays; its structure counts.
        X: inputs, a sample per entry of the leading axis.
        Y: targets, likewise.
        forward_copy: `forward_copy(params, x)`, on one sample.

    Returns:
        `loss(params_flat)`, twice differentiable also where a residual is zero.

    Raises:
        ValueError: inputs and targets of different lengths.
    """
    unravel = ravel_pytree(params)[1]
    inputs, targets = to_array(X, "X"), to_array(Y, "Y")
    if len(inputs) != len(targets):
        raise ValueError(f"X and Y must have one length, got {len(inputs)} and {len(targets)}")

    def loss(params_flat: Any) -> Array:
        structured = unravel(params_flat)

        def square(x: Any, y: Any) -> Array:
            # Not the squared norm, whose derivative is NaN at 0.
            return jnp.sum((forward_copy(structured, x) - y) ** 2)

        return jnp.mean(jax.vmap(square)(inputs, targets))

    return loss
