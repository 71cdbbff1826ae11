"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

python tests/native/cuda_resources.py            print a table
python tests/native/cuda_resources.py --write    make it the budget that the tests hold
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
BUDGET = pathlib.Path(__file__).with_name("cuda_budget.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
SOURCES = sorted(path.stem for path in (ROOT / "kernels" / "cuda").glob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--Werror", "all-warnings", "-Xptxas", "-v"]
DEFINES = ["-DCURVAX_TARGET=cuda", '-DCURVAX_CUDA_ARCHITECTURES=""']

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc() -> str | None:
    """CUDA's compiler, if it is here."""
    return shutil.which("nvcc")


def compile_cubin(source: str, architecture: str, cubin: pathlib.Path) -> str:
    """Compiles one file for one architecture, warnings as errors; returns what ptxas says."""
    kernels = ROOT / "kernels"
    command = [nvcc(), "-cubin", f"-arch={architecture}", *FLAGS, *DEFINES]
    command += [f"-I{kernels}", f"-I{kernels / 'include'}", str(kernels / f"cuda/{source}.cu")]
    result = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{source}.cu for {architecture}: {result.stderr[-2000:]}")
    return result.stderr


def compile_kernels(source: str, architecture: str) -> str:
    """What ptxas says of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_cubin(source, architecture, pathlib.Path(folder) / "out.cubin")


def short_names(mangled: list[str]) -> list[str]:
    """Names of kernels with their template arguments, without namespace and parameters."""
    plain = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        name.removeprefix("void ").replace("curvax::cuda::", "").split("(")[0] for name in plain
    ]


def resources(report: str) -> dict[str, dict[str, int]]:
    """By kernel: registers, static shared memory and bytes of spills."""
    matches = list(ENTRY.finditer(report))
    names = short_names([match["name"] for match in matches])
    found = {}
    for match, name in zip(matches, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[name] = {
            "registers": int(match["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "spills": int(match["stores"]) + int(match["loads"]),
        }
    return found


def main() -> None:
    """Prints the table of all kernels, or writes the budget."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for architecture in ARCHITECTURES:
        for source in SOURCES:
            for name, used in resources(compile_kernels(source, architecture)).items():
                table.setdefault(name, {})[architecture] = used
                print(f"{architecture:7} {name:40} {used}")
    if "--write" in sys.argv:
        budget = {
            name: {
                "registers": {arch: used["registers"] for arch, used in by_arch.items()},
                "shared": max(used["shared"] for used in by_arch.values()),
            }
            for name, by_arch in sorted(table.items())
        }
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in budget.items()]
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
