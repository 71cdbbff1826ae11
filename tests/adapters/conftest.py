"""JAX's default promotion, on which other libraries rely, and one thread for torch."""

import sys

import jax
import pytest


@pytest.fixture(autouse=True)
def default_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Beside JAX's threads, torch's make both ten times slower."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
