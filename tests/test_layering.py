"""The one direction of dependency, over Python imports and C++ includes."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "curvax"

# A module imports only from strictly lower layers, or from its own.
LAYERS = (
    # Leaf helpers, which import nothing of curvax.
    ("archives", "checks", "typing", "warnings"),
    ("jax_internals",),
    ("program", "jaxpr_keys"),
    ("jaxprs", "arrays", "columns", "filters", "interrupt"),
    ("results",),
    ("_native",),
    ("memory", "ops"),
    ("second_order",),
    ("losses",),
    ("operators",),
    ("device",),
    ("krylov",),
    ("estimators",),
    ("plot", "models"),
    ("adapters", "compat"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The package's own __init__ gathers the public names.
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names of curvax that a module imports, at any depth of its code."""
    tree = ast.parse(path.read_text(), str(path))
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name == "curvax" or name.startswith("curvax.")}


def layer(name: str) -> str:
    return (name.split(".") + [""])[1]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_python_imports_point_downwards(path):
    own = layer(name_of(path))
    assert own in RANK, f"{name_of(path)} belongs to no layer: add it to LAYERS"
    for name in imports(path):
        other = layer(name)
        if other not in RANK:  # a public name of the package: only the outermost layers use it
            assert own in ("cli", "compat", "adapters", "models"), f"{name_of(path)} imports {name}"
            continue
        assert other == own or RANK[other] < RANK[own], f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("reference.py")), ids=name_of)
def test_references_do_without_the_kernels(path):
    assert not [name for name in imports(path) if layer(name) == "_native"]


def test_only_native_imports_the_compiled_module():
    for path in MODULES:
        if "_native" not in path.parts:
            assert not re.search(r"_native\._(cpu|cuda)", path.read_text()), path


PRIVATE = re.compile(r"jax\.(_src|extend|interpreters)")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_one_file_knows_the_internals_of_jax(path):
    if path.name == "jax_internals.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(map(PRIVATE.match, names)), f"{path}: import it from jax_internals"
        # Nor does another compare the name of a primitive with one that it writes itself.
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(ast.unparse(side).endswith("primitive.name") for side in sides)
            written = any(isinstance(n, ast.Constant) for side in sides for n in ast.walk(side))
            assert not (named and written), f"{path}:{node.lineno}"


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s+[<\"]([^>\"]+)[>\"]", path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[pathlib.Path]:
    kinds = {".h", ".cc", ".cu", ".cuh"}
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in kinds)


def test_kernels_know_neither_xla_nor_python():
    paths = sources("kernels")
    assert paths
    for path in paths:
        for name in includes(path):
            assert not re.match(r"(xla/|nanobind|pybind11|Python\.h|csrc/)", name), (
                f"{path}: {name}"
            )


def test_levels_share_no_header_with_inline_functions():
    """Standard C++ headers would be merged across instruction levels by the linker."""
    allowed = {"cstddef", "cstdint", "immintrin.h"}
    for path in sources("kernels/cpu") + sources("kernels/common"):
        if path.name == "dispatch.cc":  # compiled once, for the base level
            continue
        for name in includes(path):
            ours = name.startswith(("cpu/", "common/", "curvax/"))
            assert ours or name in allowed, f"{path}: {name}"


def test_only_csrc_includes_xla_or_nanobind():
    for path in sources("tests"):
        assert not [n for n in includes(path) if re.match(r"(xla/|nanobind)", n)], path


@pytest.mark.parametrize("path", sources("kernels") + sources("csrc"), ids=lambda p: p.name)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400
