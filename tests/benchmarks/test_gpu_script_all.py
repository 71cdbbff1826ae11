"""`benchmarks/gpu.sh all` with stand-ins for Python, the device's tools and the driver."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Logs what it is asked for and what the archive then holds; fails or hangs where a file says so.
STAND_IN = """#!/bin/sh
echo "$*" >>calls
{ echo "> $*"; tar tzf results/gpu.tgz 2>/dev/null; } >>seen
[ -e fail ] && case "$*" in *"$(cat fail)"*) echo "it broke"; exit 3;; esac
case "$*" in
  *"pip install"*) mkdir -p build/gpu-site build/gpu/tests/native
    cp bin/driver build/gpu/tests/native/cuda_driver;;
esac
[ -e hang ] && case "$*" in *"$(cat hang)"*) echo "it hangs"
  echo $$ >pid; touch hung; sleep 8;; esac
exit 0
"""
# Half an archive, and then nothing, where a file says so.
TAR = """#!/bin/sh
[ -e slow-tar ] && [ "$1" = czf ] && { echo half >"$2"; touch half; sleep 8; }
exec {tar} "$@"
"""
STAGES = [
    "flag", "device", "build", "driver", "quick", "softmax_ce", "block_ortho", "gpt", "gpt-bf16x3",
    "large-bf16x3", "rest", "sanitize", "peers", "clocks",
]  # fmt: skip


@pytest.fixture
def sandbox(tmp_path):
    """A copy of the scripts where all programs that they call are stand-ins."""
    (tmp_path / "benchmarks" / "gpu").mkdir(parents=True)
    for name in ("gpu.sh", "gpu/all.sh"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    for name in ("cmake", "csrc", "kernels", "python", "tests/native", "bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    programs = {"python": STAND_IN, "tar": TAR.replace("{tar}", shutil.which("tar"))}
    programs |= dict.fromkeys(["driver", "nvidia-smi", "compute-sanitizer"], "#!/bin/sh\necho $0\n")
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def change(sandbox, old, new):
    script = sandbox / "benchmarks" / "gpu" / "all.sh"
    text, count = re.subn(rf"^{old}$", new, script.read_text(), flags=re.MULTILINE)
    assert count == 1
    script.write_text(text)


def start(sandbox):
    path = f"{sandbox / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with (sandbox / "output").open("w") as output:
        # Tests that run in the background of a script ignore SIGINT, and so would what they start.
        hearing = [shutil.which("env"), "--default-signal=INT"]
        return subprocess.Popen(
            [*hearing, "bash", "benchmarks/gpu.sh", "all", "results"],
            cwd=sandbox,
            env={**os.environ, "PATH": path, "PYTHON": str(sandbox / "bin/python"), "OUT": "other"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def run(sandbox):
    """Exit status and output."""
    return start(sandbox).wait(timeout=60), (sandbox / "output").read_text()


def archived(sandbox):
    """The archive's files, each read to its end."""
    with tarfile.open(sandbox / "results" / "gpu.tgz") as archive:
        files = [member for member in archive if member.isfile()]
        return {Path(f.name).name: archive.extractfile(f).read().decode() for f in files}


def outcomes(files):
    return dict(re.findall(r"^== (\S+): ([^;]*);", files["summary"], re.MULTILINE))


def test_all_stages_and_the_archive_after_each(sandbox):
    status, output = run(sandbox)
    assert status == 0, output
    files = archived(sandbox)
    assert outcomes(files) == dict.fromkeys(STAGES, "done")
    assert output.endswith(files["summary"])
    assert {f"{stage}.log" for stage in STAGES} < set(files)
    # When a stage began, the archive held all before it.
    begun = [f"> -m benchmarks.gpu {case} " for case in ("softmax_ce", "gpt", "large-bf16x3")]
    seen = (sandbox / "seen").read_text()
    for first, stage in zip(begun, ("quick", "block_ortho", "gpt-bf16x3"), strict=True):
        then = seen.partition(first)[2].partition("\n>")[0]
        assert f"gpu-all/{stage}.log" in then
    assert not (sandbox / "results" / "gpu.tgz.part").exists()


