"""The kernels' exp, compiled with traps for what C++ leaves undefined, against NumPy in float64."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-Wno-psabi", "-fno-trapping-math", "-DCURVAX_TARGET=base"]
FLAGS += ["-fsanitize=signed-integer-overflow,shift", "-fsanitize-undefined-trap-on-error"]
# A process of its own: a trap ends it.
SOURCE = """
#include <cstdio>
#include "cpu/math.h"
using namespace curvax::CURVAX_TARGET;
int main() {
  ELEMENT x[kLanes<ELEMENT>];
  while (fread(x, sizeof(x), 1, stdin) == 1) {
    StoreVec(x, ExpNonPositive(LoadVec(x)));
    fwrite(x, sizeof(x), 1, stdout);
  }
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def kernel_exp(folder, x):
    element = {"float32": "float", "float64": "double"}[x.dtype.name]
    (folder / "exp.cc").write_text(SOURCE)
    include = [f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'kernels' / 'include'}"]
    command = [COMPILER, *FLAGS, *include, f"-DELEMENT={element}", "exp.cc", "-o", "exp"]
    subprocess.run(command, cwd=folder, check=True)
    run = subprocess.run([folder / "exp"], input=x.tobytes(), capture_output=True, check=True)
    return np.frombuffer(run.stdout, x.dtype)


@pytest.mark.parametrize(
    ("dtype", "vanishes", "eps"), [("float32", -87.0, 2.0**-23), ("float64", -708.0, 2.0**-52)]
)
def test_exp_of_every_size_down_to_minus_infinity(tmp_path, dtype, vanishes, eps):
    x = -np.concatenate([np.linspace(0, 1000, 4000), np.logspace(-30, 38, 4094), [np.inf, np.nan]])
    x = x.astype(dtype)
    y = kernel_exp(tmp_path, x)
    wide = x.astype(np.float64)
    kept = wide >= vanishes
    want = np.exp(wide[kept])
    slack = 3 * (2 + np.abs(wide[kept]) / 4) if dtype == "float32" else 2
    assert np.all(np.abs(y[kept] - want) <= slack * eps * want)
    assert not np.any(y[wide < vanishes])
    assert np.array_equal(np.isnan(y), np.isnan(x))
