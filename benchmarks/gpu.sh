#!/usr/bin/env bash
# Builds, tests and measures curvax on a machine with a CUDA device; needs no network.
#
#   benchmarks/gpu.sh build      compile with CUDA, for the device that is here
#   benchmarks/gpu.sh test       the tests that need a device, and those of the kernels' operations
#   benchmarks/gpu.sh sanitize   compute-sanitizer: memcheck and racecheck
#   benchmarks/gpu.sh bench      the benchmarks, or some: bench copy softmax_ce block_ortho gpt large
#
# Every stage but the first needs `build`, which it runs if a source is newer than what was built. Each
# prints a short table last and writes OUT/gpu-<stage>.json with the commit; `bench` one for each case.
#
#   PYTHON  an interpreter with JAX for CUDA, nanobind, pybind11, scikit-build-core and pytest
#   OUT     where the JSON goes (out/gpu)
#   CURVAX_COMMIT  the commit to record, where there is no git
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
SITE=$PWD/build/gpu-site
commit=$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
export CURVAX_COMMIT=${CURVAX_COMMIT:-$commit}
export PYTHONPATH=$SITE:$PWD
# Two stages on one device, or a peer beside JAX, would otherwise not find memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}

report() { "$PYTHON" -m benchmarks.gpu.report "$@" --out "$OUT"; }

# Headers of the JAX that is here, which may be newer than the oldest that curvax supports.
stage_build() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1) || true
  local settings=(CURVAX_CUDA=ON CURVAX_NATIVE_TESTS=ON CURVAX_MAX_FFI_API_MINOR=4)
  [ -z "$capability" ] || settings+=("CMAKE_CUDA_ARCHITECTURES=${capability/./}-real")
  rm -rf "$SITE"
  SECONDS=0
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$SITE" . \
    "${settings[@]/#/--config-settings=cmake.define.}" --config-settings=build-dir=build/gpu
  # Another curvax, installed in place, would come before this one.
  "$PYTHON" -c 'import curvax, sys; sys.exit(not curvax.__file__.startswith(sys.argv[1]))' "$SITE" || {
    echo "$PYTHON finds another curvax than the one just built: pip uninstall curvax" >&2
    exit 1
  }
  touch "$SITE/.built"
  report build --seconds "$SECONDS"
}

# Whether a source is newer than what was built.
stale() {
  [ ! -e "$SITE/.built" ] || [ -n "$(find CMakeLists.txt pyproject.toml cmake csrc kernels python \
    tests/native -type f -not -name '*.pyc' -newer "$SITE/.built" -print -quit)" ]
}

stage_test() {
  local log=$OUT/test.xml status=0
  rm -f "$log"
  "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$log" -m "not (slow or nvcc)" \
    tests/cuda tests/ops/test_softmax_ce.py tests/ops/test_block_ortho.py || status=$?
  report test --junit "$log"
  return "$status"
}

# Each array has memory of its own, or a write past one would land in another unseen.
stage_sanitize() {
  local tool status
  for tool in memcheck racecheck; do
    status=0
    XLA_PYTHON_CLIENT_ALLOCATOR=platform timeout 220 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --target-processes all "$PYTHON" -m pytest -q -p no:cacheprovider \
      tests/cuda -m cuda -k small >"$OUT/$tool.log" 2>&1 || status=$?
    echo "exit status $status" >>"$OUT/$tool.log"
    tail -5 "$OUT/$tool.log"
  done
  report sanitize --log "$OUT/memcheck.log" --log "$OUT/racecheck.log"
}

stage_bench() { "$PYTHON" -m benchmarks.gpu "$@" --out "$OUT"; }

stage=${1:-}
case $stage in
  build | test | sanitize | bench) ;;
  *) sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
shift
mkdir -p "$OUT"
if [ "$stage" != build ] && stale; then stage_build; fi
"stage_$stage" "$@"
