"""PyTorch modules as models of JAX, and torch functions as operators (the extra `torch`)."""

from curvax.adapters.frameworks import import_framework

import_framework("torch", "torch")

from curvax.adapters.torch.matvec import double_backward, from_matvec  # noqa: E402
from curvax.adapters.torch.module import from_module  # noqa: E402

__all__ = ["double_backward", "from_matvec", "from_module"]
