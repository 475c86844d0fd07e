# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt changes.
# Pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CONSTRAINT, ...) are honored.

PYTHON ?= python3
PIP_FLAGS ?= --quiet
JOBS ?= 2
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

VENV := .venv
EXTRAS_VENV := .venv-extras
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
DEV := $(VENV)/.stamp-dev
BENCH := $(VENV)/.stamp-bench
EXTRAS := $(EXTRAS_VENV)/.stamp
# Stay in one thread a worker: workers that each take every core only wait for one another.
# worksteal keeps a module's tests on one worker while it can, so its fixtures are built once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
# Every YAML file in these folders is a recipe, or the lock file of one.
RECIPES = $(shell find src/tersor/recipes bench examples -name out -prune -o -name '*.yaml' ! -name '*.lock.yaml' -print 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo readme test test-wide test-long test-cpus test-extras check lint types layering recipes format bench tables clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(DEV)  ## make .venv and install Tersor with its tools (PYTHON=python3.12 picks another Python)

demo: $(DEV)  ## compress a small network on real data, end to end, into out/demo
	$(BIN)/tersor demo --out out/demo

readme: demo  ## run the demo and put what it prints into README.md
	$(BIN)/python bench/readme.py

test: $(DEV)  ## run the tests (PYTEST_FLAGS="-k entropy" picks some) and list those that take over two seconds
	$(PYTEST) -m "not long and not wide" --durations=15 --durations-min=2 $(PYTEST_FLAGS)

test-wide: $(DEV)  ## run the tests that make test leaves out: slower ones, and the rest of large tables
	$(PYTEST) -m "wide and not long" $(PYTEST_FLAGS)

test-long: $(DEV)  ## run all tests, wide and long ones too, on many more random examples
	HYPOTHESIS_PROFILE=nightly $(PYTEST) $(PYTEST_FLAGS)

test-cpus: $(DEV)  ## read golden files and run all coders as processors with fewer instructions do
	$(BIN)/python tests/cpus.py --jobs $(JOBS)

test-extras: $(EXTRAS)  ## run the tests that need other packages (transformers, timm, Lightning, ...), in .venv-extras
	TERSOR_EXTRAS=1 OMP_NUM_THREADS=1 $(EXTRAS_VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal \
	  -m "extra and not long" $(PYTEST_FLAGS)

check: lint types layering recipes  ## lint, formatting, types, layering, recipes (make -k check goes on after a failure)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

layering: $(DEV)
	$(BIN)/python -m pytest tests/test_layering.py tests/test_habits.py

recipes: $(DEV)
	@set -e; for recipe in $(RECIPES); do echo "tersor check $$recipe"; $(BIN)/tersor check "$$recipe"; done

format: $(DEV)  ## put imports and layout in order
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(BENCH)  ## measure the results table anew (BENCH_FLAGS go to bench/run.py)
	$(BIN)/python bench/run.py $(BENCH_FLAGS)

tables: $(EXTRAS)  ## measure techniques side by side and the zoo, and write docs/tables.md (BENCH_FLAGS=--quick: minutes)
	$(EXTRAS_VENV)/bin/python bench/tables.py $(BENCH_FLAGS)
	$(EXTRAS_VENV)/bin/python bench/comparisons.py $(BENCH_FLAGS)

clean:  ## remove both .venv, caches, build files and out/demo
	rm -rf $(VENV) $(EXTRAS_VENV) build dist src/*.egg-info out/demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Tersor needs Python 3.11 or newer, and there is no $(PYTHON)." \
	  "Install one, or name it: make setup PYTHON=/path/to/python3"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tersor needs Python 3.11 or newer, and" \
	  "$(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make setup PYTHON=python3.11"; exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make $(VENV)." \
	  "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; } >&2

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Tersor and its tools into $(VENV). PyTorch is large: this takes a minute or two" \
	  "(make setup PIP_FLAGS= shows each package)." >&2
	@$(INSTALL) --editable '.[dev]'
	@$(BIN)/python -c 'import importlib.metadata as m, sys; print("Installed tersor", m.version("tersor"), "with torch", \
	  m.version("torch"), "on Python", sys.version.split()[0], file=sys.stderr)'
	@touch $@

# It stands on .venv's packages: a second PyTorch would take six gigabytes more.
$(EXTRAS): $(DEV)
	@echo "Installing what test-extras needs beside $(VENV) into $(EXTRAS_VENV): a minute." >&2
	@$(BIN)/python -m venv --clear $(EXTRAS_VENV)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(EXTRAS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(EXTRAS_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
	  --editable '.[integrations]'
	@touch $@

$(BENCH): $(DEV)
	@echo "Installing what the benchmark compares with into $(VENV)." >&2
	@$(INSTALL) --editable '.[dev,bench]'
	@touch $@
