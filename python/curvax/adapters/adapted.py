"""A model from another framework, which is compared with its source."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from curvax.checks import check_flag, check_number
from curvax.filters import leaf_names
from curvax.operators.hessian import hessian
from curvax.operators.model import Model


class _Tolerances(NamedTuple):
    """Largest differences allowed, relative to the source's.

    Two correct programs differ by rounding alone, of some thousand operations in depth.

    Attributes:
        outputs: of outputs and loss.
        products: of gradients and products, in norm.
        differences: of products against central differences, in norm.
    """

    outputs: float
    products: float
    differences: float


# By the bits of the coarsest floating point type that a model computes in.
_TOLERANCES = {
    64: _Tolerances(1e-10, 1e-8, 1e-6),
    32: _Tolerances(1e-4, 1e-3, 3e-2),
    16: _Tolerances(5e-2, 0.3, 1.0),
}


class SourceValues(NamedTuple):
    """What a source computes of a batch."""

    outputs: Any
    loss: float
    gradient: Mapping[str, Any]


class Source(Protocol):
    """A model where it came from."""

    framework: str

    def evaluate(self, batch: Any) -> tuple[Any, float]:
        """The outputs, a pytree of NumPy arrays as `forward` returns them, and the loss."""
        ...

    def derivatives(self, batch: Any, vector: Mapping[str, Any]) -> "SourceDerivatives | None":
        """By the framework's own differentiation; None if it has none but JAX's."""
        ...


@dataclasses.dataclass(frozen=True)
class SourceDerivatives:
    """Leaves by name.

    Attributes:
        gradient: of the loss.
        product: of the Hessian with a vector.
        differences: computes the same product by central differences of the gradient.
    """

    gradient: Mapping[str, Any]
    product: Mapping[str, Any]
    differences: Callable[[], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, repr=False)
class Verification:
    """How far a model is from its source, on one batch.

    Attributes:
        outputs: the largest difference of an output, relative to the largest output.
        loss: the difference of the losses, relative to the source's.
        gradient: the norm of the difference of the gradients, relative to the source's; None if not
            asked for, or if the source has no differentiation but JAX's.
        hvp: the same of Hessian-vector products with a random vector; None if not asked for.
        reference: what the product was compared with.
        tolerances: the largest allowed of each, by the names above.
    """

    outputs: float
    loss: float
    gradient: float | None
    hvp: float | None
    reference: str | None
    tolerances: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether none is larger than allowed."""
        return not self.failures()

    def failures(self) -> list[str]:
        """What is larger than allowed, or NaN, in words."""
        found = []
        for name, allowed in self.tolerances.items():
            value = getattr(self, name)
            if value is not None and not value <= allowed:
                found.append(f"{name} by {value:.2e} (allowed {allowed:.0e})")
        return found

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        parts = [f"outputs {self.outputs:.1e}", f"loss {self.loss:.1e}"]
        if self.gradient is not None:
            parts.append(f"gradient {self.gradient:.1e}")
        if self.hvp is not None:
            parts.append(f"Hessian-vector product {self.hvp:.1e} against {self.reference}")
        return f"relative differences: {', '.join(parts)}"


class VerificationError(ValueError):
    """A model does not compute what its source computes."""


