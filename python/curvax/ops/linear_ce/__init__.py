"""Cross entropy through a linear head, without an array of logits."""

from curvax.ops.linear_ce.chunks import LinearSpec, linear_ce_draw, linear_ce_total

__all__ = ["LinearSpec", "linear_ce_draw", "linear_ce_total"]
