#!/usr/bin/env bash
# What `benchmarks/gpu.sh all FOLDER` runs: every stage in a process of its own, under a limit of its
# own, its output in a log. FOLDER/gpu.tgz holds logs, JSON and the summary of all stages that have ended:
# it is written anew after each, under another name, and renamed, so that a run that is cut leaves it whole.
#
# The quickest and the most wanted come first. What follows a failure runs all the same, but for the
# build's. The limits add up to more than the ten minutes that a run may take, because no stage is expected
# to reach its own: the last ones get what is left.
set -uo pipefail

TOTAL=570
FOLDER=$(mkdir -p "$1" && cd "$1" && touch .writable && rm .writable && pwd) || {
  echo "FOLDER must be one that can be written to, got $1" >&2
  exit 2
}
export OUT=$PWD/build/gpu-all
rm -rf "$OUT"
mkdir -p "$OUT"
# A second run on the same machine does not compile again.
export JAX_COMPILATION_CACHE_DIR=$PWD/build/gpu-cache
SECONDS=0
failed=0
child=

archive() {
  tar czf "$FOLDER/gpu.tgz.part" -C "$(dirname "$OUT")" "$(basename "$OUT")"
  mv -f "$FOLDER/gpu.tgz.part" "$FOLDER/gpu.tgz"
}

# The stage is in a process group of its own, which a signal to this one does not reach.
stop() {
  [ -z "$child" ] || { kill -TERM "$child"; wait "$child"; } 2>/dev/null
  echo "== stopped at $SECONDS s" | tee -a "$OUT/summary"
  archive
  exit 143
}
trap stop HUP INT TERM

# timed NAME SECONDS COMMAND...
timed() {
  local name=$1 limit=$2 begun=$SECONDS status=0 outcome
  shift 2
  limit=$((limit < TOTAL - SECONDS ? limit : TOTAL - SECONDS))
  if ((limit < 1)); then
    outcome="not run: no time left" status=1
  else
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
    child=$!
    wait "$child" || status=$?
    child=
    case $status in
      0) outcome=done ;;
      124 | 137) outcome="cut at its limit of $limit s" ;;
      *) outcome="FAILED with status $status" ;;
    esac
    tail -n 14 "$OUT/$name.log"
  fi
  ((status == 0)) || failed=1
  echo "== $name: $outcome; $((SECONDS - begun)) s, at $SECONDS s" | tee -a "$OUT/summary"
  archive
  return "$status"
}

gpu() { timed "$1" "$2" benchmarks/gpu.sh "${@:3}"; }

# XLA ends the process if it does not know a flag. Without Triton's products none is compiled and timed
# for each matrix; cuBLAS alone adds a product to a sum in one call.
flag=--xla_gpu_enable_triton_gemm=false
[ -z "${CURVAX_BENCH_SMOKE:-}" ] && platform='"cuda"' || platform=
list=("${PYTHON:-python3}" -c "import jax; print(jax.devices($platform))")
if timed flag 40 env XLA_FLAGS="$flag" "${list[@]}"; then
  export XLA_FLAGS=$flag
elif ! timed jax 40 "${list[@]}"; then
  echo "JAX has no CUDA device, so nothing else is tried: see jax.log, and curvax info" | tee -a "$OUT/summary"
  archive
  exit 1
fi
timed device 15 nvidia-smi

gpu build 150 build
[ -e build/gpu-site/.built ] || { cat "$OUT/summary"; exit 1; }
gpu driver 40 driver
gpu quick 75 test quick
gpu softmax_ce 40 bench softmax_ce
gpu block_ortho 60 bench block_ortho
gpu gpt 140 bench gpt
gpu gpt-bf16x3 80 bench gpt-bf16x3
gpu large-bf16x3 130 bench large-bf16x3 || gpu large 130 bench large
gpu rest 60 test rest
gpu sanitize 60 sanitize
gpu peers 60 bench peers
timed clocks 15 nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv

echo
cat "$OUT/summary"
exit "$failed"
