"""Parts of networks whose second derivatives are exact, and hold no array of tokens × tokens."""

from curvax.nn.attention import dot_product_attention

__all__ = ["dot_product_attention"]
