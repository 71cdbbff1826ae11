"""Which modules of the package import which, read from the source: late imports included."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterable, Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "curvax"

# A name of a module that is no import of it: the folder of a package that is imported already.
NAMED_ONLY = {("curvax.adapters.torch.bridge", "curvax.adapters.torch")}


def name_of(path: pathlib.Path) -> str:
    """The dotted name of a module of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: pathlib.Path, *, for_types: bool = True) -> set[str]:
    """The modules of the package that a module imports, at any depth of its code.

    Late imports count, and imports by a string: every string that is the name of a module does, as
    in a table of lazy names, and so does what `import_module` gets; of an f-string, all modules
    that its beginning may be completed to.

    Args:
        path: of the module.
        for_types: whether `if TYPE_CHECKING` counts, whose imports are never run.
    """
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in _nodes(ast.parse(path.read_text(), str(path)), for_types):
        if isinstance(node, ast.Import):
            found |= {_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {_module(f"{base}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            found |= {node.value} - {"curvax"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= set(_completed(node.args[0]))
    return {other for other in found if other in MODULES and (name, other) not in NAMED_ONLY} - {
        name
    }


def _nodes(tree: ast.AST, for_types: bool) -> Iterator[ast.AST]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _module(name: str) -> str:
    """The module that an imported name is, or is from."""
    return name if name in MODULES else name.rpartition(".")[0]


def _completed(argument: ast.expr) -> Iterator[str]:
    if isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
        start = argument.values[0].value
        for name in MODULES:
            if start.startswith("curvax.") and name.startswith(start):
                yield name


def graph() -> dict[str, set[str]]:
    """What each module imports when it runs, the package that another module lies in included."""
    found = {name: imports(path, for_types=False) for name, path in MODULES.items()}
    for name, others in found.items():
        packages = {other.rpartition(".")[0] for other in others} & MODULES.keys() - {"curvax"}
        # Within a package its own has been imported before.
        others |= {package for package in packages if not f"{name}.".startswith(f"{package}.")}
    return found


def circles(imported: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The groups of modules each of which leads to every other."""
    reached = {name: _reached(name, imported) for name in imported}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in imported
        if name in reached[name]
    }
    return [list(group) for group in sorted(groups)]


def _reached(name: str, imported: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(imported[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting += imported[other]
    return found
