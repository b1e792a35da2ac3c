# `make demo` and `make test` work on a machine that has only Python ≥ 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Versions that were tested together; empty (make test CONSTRAINTS=): the newest ones.
CONSTRAINTS ?= constraints.txt
# What the tests are installed with; without the other extras, the tests that need them are skipped.
EXTRAS ?= dev
# Types are checked in modules whose imports other extras bring.
LINT_EXTRAS ?= dev,eval,torch,serve,wandb

# Files of one test run in one process; two processes, as on the CI machine. In their own order the
# many small files come last, so that no process waits long for the other's last one.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python >= 3.11 is needed, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.11 …" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras and versions; remade when either list changes.
VERSIONS := $(or $(basename $(notdir $(CONSTRAINTS))),newest)
OTHER_STAMPS = $(filter-out %-$(VERSIONS),$(wildcard $(VENV)/.installed-*))
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade --upgrade-strategy eager)
INSTALLED := pyproject.toml $(or $(CONSTRAINTS),always) | $(VENV)/bin/python

.PHONY: always
always:

$(VENV)/.installed-run-$(VERSIONS): $(INSTALLED)
	$(INSTALL) --editable .
	@rm -f $(OTHER_STAMPS)
	@touch $@

$(VENV)/.installed-%-$(VERSIONS): $(INSTALLED)
	$(INSTALL) --editable '.[$*]'
	@rm -f $(OTHER_STAMPS)
	@touch $@ $(VENV)/.installed-run-$(VERSIONS)

.PHONY: demo
demo: $(VENV)/.installed-run-$(VERSIONS) ## Train a value network on S, lift L: table, report and plot in runs/demo
	$(BIN)/python -m ivl_jax.experiments.demo

.PHONY: test
test: $(VENV)/.installed-$(EXTRAS)-$(VERSIONS) ## Run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

.PHONY: test-all
test-all: $(VENV)/.installed-$(EXTRAS)-$(VERSIONS) ## Run all tests
	$(PYTEST)

.PHONY: install
install: $(VENV)/.installed-$(EXTRAS)-$(VERSIONS) ## Install the package with EXTRAS=dev,… into .venv

.PHONY: bench
bench: $(VENV)/.installed-$(LINT_EXTRAS)-$(VERSIONS) ## Run every benchmark: tables, and runs/benchmarks.json
	@mkdir -p runs
	$(BIN)/python -m benchmarks all --json runs/benchmarks.json

.PHONY: docs
docs: $(VENV)/.installed-docs-$(VERSIONS) ## Build the documentation site in build/site; any warning is an error
	$(BIN)/mkdocs build --strict
	@echo "read it: $(BIN)/mkdocs serve"

.PHONY: lint
lint: $(VENV)/.installed-$(LINT_EXTRAS)-$(VERSIONS) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.PHONY: format
format: $(VENV)/.installed-$(LINT_EXTRAS)-$(VERSIONS) ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
