"""CONTRIBUTING.md against the tree: its layout, its picture of the layers, and its paths."""

import re

from tests.package_imports import PACKAGE, ROOT
from tests.test_layering import LAYERS

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
LAYOUT, PICTURE = re.findall(r"```\n(.*?)```", TEXT[TEXT.index("## Layout") :], re.DOTALL)[:2]


def layout():
    """The paths of the layout; what they hold is said two spaces behind them, or further on."""
    folder, found = "", []
    for line in LAYOUT.splitlines():
        indent, names = re.match(r"( *)(\S+(?: \S+)*)(?:  |$)", line).groups()
        if not indent:
            folder = names
            found.append(names)
        elif len(indent) == 2:
            found += [folder + name for name in names.split()]
    return found


def test_the_layout_names_what_is_there():
    for path in layout():
        assert list(ROOT.glob(path.replace("<op>", "*").rstrip("/"))), path


def test_the_layout_names_every_part_of_the_package():
    parts = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"}
    parts |= {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))}
    inside = [path[14:] for path in layout() if path.startswith("python/curvax/")]
    named = [path.partition("/")[0] for path in inside if path]
    assert sorted(named) == sorted(parts)


def test_the_picture_of_the_layers_is_that_of_the_test():
    lines = [line.split(" (")[0].split() for line in PICTURE.splitlines()]
    assert [sorted(line) for line in lines] == [sorted(layer) for layer in reversed(LAYERS)]


def test_the_table_of_changes_names_files_that_exist():
    """Paths begin in the package or at the root."""
    table = TEXT[TEXT.index("## What a change touches") : TEXT.index("## Tests")]
    rows = [line for line in table.splitlines() if line.startswith("| a")]
    assert len(rows) == 10
    paths = [path for path in re.findall(r"`([^`]+)`", table) if re.search(r"/|\.\w+$", path)]
    assert len(paths) > 40
    missing = [path for path in paths if not ((PACKAGE / path).exists() or (ROOT / path).exists())]
    assert not missing