@dataclasses.dataclass
class _Example:
    """A batch to compare on; of a model made without one, the first that an operator gets."""

    batch: Any = None


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptedModel(Model):
    """A `Model` that knows its source, and how to convert the source's batches.

    It is compared with the source on the example that it was made with or, without one, on the
    first batch that an operator is made of.

    Attributes:
        source: the model where it came from.
        convert: turns a batch of the source's framework into a pytree of arrays.
        hint: what to look for where the comparison fails.
    """

    source: Source = dataclasses.field(kw_only=True)
    convert: Callable[[Any], Any] = dataclasses.field(kw_only=True)
    hint: str = dataclasses.field(default="", kw_only=True)
    _example: _Example = dataclasses.field(default_factory=_Example, kw_only=True)

    def prepare(self, batches: Any) -> Any:
        """Convert batches, and compare the model on the first if it has not been compared yet.

        Args:
            batches: one batch (a tensor, a tuple or a mapping), or a list, a loader or a generator
                of batches.
        """
        if isinstance(batches, (tuple, Mapping)) or hasattr(batches, "shape"):
            return self._compared(self.convert(batches))
        if isinstance(batches, list):
            return [self._compared(self.convert(batch)) for batch in batches]
        if isinstance(batches, Iterable):
            return self._stream(batches)
        return self._compared(self.convert(batches))

    def _stream(self, batches: Any) -> Iterator[Any]:
        for batch in batches:
            yield self._compared(self.convert(batch))

    def _compared(self, batch: Any) -> Any:
        if self._example.batch is None:
            self.verify(batch)
        return batch

    def verify(
        self, batch: Any = None, *, hvp: bool = False, tol: float | None = None, seed: int = 0
    ) -> Verification:
        """Compare the model with its source on one batch.

        Args:
            batch: in the source's or in JAX's arrays; None for the one it was compared on before.
            hvp: whether to compare the gradient and a Hessian-vector product too, with a random
                vector: for torch with its own double backward, for what runs on JAX with central
                differences of the gradient. Where central differences of torch's gradient
                agree with the product but not with torch's double backward, that is wrong (as
                torch 2.13's is of `weight_norm`); a warning says so.
            tol: the largest difference of gradients and products allowed, relative to the source's;
                None for 1e-3, 1e-8 if the whole model computes in float64, and 0.3 if a part of it
                computes in 16 bits; or, for central differences, three times the error that they
                measure, if that is more.
            seed: of the vector.

        Returns:
            The measured differences. Allowed for outputs and loss are 1e-4, 1e-10 if the whole
            model computes in float64, and 0.05 if a part of it computes in 16 bits.

        Raises:
            VerificationError: a difference is larger; the message has all of them.
            ValueError: no batch is known.
        """
        check_flag("hvp", hvp)
        batch = self._example.batch if batch is None else self.convert(batch)
        if batch is None:
            raise ValueError("verify needs a batch: this model was made without an example")
        outputs, loss = self._differences(batch)
        limits = _TOLERANCES[_coarsest_bits(self.forward, self.params, batch)]
        allowed = limits.outputs
        tolerances = {"outputs": allowed, "loss": allowed}
        derivatives = _Derivatives()
        if hvp and not max(outputs, loss) > allowed:
            given = None if tol is None else check_number("tol", tol, positive=True)
            limits = limits._replace(products=given or limits.products)
            derivatives = self._compare_derivatives(batch, limits, seed)
            tolerances |= {"gradient": derivatives.allowed, "hvp": derivatives.allowed}
        found = Verification(
            outputs, loss, derivatives.gradient, derivatives.hvp, derivatives.reference, tolerances
        )
        if not found.passed:
            raise VerificationError(
                f"the converted model differs from the {self.source.framework} model: "
                f"{', '.join(found.failures())}, relative to the source.{self.hint}"
            )
        self._example.batch = batch
        return found

    def _differences(self, batch: Any) -> tuple[float, float]:
        """Those of outputs and loss."""
        # The source first: of a batch that does not fit, its own words are the best.
        theirs, their_loss = self.source.evaluate(batch)[:2]
        outputs = jax.jit(self.forward)(self.params, batch)
        loss = self.loss(outputs, batch)
        loss = loss[0] if isinstance(loss, tuple) else loss
        ours, wanted = jax.tree.leaves(outputs), jax.tree.leaves(theirs)
        structure: Any = jax.tree.structure(outputs)
        wanted_structure = jax.tree.structure(theirs)
        shapes = [[np.shape(leaf) for leaf in leaves] for leaves in (ours, wanted)]
        if structure != wanted_structure or shapes[0] != shapes[1]:
            raise VerificationError(
                f"the converted model returns outputs of shapes {shapes[0]} ({structure}), the "
                f"{self.source.framework} model {shapes[1]} ({wanted_structure})"
            )
        differences = [_relative(a, b) for a, b in zip(ours, wanted, strict=True)]
        return max(differences), _relative(loss, their_loss)

    def _compare_derivatives(self, batch: Any, limits: _Tolerances, seed: int) -> "_Derivatives":
        allowed = limits.products
        parts = (self.objective, self.params, batch)
        op = hessian(*parts)
        flat = np.random.default_rng(seed).standard_normal(op.shape[0]).astype(op.dtype)
        vector = op.unravel(jnp.asarray(flat))
        product = op.ravel(op @ vector)
        names = leaf_names(self.params)
        named = {n: np.asarray(x) for n, x in zip(names, jax.tree.leaves(vector), strict=True)}
        derivatives = self.source.derivatives(batch, named)
        if derivatives is None:
            differences: Any = hessian(*parts, method="finite_difference")
            allowed = max(allowed, 3 * float(differences.relative_error))
            distance = _distance(product, op.ravel(differences @ vector))
            return _Derivatives(None, distance, "central differences", allowed)
        own = op.ravel(self._gradient(batch))
        gradient = _distance(own, self._flat(derivatives.gradient))
        theirs = self._flat(derivatives.product)
        hvp, framework = _distance(product, theirs), self.source.framework
        if gradient <= allowed < hvp:
            judge = self._flat(derivatives.differences())
            ours, wrong = _distance(product, judge), _distance(theirs, judge)
            if ours <= limits.differences < wrong:
                warnings.warn(
                    f"{framework}'s own double backward is wrong for this model: it differs from "
                    f"central differences of {framework}'s own gradient by {wrong:.1e} relative, "
                    f"and the converted model's product by {ours:.1e}",
                    stacklevel=3,
                )
                reference = f"central differences of {framework}'s gradient"
                return _Derivatives(gradient, ours, reference, limits.differences)
        return _Derivatives(gradient, hvp, f"{framework}'s own double backward", allowed)

    def _gradient(self, batch: Any) -> Any:
        def mean(params: Any) -> Any:
            loss = self.objective(params, batch)
            return loss[0] if isinstance(loss, tuple) else loss

        return jax.jit(jax.grad(mean))(self.params)

    def _flat(self, leaves: Mapping[str, Any]) -> Any:
        return np.concatenate([np.ravel(leaves[name]) for name in leaf_names(self.params)])


@dataclasses.dataclass(frozen=True)
class _Derivatives:
    """The differences of `Verification`, and the largest allowed."""

    gradient: float | None = None
    hvp: float | None = None
    reference: str | None = None
    allowed: float = 0.0


def _coarsest_bits(function: Callable[..., Any], *args: Any) -> int:
    """The bits of the coarsest floating point numbers that a function computes."""
    found = {64}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                dtype = getattr(variable.aval, "dtype", None)
                if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                    found.add(max(16, jnp.finfo(dtype).bits))
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args))
    return min(found)


def _distance(ours: Any, theirs: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))


def _relative(ours: Any, theirs: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (ours, theirs))
    scale = np.abs(b).max(initial=0)
    return float(np.abs(a - b).max(initial=0) / (scale or 1.0))
