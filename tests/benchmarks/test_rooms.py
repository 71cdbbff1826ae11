"""The order of `benchmarks/`: what is named exists, is explained, and imports in no circle."""

import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
NAMED = re.compile(r"(?<!/)\bbenchmarks((?:\.[a-z_0-9]+)+|(?:/[a-z_0-9]+)+\.[a-z]+)")
README = (ROOT / "benchmarks" / "README.md").read_text()


def module(name):
    """The file of a dotted name, or of one whose last part is a name in it."""
    path = ROOT / name.replace(".", "/")
    candidates = [path.with_suffix(".py"), path / "__main__.py", path.parent.with_suffix(".py")]
    return next((file for file in candidates if file.is_file()), None)


@pytest.mark.parametrize(
    "page",
    ["Makefile", ".ci/run", "benchmarks/gpu.sh", "benchmarks/gpu/all.sh", "benchmarks/README.md"]
    + [path.relative_to(ROOT).as_posix() for path in [*SOURCES, *ROOT.glob("docs/*.md")]],
)
def test_every_benchmark_that_is_named_exists(page):
    for found in NAMED.findall((ROOT / page).read_text()):
        name = f"benchmarks{found}"
        file = ROOT / (name if found[0] == "/" else name.replace(".", "/"))
        assert file.exists() or module(name), f"{page}: {name}"


def test_the_readme_explains_every_room_and_says_how_each_benchmark_is_run():
    rooms = {path.parent.name for path in SOURCES}
    assert set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)) == rooms
    run = set(re.findall(r"python -m (benchmarks[.\w]+)", README))
    programs = {path for path in SOURCES if '__name__ == "__main__"' in path.read_text()}
    by_script = {ROOT / "benchmarks" / name for name in ("gpu/report.py", "kernels/compare.py")}
    assert {module(name) for name in run} == programs - by_script


def test_benchmarks_import_in_no_circle():
    graph = {path: set() for path in SOURCES}
    for path in SOURCES:
        for package, names in re.findall(
            r"^\s*from (benchmarks[.\w]*) import (.+)$", path.read_text(), re.MULTILINE
        ):
            whole = module(package)
            parts = [module(f"{package}.{name}") for name in names.split(", ")]
            graph[path] |= {whole} if whole and whole.stem != "__main__" else set(parts)
    assert sum(map(len, graph.values())) > 20
    graphlib.TopologicalSorter(graph).prepare()
