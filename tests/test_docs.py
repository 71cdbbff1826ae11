"""The documentation: its snippets run, its tables agree with the code, its links lead somewhere."""

import builtins
import importlib.util
import inspect
import re
import shlex
import symtable
from pathlib import Path

import jax
import pytest
import typer.main

import curvax as cx
from curvax import cli, results

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def default_promotion():
    """The settings that users have, in place of the tests' strict ones."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def snippets(page, language):
    """The code blocks of a page, each moved to its own line numbers."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield "\n" * (text[: match.start()].count("\n") + 1) + match[2]


def table(page, header):
    """The rows of the table whose first column is called `header`; cells without backquotes."""
    lines = iter(page.read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            next(lines)
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("`") for cell in line[1:-1].split("|")])
    return rows


def shell_lines(command):
    """The lines of all pages' shell snippets that run `command`, without comments."""
    lines = [
        shlex.split(line, comments=True)
        for page in PAGES
        for code in snippets(page, "sh")
        for line in code.splitlines()
    ]
    return [line[1:] for line in lines if line and line[0] == command]


def runnable(page):
    """With the marker of those that need other frameworks."""
    marks = pytest.mark.frameworks if page.name == "adapters.md" else ()
    return pytest.param(page, marks=marks, id=page_id(page))


@pytest.mark.parametrize("page", [runnable(p) for p in PAGES if any(snippets(p, "python"))])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's
def test_python_snippets_run(page, tmp_path, monkeypatch):
    if page.name == "adapters.md":
        for module in ("torch", "torchax", "transformers", "keras", "flax", "equinox"):
            # Not imported: the page says what comes before.
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in snippets(page, "python"):
        exec(compile(code, page, "exec"), namespace)


def missing_names(code):
    """Names that a piece of Python uses and does not define."""

    def scopes(table):
        yield table
        for child in table.get_children():
            yield from scopes(child)

    top = symtable.symtable(code, "code", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    used = {
        symbol.get_name()
        for scope in scopes(top)
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and (scope is top or symbol.is_global())
    }
    return used - defined - set(dir(builtins))


SECTIONS = ["Hugging Face", "Keras", "Flax and Equinox", "Files"]


def section_code(title):
    """The Python of a section of the page on adapters."""
    text = (ROOT / "docs" / "adapters.md").read_text()
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return "\n".join(code for language, code in FENCE.findall(section) if language == "python")


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_on_a_framework_defines_all_that_it_uses(title):
    assert not missing_names(section_code(title))
    assert missing_names("import os\nf = lambda x: (x, y, os, len)\nz = w") == {"y", "w"}


@pytest.mark.frameworks
@pytest.mark.parametrize("title", SECTIONS)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's
def test_a_section_on_a_framework_runs_by_itself(title, tmp_path, monkeypatch):
    code = section_code(title)
    for module in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {})


def test_quick_start_is_short():
    quick_start = next(snippets(ROOT / "README.md", "python"))
    assert len([line for line in quick_start.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_options_of_eigsh_are_those_of_the_code():
    documented = {row[0]: row[1] for row in table(ROOT / "README.md", "option")}
    parameters = list(inspect.signature(cx.eigsh).parameters.values())[2:]
    expected = {
        p.name: f'"{p.default}"' if isinstance(p.default, str) else str(p.default)
        for p in parameters
    }
    assert {name: value.replace("1e-3", "0.001") for name, value in documented.items()} == expected


def test_fields_of_the_result_exist():
    documented = {row[0] for row in table(ROOT / "README.md", "field")}
    assert documented <= {*results.EigenResult.__dataclass_fields__, "bounds", "relative_bounds"}
    assert {"residuals", "bounds", "converged", "complete", "tol_effective"} <= documented


def options_of(command):
    commands = typer.main.get_command(cli.app).commands
    return {option.opts[0]: option for option in commands[command].params if option.name != "help"}


@pytest.mark.parametrize("command", ["demo", "spectrum", "trace", "diagonal", "density", "plan"])
def test_options_of_a_command_are_those_of_the_code(command):
    page, own = ROOT / "docs" / "cli.md", "option" if command == "demo" else f"option of {command}"
    rows = table(page, own) + ([] if command == "demo" else table(page, "shared option"))
    documented = {row[0]: row[1] for row in rows}
    options = options_of(command)
    assert set(documented) == set(options) - {"target"}
    for name, default in documented.items():
        actual = options[name].default
        nothing = actual is None or actual is False or actual == []
        assert default == ("" if nothing else str(actual))


def test_commands_in_shell_snippets_exist():
    lines = shell_lines("curvax")
    assert ["info"] in lines and ["demo"] in lines
    for command, *arguments in lines:
        given = {word for word in arguments if word.startswith("--")}
        assert given <= (set() if command == "info" else set(options_of(command)))
    assert {line[0] for line in lines} == set(typer.main.get_command(cli.app).commands)


def test_verbs_in_shell_snippets_exist():
    verbs = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = shell_lines("make")
    assert {"demo", "test", "bench"} <= {line[0] for line in lines} <= set(verbs)
