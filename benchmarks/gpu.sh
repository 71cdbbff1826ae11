#!/usr/bin/env bash
# Builds, tests and measures curvax on a machine with a CUDA device; needs no network.
#
#   benchmarks/gpu.sh all [FOLDER]  all of the following in under ten minutes, into FOLDER/gpu.tgz (OUT)
#   benchmarks/gpu.sh build      compile with CUDA, for the device that is here
#   benchmarks/gpu.sh driver     the kernels without JAX: compared with the CPU's, and timed
#   benchmarks/gpu.sh test       tests that need a device, and the operations'; or `test quick`, `test rest`
#   benchmarks/gpu.sh sanitize   compute-sanitizer on the driver: memcheck, racecheck, synccheck
#   benchmarks/gpu.sh bench      the benchmarks, or some: bench copy softmax_ce block_ortho
#                                gpt gpt-bf16x3 large large-bf16x3 peers
#
# Every stage but the first needs `build`, which it runs if a source is newer than what was built. Each
# prints a short table last and writes OUT/gpu-<stage>.json with the commit; `bench` one for each case.
#
#   PYTHON  an interpreter with JAX for CUDA, nanobind, scikit-build-core, pytest and pytest-xdist
#   OUT     where the JSON goes (out/gpu)
#   CURVAX_COMMIT  the commit to record, where there is no git
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/gpu}
SITE=$PWD/build/gpu-site
DRIVER=build/gpu/tests/native/cuda_driver
CASES=(copy softmax_ce block_ortho gpt gpt-bf16x3 large large-bf16x3 peers)
commit=$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
export CURVAX_COMMIT=${CURVAX_COMMIT:-$commit}
export PYTHONPATH=$SITE:$PWD PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin
# Kernels that are first called while XLA captures a graph must be loaded by then.
export CUDA_MODULE_LOADING=EAGER
# Two stages on one device, or a peer beside JAX, would otherwise not find memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}

usage() {
  sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

report() { "$PYTHON" -m benchmarks.gpu.report "$@" --out "$OUT"; }

# Headers and compilers of the machine that is here, which may be newer than those curvax is built with.
stage_build() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1) || true
  local settings=(CURVAX_CUDA=ON CURVAX_CUDA_DRIVER=ON CURVAX_WERROR=OFF CURVAX_MAX_FFI_API_MINOR=4)
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

stage_driver() {
  local status=0
  "$DRIVER" check | tee "$OUT/driver-check.log" || status=$?
  "$DRIVER" time | tee "$OUT/driver-time.log" || status=$?
  report driver --log "$OUT/driver-check.log" --log "$OUT/driver-time.log"
  return "$status"
}

# What another version of a package warns of is not what is tested here; and a program that is not
# compiled, but found in a cache, is not dumped.
stage_test() {
  local part=${1:-all} status=0 only=()
  local log=$OUT/test-$part.xml
  case $part in
    quick) only=(-k "small or bits") ;;
    rest) only=(-k "not (small or bits)") ;;
  esac
  rm -f "$log"
  env -u JAX_COMPILATION_CACHE_DIR "$PYTHON" -m pytest -q -W default -n 8 -p no:cacheprovider --junitxml="$log" \
    -m "cuda or not (slow or nvcc)" "${only[@]}" \
    tests/cuda tests/ops/test_softmax_ce.py tests/ops/test_block_ortho.py || status=$?
  report "test-$part" --junit "$log"
  return "$status"
}

# The driver takes each array from the device by itself, so that a write past one is seen.
stage_sanitize() {
  local tool status logs=()
  for tool in memcheck racecheck synccheck; do
    status=0
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$DRIVER" check \
      >"$OUT/$tool.log" 2>&1 || status=$?
    echo "exit status $status" >>"$OUT/$tool.log"
    tail -5 "$OUT/$tool.log"
    logs+=(--log "$OUT/$tool.log")
  done
  report sanitize "${logs[@]}"
}

# A process for each case, which has the device to itself: one array may need most of its memory, and
# the allocator does not join what an earlier case has left in pieces.
stage_bench() {
  local case status=0
  [ $# -gt 0 ] || set -- "${CASES[@]}"
  for case in "$@"; do
    local preallocate=true
    [ "$case" != peers ] || preallocate=false # PyTorch is in the same process
    env -u XLA_PYTHON_CLIENT_MEM_FRACTION XLA_CLIENT_MEM_FRACTION=.93 \
      XLA_PYTHON_CLIENT_PREALLOCATE=$preallocate \
      "$PYTHON" -m benchmarks.gpu "$case" --out "$OUT" || status=1
  done
  return "$status"
}

stage_all() { exec benchmarks/gpu/all.sh "${1:-$OUT}"; }

stage=${1:-}
case $stage in
  all | build | driver | test | sanitize | bench) ;;
  *) usage ;;
esac
shift
case $stage in
  all) (($# <= 1)) || usage ;;
  test) [[ $# -le 1 && ${1:-rest} =~ ^(quick|rest)$ ]] || usage ;;
  bench) for case in "$@"; do [[ " ${CASES[*]} " == *" $case "* ]] || usage; done ;;
  *) (($# == 0)) || usage ;;
esac
mkdir -p "$OUT"
if [[ ! $stage =~ ^(all|build)$ ]] && stale; then stage_build; fi
"stage_$stage" "$@"
