"""`benchmarks/kernels/compare.py` judges counts at any size, and ratios at the full one."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "benchmarks" / "baselines" / "kernels.json"


def compare(tmp_path, measured, *options):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(measured))
    script = ROOT / "benchmarks" / "kernels" / "compare.py"
    command = [sys.executable, script, file, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_count_that_is_not_the_baselines_fails_the_smoke(tmp_path):
    measured = json.loads(BASELINE.read_text())
    assert compare(tmp_path, measured, "--smoke")[0] == 0
    for case in measured["benchmarks"]:
        for name in case["extra_info"].get("counts", {}):
            case["extra_info"]["counts"][name] += 1
    code, printed = compare(tmp_path, measured, "--smoke")
    assert (
        code == 1 and "residuals float16: sweeps over the vectors: 2, in the baseline 1" in printed
    )


def test_a_missed_ratio_fails_the_full_run_alone(tmp_path):
    measured = json.loads(BASELINE.read_text())
    for case in measured["benchmarks"]:
        case["extra_info"]["ratios"] = dict.fromkeys(case["extra_info"].get("ratios", {}), 1e9)
    assert compare(tmp_path, measured, "--smoke")[0] == 0
    assert compare(tmp_path, measured)[0] == 1
