"""The one direction of dependency, over Python imports and C++ includes."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
from tests.package_imports import MODULES, PACKAGE, ROOT, circles, graph, imports, name_of

# A module imports only from strictly lower layers, or from its own.
LAYERS = (
    # The ground floor: nothing of these imports another.
    (
        "archives",
        "blas",
        "checks",
        "drawing",
        "heap",
        "lazy",
        "options",
        "typing",
        "version",
        "warnings",
    ),
    ("jax_internals",),
    ("program", "jaxpr_keys"),
    ("jaxprs", "arrays", "columns", "filters", "interrupt"),
    ("results",),
    ("_native",),
    ("memory", "ops"),
    ("second_order",),
    ("losses", "nn"),
    ("operators",),
    ("device",),
    ("krylov",),
    ("estimators",),
    ("models", "plot"),
    ("adapters", "compat"),
    # The package itself gathers the public names.
    ("curvax",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def layer(name: str) -> str:
    """The layer of a module: its name, or that of the subpackage it is in; the package's own."""
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("name", MODULES)
def test_python_imports_point_downwards(name):
    """Late imports do, imports by a string, and those for type checkers."""
    own = layer(name)
    assert own in RANK, f"{name} belongs to no layer: add it to LAYERS, and to CONTRIBUTING.md"
    for other in imports(MODULES[name]):
        assert layer(other) == own or RANK[layer(other)] < RANK[own], f"{name} imports {other}"


def test_no_module_imports_itself_on_a_way_round():
    """Late imports and imports by a string count; only those for type checkers are never run."""
    assert not circles(graph())


def test_the_reader_of_imports_sees_all_kinds(tmp_path, monkeypatch):
    source = """
from __future__ import annotations
import curvax.memory, os
from curvax import checks, eigsh
from curvax.results.eigen import EigenResult
from ..arrays import to_array
from . import base
if TYPE_CHECKING:
    from curvax import plot
else:
    from curvax import filters
def late():
    import curvax.columns
    importlib.import_module("curvax.models.gpt")
    importlib.import_module(f"curvax.cli.{name}")
TABLE = {"compat": "curvax.compat", "curvax": "curvax"}
text = f"curvax.adapters.{name} makes a model: see curvax.device"
"""
    (tmp_path / "new.py").write_text(source)
    monkeypatch.setattr("tests.package_imports.name_of", lambda path: "curvax.operators.new")
    found = imports(tmp_path / "new.py")
    expected = {"memory", "checks", "results.eigen", "arrays", "operators.base", "filters"}
    expected |= {"plot", "columns", "models.gpt", "compat"}
    assert {name for name in found if "curvax.cli" not in name} == {
        "curvax",
        *(f"curvax.{name}" for name in expected),
    }
    assert {"curvax.cli.app", "curvax.cli.display"} <= found
    assert found - imports(tmp_path / "new.py", for_types=False) == {"curvax.plot"}


def test_circles_are_told_from_chains():
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert circles(chain) == []
    assert circles(chain | {"c": {"a"}}) == [["a", "b", "c"]]
    assert circles(chain | {"d": {"e", "a"}, "e": {"d"}}) == [["d", "e"]]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("reference.py")), ids=name_of)
def test_references_do_without_the_kernels(path):
    assert not [name for name in imports(path) if layer(name) == "_native"]


def test_only_native_imports_the_compiled_module():
    for path in MODULES.values():
        if "_native" not in path.parts:
            assert not re.search(r"_native\._(cpu|cuda)", path.read_text()), path


PRIVATE = re.compile(r"jax\.(_src|extend|interpreters)")


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
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


def test_targets_share_no_header_with_inline_functions():
    """Standard C++ headers would be merged across targets by the linker."""
    allowed = {"cstddef", "cstdint", "immintrin.h"}
    for path in sources("kernels/cpu") + sources("kernels/common"):
        if path.name == "dispatch.cc":  # compiled once, for the base target
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


@pytest.mark.parametrize("name", MODULES)
def test_operations_are_used_by_their_face(name):
    """Outside `ops`, nothing knows the modules that an operation is made of."""
    for other in imports(MODULES[name]) if layer(name) != "ops" else ():
        inner = re.match(r"curvax\.ops\.(\w+)\.(\w+)", other)
        file = PACKAGE.joinpath("ops", *inner.groups()).with_suffix(".py") if inner else None
        assert file is None or not file.exists(), f"{name} imports {other}"
