"""Run the default tests with each version of JAX that is supported, and write down what came out.

    python .ci/versions.py                every row of docs/compatibility.md, hours of computing
    python .ci/versions.py 3.13-0.12.0.1  those of one environment

An environment .venv-<Python>-jax-<version> is made for each, by python3.11, python3.12 and
python3.13. The kernels are compiled with the headers that pyproject.toml pins, as for a release;
then the JAX to be tried is installed. pytest's options may follow `--`.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"

# What jax 0.11 can write in another form, off by default.
FLAGS = {"off": (), "on": ("jax_custom_vjp3", "jax_custom_jvp3", "jax_remat3")}
ROWS = [
    ("3.11", "0.10.2", "off"),
    ("3.12", "0.11.2", "off"),
    ("3.13", "0.11.2", "off"),
    ("3.13", "0.11.2", "on"),
    ("3.12", "0.12.0.1", "off"),
    ("3.13", "0.12.0.1", "off"),
    ("3.13", "0.12.0.1", "on"),
]
MARKERS = "not (slow or llm or cuda or nvcc or peers or frameworks)"


def environment(python: str, jax: str) -> Path:
    """The interpreter of an environment with the package, its tests' module and this JAX."""
    folder = ROOT / f".venv-{python}-jax-{jax}"
    own = folder / "bin" / "python"
    if not own.exists():
        subprocess.run([f"python{python}", "-m", "venv", folder], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pip = [own, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    # The pinned headers, and their JAX, also where a run before has installed a newer one.
    tools = ["cmake", "ninja", "pybind11", *project["build-system"]["requires"]]
    subprocess.run([*pip, *tools, f"jax=={ROWS[0][1]}"], check=True)
    settings = ["cmake.define.CURVAX_NATIVE_TESTS=ON", f"build-dir=build/versions-{python}"]
    options = [f"--config-settings={setting}" for setting in settings]
    subprocess.run([*pip, "--no-build-isolation", *options, ".[test]"], cwd=ROOT, check=True)
    subprocess.run([*pip, f"jax=={jax}"], check=True)
    return own


def counts(report: Path) -> tuple[int, int, int]:
    """Passed, skipped and failed of a report in JUnit's format."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return tests - skipped - failed, skipped, failed


def run(python: str, jax: str, flags: str, options: list[str]) -> tuple[int, int, int]:
    """The default tests in one environment, under one setting of JAX."""
    own = environment(python, jax)
    report = ROOT / "build" / f"versions-{python}-{jax}-{flags}.xml"
    settings = {flag.upper(): "1" for flag in FLAGS[flags]}
    subprocess.run(
        [own, "-m", "pytest", "-q", "-m", MARKERS, f"--junit-xml={report}", *options],
        cwd=ROOT,
        env={**os.environ, **settings, "CURVAX_REQUIRE_NATIVE": "1"},
    )
    return counts(report)


def written(text: str, row: tuple[str, ...], outcome: tuple[int, ...]) -> str:
    """The page with the outcome in the row that begins so."""
    python, jax, flags = row
    start = f"| {jax} | {python} | {flags} |"
    line = start + "".join(f" {count} |" for count in outcome)
    text, found = re.subn(rf"^{re.escape(start)}.*$", line, text, flags=re.MULTILINE)
    if not found:
        raise ValueError(f"{PAGE} has no row that begins with {start}")
    return text


def main() -> int:
    """Run the rows that are asked for; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environments", nargs="*", metavar="PYTHON-JAX")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, options = parser.parse_args(sys.argv[1:place]), sys.argv[place + 1 :]
    known = {f"{python}-{jax}" for python, jax, _ in ROWS}
    if unknown := set(arguments.environments) - known:
        parser.error(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    failures = 0
    for row in ROWS:
        if arguments.environments and "-".join(row[:2]) not in arguments.environments:
            continue
        outcome = run(*row, options)
        print(*row, *outcome, flush=True)
        PAGE.write_text(written(PAGE.read_text(), row, outcome))
        failures += outcome[2]
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
