# make demo   train a small model from scratch on Python's own sources and let it write
# make test   the whole test suite, with style and type checks
# make reproduce   measure what this machine can (up to 30 minutes) and rewrite docs/results.md
#
# For releases, with the network (docs/releasing.md); none of them is a part of make test:
# make lock        every dependency by version and hash: requirements.lock, and requirements-extras.lock for the container
# make lock-cpu    requirements-cpu.lock: torch without CUDA
# make audit-dependencies   known vulnerabilities of what is locked and of the test tools
# make sbom        a bill of materials (CycloneDX) in build/
#
# All make .venv first. To use an environment you have: make test PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMP := $(if $(VENV),$(VENV)/.installed,build/.installed-$(notdir $(PYTHON)))
PIP := $(BIN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Not of the environment that runs the code, so that they change nothing in it.
TOOLS := build/tools
TOOL_PACKAGES := uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
LOCK := $(TOOLS)/bin/uv pip compile pyproject.toml --constraints constraints.txt --universal --generate-hashes \
	--no-config --quiet
EXTRAS := encryption images sign tensorboard trainers wandb
AUDIT := $(TOOLS)/bin/pip-audit --strict --disable-pip --progress-spinner off

.PHONY: demo test test-long reproduce check install install-dev lock lock-cpu audit-dependencies sbom clean

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

lock: $(TOOLS)/.installed
	@$(LOCK) --custom-compile-command "make lock" --output-file requirements.lock
	@$(LOCK) $(EXTRAS:%=--extra %) --custom-compile-command "make lock" --output-file requirements-extras.lock

lock-cpu: $(TOOLS)/.installed
	@$(LOCK) --torch-backend cpu --emit-index-url --custom-compile-command "make lock-cpu" \
		--output-file requirements-cpu.lock

# --strict: a package that cannot be looked up is a failure, not one without vulnerabilities
audit-dependencies: $(TOOLS)/.installed
	@$(AUDIT) --requirement requirements-extras.lock
	@$(AUDIT) --no-deps --requirement constraints.txt

sbom: $(TOOLS)/.installed
	@mkdir -p build
	@$(TOOLS)/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom.cdx.json
	@echo "wrote build/sbom.cdx.json"

$(TOOLS)/.installed: Makefile
	@echo "== Installing the release tools into $(TOOLS)"
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check $(TOOL_PACKAGES)
	@touch $@

clean:
	@rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache
