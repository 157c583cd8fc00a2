# make demo   train a small model from scratch on Python's own sources and let it write
# make test   the whole test suite, with style and type checks
# make reproduce   measure what this machine can (up to 30 minutes) and rewrite docs/results.md
#
# All make .venv first. To use an environment you have: make test PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMP := $(if $(VENV),$(VENV)/.installed,build/.installed-$(notdir $(PYTHON)))
PIP := $(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-long reproduce check install install-dev clean

demo: install
	@echo "== Training a small model from scratch on the Python standard library (a few minutes)"
	@$(BIN) -m megatrain demo

test: check
	@echo "== Tests"
	@$(BIN) -m pytest -n auto --maxprocesses 4 --dist loadgroup

test-long: install-dev
	@echo "== Long repetitions, with their seeds"
	@$(BIN) -m pytest -m long -s

reproduce: install
	@$(PIP) -e ".[bench]"
	@$(BIN) benchmarks/reproduce.py

check: install-dev
	@echo "== Style and types"
	@$(BIN) -m ruff check .
	@$(BIN) -m ruff format --check .
	@$(BIN) -m mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
ifneq ($(VENV),)
	@echo "== Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
endif
	@echo "== Installing (torch first: it is the large one)"
	@$(PIP) torch
	@$(PIP) -e .
	@mkdir -p $(dir $(STAMP)) && touch $(STAMP)

install-dev: $(STAMP)-dev

$(STAMP)-dev: $(STAMP)
	@echo "== Installing the test tools"
	@$(PIP) -e ".[dev]"
	@touch $(STAMP)-dev

clean:
	@rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache
