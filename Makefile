# `make serve` and `make test` need Python 3.11, 3.12 or 3.13, git and make; the rest goes into .venv.
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

IN_RANGE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c "$(IN_RANGE)" 2>/dev/null && echo "$$p" && break; done)
# Installed before the rest, so that a CPU wheel already chosen is not replaced by a CUDA one.
TORCH ?= torch==2.13.0
# Of `make test`: one for each processor and 4 GiB of memory, 4 at most, since each starts servers.
PROCESSES ?= $(shell $(BIN)/python -c "$(AFFORDABLE)")
AFFORDABLE := import psutil; memory = psutil.virtual_memory().total; \
	print(max(1, min(4, psutil.cpu_count() or 1, memory >> 32)))
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PYTHON_CODE := vdiff_kserve tests hack benchmarks

.PHONY: help serve test test-all test-clients lint format train bench quality docs clean

help: ## list these commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 15

serve: $(INSTALLED) ## start the server on port 8080 with the embedded model; ARGS="--port 9000" adds options
	@exec $(BIN)/python -m vdiff_kserve --model_name llada $(ARGS)

test: $(INSTALLED_DEV) ## run the tests with coverage, the slow ones left out
	$(BIN)/python -m pytest -m "not slow" -n $(PROCESSES) --dist loadfile \
		--cov --cov-report=term --cov-fail-under=85 $(ARGS)

test-all: $(INSTALLED_DEV) ## run every test
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=85 $(ARGS)

test-clients: $(INSTALLED_DEV) ## install client programs into build/ and run them against a server
	$(BIN)/python -m pytest tests/clients $(ARGS)

lint: $(INSTALLED_DEV) ## check style, types and import boundaries
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV) ## put the code into the house format
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)

train: $(INSTALLED_DEV) ## train the embedded model
	$(BIN)/python -m hack.train_embedded $(ARGS)

bench: $(INSTALLED_DEV) ## time the engine against a reference-style loop
	$(BIN)/python -m benchmarks.speed $(ARGS)

quality: $(INSTALLED_DEV) ## measure the embedded model's exact match on held-out prompts
	$(BIN)/python -m benchmarks.quality $(ARGS)

docs: $(INSTALLED) ## write docs/configuration.md anew
	@mkdir -p build
	$(BIN)/python -m vdiff_kserve.config > build/configuration.md
	@mv build/configuration.md docs/configuration.md

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist htmlcov .coverage .coverage.* *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(PYTHON_CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

define install
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11, 3.12 or 3.13 with venv found." \
		"Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> Installing $(TORCH)"
	@$(PIP) install --no-cache-dir "$(TORCH)"
	@echo "==> Installing vdiff-kserve$(1) and what it needs; this takes a few minutes"
	@$(PIP) install --no-cache-dir --editable ".$(1)"
	@echo "==> Installed"
endef

$(INSTALLED): pyproject.toml
	$(call install,)
	@touch $@

$(INSTALLED_DEV): pyproject.toml
	$(call install,[dev])
	@touch $(INSTALLED) $@
