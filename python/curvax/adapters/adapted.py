"""A model from another framework, which is compared with its source."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from curvax.adapters.verification import (
    Comparison,
    Source,
    UndifferentiableError,
    Verification,
    VerificationError,
)
from curvax.checks import check_flag, check_number
from curvax.operators.model import Model
from curvax.typing import Batch, Batches, PyTree


@dataclasses.dataclass
class _Example:
    """A batch to compare on; of a model made without one, the first that an operator gets."""

    batch: Batch = None


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptedModel(Model):
    """A `Model` that knows its source, and how to convert the source's batches.

    It is compared with the source on the example that it was made with or, without one, on the
    first batch that an operator is made of.

    Attributes:
        source: the model where it came from.
        convert: turns a batch of the source's framework into a pytree of arrays.
        hint: what to look for where outputs differ.
        derivative_hint: what to do where they agree, and the loss or derivatives do not.
        admit: takes note of a batch of JAX arrays, or refuses it; before anything is computed.
    """

    source: Source = dataclasses.field(kw_only=True)
    convert: Callable[[Batch], PyTree] = dataclasses.field(kw_only=True)
    hint: str = dataclasses.field(default="", kw_only=True)
    derivative_hint: str = dataclasses.field(default="", kw_only=True)
    admit: Callable[[Batch], None] = dataclasses.field(default=lambda batch: None, kw_only=True)
    _example: _Example = dataclasses.field(default_factory=_Example, kw_only=True)

    def prepare(self, batches: Batches) -> PyTree:
        """Convert batches, and compare the model on the first if it has not been compared yet.

        Args:
            batches: one batch (a tensor, a tuple or a mapping), or a list, a loader or a generator
                of batches.
        """
        if isinstance(batches, (tuple, Mapping)) or hasattr(batches, "shape"):
            return self.compared(self.convert(batches))
        if isinstance(batches, list):
            return [self.compared(self.convert(batch)) for batch in batches]
        if isinstance(batches, Iterable):
            return self._stream(batches)
        return self.compared(self.convert(batches))

    def _stream(self, batches: Batches) -> Iterator[Batch]:
        for batch in batches:
            yield self.compared(self.convert(batch))

    def compared(self, batch: Batch) -> Batch:
        """A batch of JAX arrays; the first in which a label counts is compared on."""
        self.admit(batch)
        if self._example.batch is None:
            self._measured(batch, hvp=False, tol=None, seed=0)
        return batch

    def verify(
        self, batch: Batch = None, *, hvp: bool = False, tol: float | None = None, seed: int = 0
    ) -> Verification:
        """Compare the model with its source on one batch: outputs, loss and gradient.

        Args:
            batch: in the source's or in JAX's arrays; None for the one it was compared on before.
            hvp: whether to compare a Hessian-vector product too, with a random vector: for torch
                with its own double backward or, where it has none, with central differences of its
                gradient; for what runs on JAX with central differences of the gradient. Where
                central differences of torch's gradient agree with the product but not with torch's
                double backward, that is wrong (as torch 2.13's is of `weight_norm`); a warning
                says so.
            tol: the largest difference of gradients and products allowed, relative to the source's;
                None for 1e-3, 1e-8 if the whole model computes in float64, and 0.3 if a part of it
                computes in 16 bits; or, for central differences, three times the error that they
                measure, if that is more, and for gradients ten times what rounding errors of the
                parameters change.
            seed: of the vector.

        Returns:
            The measured differences. Allowed for outputs and loss are 1e-4, 1e-10 if the whole
            model computes in float64, and 0.05 if a part of it computes in 16 bits.

        Raises:
            VerificationError: a difference is larger; the message has all of them.
            TypeError: JAX has no second derivative of an operation.
            ValueError: no batch is known, or none of its labels counts.
        """
        check_flag("hvp", hvp)
        given = self._example.batch if batch is None else self.convert(batch)
        if given is None:
            raise ValueError("verify needs a batch: this model was made without an example")
        tol = None if tol is None else check_number("tol", tol, positive=True)
        self.admit(given)
        found = self._measured(given, hvp, tol, seed)
        if found is None:
            raise ValueError(
                "verify needs a batch with a label that counts: of this one all are ignored"
            )
        return found

    def _measured(
        self, batch: Batch, hvp: bool, tol: float | None, seed: int
    ) -> Verification | None:
        """The differences, of a batch in which something counts."""
        try:
            found = Comparison(self, self.source, batch, tol).measure(hvp, seed)
        except UndifferentiableError as error:
            raise TypeError(
                f"JAX cannot differentiate the converted model twice: {error}."
                f"{self.derivative_hint}"
            ) from error
        if found is None:
            return None
        if not found.passed:
            values = found.outputs > found.tolerances["outputs"]
            raise VerificationError(
                f"the converted model differs from the {self.source.framework} model: "
                f"{', '.join(found.failures())}, relative to the source."
                f"{self.hint if values else self.derivative_hint}"
            )
        self._example.batch = batch
        return found
