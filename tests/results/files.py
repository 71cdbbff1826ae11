"""What tests of result files compare and change."""

import json

import jax
import numpy as np

from curvax.results.stored import Stored


def assert_same(restored, saved):
    """The same types, dtypes and bits; JAX's arrays come back as NumPy's."""
    if isinstance(saved, jax.Array):
        saved = np.asarray(saved)
    assert type(restored) is type(saved)
    if isinstance(saved, Stored):
        restored, saved = vars(restored), vars(saved)
    if isinstance(saved, dict):
        assert list(restored) == list(saved)
        assert [type(key) for key in restored] == [type(key) for key in saved]
        restored, saved = list(restored.values()), list(saved.values())
    if isinstance(saved, (list, tuple)):
        assert len(restored) == len(saved)
        for one, other in zip(restored, saved, strict=True):
            assert_same(one, other)
    elif isinstance(saved, (np.ndarray, np.generic)):
        assert restored.dtype == saved.dtype and restored.shape == saved.shape
        assert restored.tobytes() == saved.tobytes()
    else:
        assert repr(restored) == repr(saved)


def rewrite(npz, change):
    """Save the facts of a file anew, changed."""
    with np.load(npz) as stored:
        arrays = dict(stored)
    facts = json.loads(str(arrays["facts"]))
    change(facts)
    np.savez(npz, **(arrays | {"facts": np.array(json.dumps(facts))}))
