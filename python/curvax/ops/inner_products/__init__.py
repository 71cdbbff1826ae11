"""Inner products in float64 of stored rows, and those of which a certificate is made."""

from curvax.ops.inner_products.api import inner_products, residual_products, row_products
from curvax.ops.inner_products.arguments import Rows

__all__ = ["Rows", "inner_products", "residual_products", "row_products"]
