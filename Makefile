# `make demo` and `make test` work on a machine that has only Python ≥ 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Remade when the dependency list changes.
STAMP := $(VENV)/.installed-
# Files of one test run in one process; two processes, as on the CI machine.
WORKERS ?= 2

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python >= 3.11 is needed, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.11 …" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(STAMP)run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(STAMP)dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,eval]'
	@touch $@ $(STAMP)run

.PHONY: demo
demo: $(STAMP)run ## Train a value network on S, lift L: table, report and plot in runs/demo
	$(BIN)/python -m ivl_jax.experiments.demo

.PHONY: test
test: $(STAMP)dev ## Run the test suite
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: bench
bench: $(STAMP)dev ## Run every benchmark: tables, and runs/benchmarks.json
	@mkdir -p runs
	$(BIN)/python -m benchmarks all --json runs/benchmarks.json

.PHONY: lint
lint: $(STAMP)dev ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.PHONY: format
format: $(STAMP)dev ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