@pytest.mark.parametrize(
    ("program", "stage", "more"),
    [
        ("report build", "build", []),  # what was built may run all the same
        ("large-bf16x3 ", "large-bf16x3", ["large"]),  # in full float32 instead
    ],
)
def test_a_failure_stops_nothing(sandbox, program, stage, more):
    (sandbox / "fail").write_text(program)
    status, output = run(sandbox)
    assert status == 1 and "it broke" in output
    got = outcomes(archived(sandbox))
    assert re.fullmatch("FAILED with status [13]", got.pop(stage))
    assert got == dict.fromkeys([s for s in STAGES if s != stage] + more, "done")


def test_nothing_follows_a_failed_build(sandbox):
    (sandbox / "fail").write_text("pip install")
    assert run(sandbox)[0] == 1
    assert list(outcomes(archived(sandbox))) == STAGES[:3]


def test_a_stage_over_its_limit(sandbox):
    (sandbox / "hang").write_text("benchmarks.gpu gpt ")
    change(sandbox, "gpu gpt [0-9]+ bench gpt", "gpu gpt 1 bench gpt")
    begun = time.monotonic()
    status, output = run(sandbox)
    assert status == 1 and time.monotonic() - begun < 7
    files = archived(sandbox)
    assert outcomes(files) == dict.fromkeys(STAGES, "done") | {"gpt": "cut at its limit of 1 s"}
    assert "it hangs" in files["gpt.log"]


def test_the_limit_of_all(sandbox):
    (sandbox / "hang").write_text("benchmarks.gpu softmax_ce ")
    change(sandbox, "TOTAL=[0-9]+", "TOTAL=3")
    begun = time.monotonic()
    status, output = run(sandbox)
    assert status == 1 and time.monotonic() - begun < 7
    got = outcomes(archived(sandbox))
    assert got["softmax_ce"].startswith("cut at its limit of ")
    assert got["block_ortho"] == got["clocks"] == "not run: no time left"


def test_nothing_follows_where_jax_has_no_device(sandbox):
    (sandbox / "fail").write_text('jax.devices("cuda")')
    status, output = run(sandbox)
    assert status == 1 and "JAX has no CUDA device" in output
    assert outcomes(archived(sandbox)) == dict.fromkeys(["flag", "jax"], "FAILED with status 3")


def test_a_flag_that_xla_does_not_know_is_left_out(sandbox):
    """The stand-in fails once, with the flag."""
    (sandbox / "bin" / "env").write_text("#!/bin/sh\nexit 1\n")
    (sandbox / "bin" / "env").chmod(0o755)
    change(sandbox, "gpu build [0-9]+ build", r"rm bin/env; \g<0>")
    run(sandbox)
    got = outcomes(archived(sandbox))
    assert got.pop("flag") == "FAILED with status 1"
    assert got == dict.fromkeys(["jax", *STAGES[1:]], "done")


def test_a_folder_that_cannot_be_written_to(sandbox):
    (sandbox / "results").write_text("a file")
    status, output = run(sandbox)
    assert status == 2 and "FOLDER must be" in output
    assert not (sandbox / "calls").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_too(sandbox, number):
    (sandbox / "hang").write_text("benchmarks.gpu softmax_ce ")
    process = start(sandbox)
    deadline = time.monotonic() + 30
    while not (sandbox / "hung").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=7) == 143
    program = Path("/proc", (sandbox / "pid").read_text().strip())  # which sleeps for 8 seconds
    deadline = time.monotonic() + 4
    while program.exists():  # it was told to end, and nobody waits for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    files = archived(sandbox)
    assert outcomes(files) == dict.fromkeys(STAGES[:5], "done")
    assert "== stopped at " in files["summary"]


@pytest.mark.parametrize("moment", ["in a stage", "while the archive is written"])
def test_a_run_that_is_killed_leaves_what_it_had(sandbox, moment):
    (sandbox / "hang").write_text("benchmarks.gpu softmax_ce ")
    if moment != "in a stage":
        change(sandbox, "gpu softmax_ce [0-9]+ (.*)", r"touch slow-tar; gpu softmax_ce 1 \1")
    process = start(sandbox)
    deadline = time.monotonic() + 30
    while not (sandbox / ("hung" if moment == "in a stage" else "half")).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert outcomes(archived(sandbox)) == dict.fromkeys(STAGES[:5], "done")
