"""Benchmarks on a CUDA device; `benchmarks/gpu.sh bench` runs them."""
