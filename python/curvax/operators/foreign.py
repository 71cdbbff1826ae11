"""Models of other frameworks, known by their classes, since no framework is imported here."""

import jax

# The package and the name of a class, and the adapter of what derives from it.
_ADAPTERS = (
    ("transformers", "PreTrainedModel", "huggingface.causal_lm(module), or masked_lm, ..."),
    ("torch", "Module", "torch.from_module(module, loss=...)"),
    ("keras", "Model", "keras.from_model(module)"),
    ("flax.nnx", "Module", "flax.from_nnx(module, loss=...)"),
    ("flax.linen", "Module", "flax.from_linen(module, variables, loss=...)"),
    ("equinox", "Module", "equinox.from_module(module, loss=...)"),
)


def adapter_of(value: object) -> str | None:
    """The call that makes a model of a module of another framework; None for anything else."""
    kinds = [(kind.__module__ or "", kind.__name__) for kind in type(value).__mro__]
    for package, name, call in _ADAPTERS:
        for module, own in kinds:
            if own == name and f"{module}.".startswith(f"{package}."):
                return f"curvax.adapters.{call}"
    return None


def is_pytree(value: object) -> bool:
    """Whether JAX takes a module of that framework itself, as parameters or as a function."""
    known = any(kind.__module__.startswith("equinox.") for kind in type(value).__mro__)
    return known or not jax.tree_util.all_leaves([value])


def refuse(function: str, value: object, adapter: str) -> TypeError:
    """The error that names the adapter of a module given to `function`."""
    return TypeError(
        f"{function} takes functions of JAX, or a curvax.Model, got a {type(value).__module__}."
        f"{type(value).__qualname__}: make a model of it first, model = {adapter}, and call "
        f"{function}(model, batches)"
    )
