# Verbs; `make help` lists them. Each environment is made once and again only if its sources change.
#
#   PYTHON       the interpreter to make environments with (3.11 or newer)
#   DEMO_ARGS    options of `curvax demo`, such as DEMO_ARGS="--tol 1e-2"
#   DEMO_ACCEPT  an exit status of `curvax demo` to take for success, besides 0
#   TEST_ARGS    options of pytest, such as TEST_ARGS="tests/krylov -x"
#   TEST_JOBS    processes that share the tests; most of the time goes into compilation, on one core
#   BENCH_ARGS   options of pytest for the benchmarks

PYTHON ?= python3
DEMO_ARGS ?=
DEMO_ACCEPT ?= 0
TEST_ARGS ?=
TEST_JOBS ?= 2
BENCH_ARGS ?=

# What the default tests leave out: long ones, and those that need a download, a GPU, its compiler or
# a framework.
MARKERS := not (slow or llm or cuda or nvcc or peers or frameworks)

VENV := .venv
TEST_VENV := .venv-test
FRAMEWORKS_VENV := .venv-frameworks
PIP := -m pip --disable-pip-version-check --quiet

NATIVE := CMakeLists.txt pyproject.toml $(shell find cmake csrc kernels tests/native -type f)
PACKAGE := $(shell find python -type f -not -name '*.pyc')

# Build requirements, as pyproject.toml lists them: one pin, in one place.
REQUIREMENTS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))

.DEFAULT_GOAL := help
.PHONY: help demo test test-frameworks lint bench build clean

help: ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/.installed ## install with a command line and plots, and analyse the shipped GPT
	@echo "running $(VENV)/bin/curvax demo $(DEMO_ARGS)"
	@$(VENV)/bin/curvax demo $(DEMO_ARGS) || { status=$$?; \
	  [ "$(DEMO_ACCEPT)" != 0 ] && [ $$status -eq "$(DEMO_ACCEPT)" ] || exit $$status; }

test: $(TEST_VENV)/.installed ## install with the kernels' test module, and run the default tests
	$(TEST_VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile -m "$(MARKERS)" $(TEST_ARGS)

test-frameworks: $(FRAMEWORKS_VENV)/.installed ## install torch, transformers, Keras, Flax, Equinox, and run their tests
	$(FRAMEWORKS_VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile \
	  -m "frameworks and not (slow or llm)" $(TEST_ARGS)

lint: $(TEST_VENV)/.linters ## check style and types of Python and C++
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .
	$(TEST_VENV)/bin/mypy
	find kernels csrc tests/native -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(TEST_VENV)/bin/clang-format --dry-run -Werror

bench: $(TEST_VENV)/.installed ## run the kernel benchmarks
	$(TEST_VENV)/bin/python -m pytest benchmarks/kernels $(BENCH_ARGS)

build: $(VENV)/.exists ## make a wheel in dist/
	$(VENV)/bin/python $(PIP) wheel --no-deps --wheel-dir dist .

clean: ## remove environments, builds and caches
	rm -rf $(VENV) .venv-* build dist curvax-demo .pytest_cache .mypy_cache .ruff_cache \
	  .hypothesis .benchmarks

%/.exists:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "curvax needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making the environment $(@D)"
	@$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.installed: $(VENV)/.exists $(NATIVE) $(PACKAGE)
	@echo "compiling the kernels, which takes a minute or two"
	@rm -rf $(VENV)/wheel
	@$(VENV)/bin/python $(PIP) wheel --no-deps --wheel-dir $(VENV)/wheel .
	@echo "installing curvax, JAX, and what the command line and pictures need"
	@wheel=$$(echo $(VENV)/wheel/*.whl); $(VENV)/bin/python $(PIP) install "$$wheel[cli,plot]" \
	  && $(VENV)/bin/python $(PIP) install --no-deps --force-reinstall "$$wheel"
	@touch $@

# Without isolation, so that the build sees pybind11 and an unchanged source is not compiled again.
$(TEST_VENV)/.tools: $(TEST_VENV)/.exists pyproject.toml
	$(TEST_VENV)/bin/python $(PIP) install cmake ninja pybind11 \
	  $$($(TEST_VENV)/bin/python -c '$(REQUIREMENTS)["build-system"]["requires"])')
	@touch $@

$(TEST_VENV)/.installed: $(TEST_VENV)/.tools $(NATIVE) $(PACKAGE)
	$(TEST_VENV)/bin/python $(PIP) install --no-build-isolation ".[test]" \
	  --config-settings=cmake.define.CURVAX_NATIVE_TESTS=ON --config-settings=build-dir=build/test
	@touch $@

# torch first and exactly, or what depends on it would take another build of it.
$(FRAMEWORKS_VENV)/.tools: $(FRAMEWORKS_VENV)/.exists pyproject.toml
	$(FRAMEWORKS_VENV)/bin/python $(PIP) install torch==2.13.0
	$(FRAMEWORKS_VENV)/bin/python $(PIP) install cmake ninja \
	  $$($(FRAMEWORKS_VENV)/bin/python -c '$(REQUIREMENTS)["build-system"]["requires"])')
	@touch $@

$(FRAMEWORKS_VENV)/.installed: $(FRAMEWORKS_VENV)/.tools $(NATIVE) $(PACKAGE)
	$(FRAMEWORKS_VENV)/bin/python $(PIP) install --no-build-isolation ".[test,frameworks]" \
	  --config-settings=build-dir=build/frameworks
	@touch $@

$(TEST_VENV)/.linters: $(TEST_VENV)/.installed
	$(TEST_VENV)/bin/python $(PIP) install \
	  $$($(TEST_VENV)/bin/python -c '$(REQUIREMENTS)["project"]["optional-dependencies"]["lint"])')
	@touch $@
