"""The public names: listed once, resolved, documented; and one vocabulary of all results."""

import ast
import builtins
import dataclasses
import importlib
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from tests.results.fake_results import odd_results

import curvax as cx
from curvax import losses, nn, results

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "curvax"
PUBLIC = {name: getattr(cx, name) for name in cx.__all__}
PUBLIC |= {f"adapters.{name}": getattr(cx.adapters, name) for name in cx.adapters.__all__[:3]}
PUBLIC |= {f"losses.{name}": getattr(losses, name) for name in losses.__all__}
PUBLIC |= {f"nn.{name}": getattr(nn, name) for name in nn.__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
ERRORS = [name for name in CLASSES if issubclass(CLASSES[name], BaseException)]
RESULTS = [name for name in results.__all__ if inspect.isclass(getattr(results, name))]

# Signals within the package: whoever raises them, no caller of a public function sees them.
SIGNALS = {"MixedError", "OutOfRange", "UndifferentiableError", "UnfollowedError"}


def for_type_checkers(path):
    """The names that a package imports for type checkers, and the modules they come from."""
    (block,) = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} would not be re-exported"
            module = f"{node.module}.{alias.name}"
            is_module = (PACKAGE.parent / module.replace(".", "/")).is_dir() or (
                PACKAGE.parent / f"{module.replace('.', '/')}.py"
            ).exists()
            found[alias.name] = module if is_module else node.module
    return found


@pytest.mark.parametrize("package", ["curvax", "curvax.adapters"])
def test_type_checkers_see_the_names_of_the_table(package):
    module = importlib.import_module(package)
    assert for_type_checkers(pathlib.Path(module.__file__)) == module._HOMES
    assert set(module.__all__) == module._HOMES.keys() - {"__version__"}
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'egish'"):
        _ = module.egish


def test_every_public_result_of_the_subpackage_is_one_of_the_package():
    assert set(results.__all__) - {"numbered"} <= set(cx.__all__)


def test_the_version_is_that_of_the_installed_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cx.__version__ == importlib.metadata.version("curvax") == project["version"]


def test_importing_the_package_loads_neither_jax_nor_matplotlib():
    """Nor what Ctrl-C is answered with, nor the version, nor what is known by name alone."""
    program = (
        "import sys, curvax, curvax.interrupt, curvax.warnings; curvax.__version__; dir(curvax); "
        "print({'jax', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def errors_and_warnings():
    """Every class of the package that derives, by name, from an exception or a warning."""
    bases = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]

    def raised(name):
        known = getattr(builtins, name, object)
        if inspect.isclass(known) and issubclass(known, BaseException):
            return True
        return any(base != name and raised(base) for base in bases.get(name, ()))

    return {name for name in bases if raised(name) and not name.startswith("_")}


def test_every_error_and_warning_that_a_user_can_meet_is_public():
    assert errors_and_warnings() - SIGNALS == {CLASSES[name].__name__ for name in ERRORS}


def own_fields(kind):
    """The public fields of a dataclass or a NamedTuple, without those of what it derives from."""
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        types = {name: str(of) for name, of in inspect.get_annotations(kind).items()}
        return [name for name in types if name[0] != "_" and "ClassVar" not in types[name]]
    return []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_a_docstring_that_names_its_fields(name):
    value = PUBLIC[name]
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        value = type(value)  # a function that is an object, such as `hessian`
    text = inspect.getdoc(value)
    assert text
    if inspect.isclass(value):
        for field in own_fields(value):
            assert re.search(rf"^ +{field}: ", text, re.MULTILINE), f"{name}.{field}"


@pytest.mark.parametrize(
    "name", sorted({*RESULTS, *ERRORS, "Plan", "adapters.AdaptedModel", "adapters.Verification"})
)
def test_results_progress_and_errors_are_in_the_documentation(name):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    last = name.rpartition(".")[2]
    assert any(re.search(rf"`[\w.]*\b{last}\b[\w.]*`", page.read_text()) for page in pages)


@pytest.mark.parametrize("name", odd_results())
def test_all_results_have_one_vocabulary(name):
    result = odd_results()[name]
    assert type(result.num_matvecs) is int and type(result.interrupted) is bool
    if isinstance(result, (cx.EigenResult, cx.SolveResult, cx.BlockResults)):
        assert type(result.num_verification) is int
    if not isinstance(result, cx.BlockResults):  # whose blocks have theirs
        assert result.seconds["total"] >= 0
        assert {type(spent) for spent in result.seconds.values()} == {float}
