"""Softmax cross entropy at the level of logits: loss, gradient and Hessian products."""

from curvax.ops.softmax_ce.api import softmax_ce_hvp, softmax_ce_triple

__all__ = ["softmax_ce_hvp", "softmax_ce_triple"]
