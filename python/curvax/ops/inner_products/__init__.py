"""Inner products in float64 of stored rows, and of linear combinations of them."""

from curvax.ops.inner_products.api import inner_products, row_products
from curvax.ops.inner_products.arguments import Rows

__all__ = ["Rows", "inner_products", "row_products"]
