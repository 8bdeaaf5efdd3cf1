# Everything here runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/demo

BIN := $(VENV)/bin
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
PINS = $(wildcard constraints/py$(VERSION).txt)
PIP = $(BIN)/pip install -qq $(addprefix --constraint ,$(PINS))

# One thread per process: the processes of a run and of a test share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-fast check install install-dev clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a tiny reasoning model with BuPO on this machine: $(RUN_DIR)"
	@echo "make test       every test"
	@echo "make test-fast  the tests that take seconds"
	@echo "make check      format, lint, types and house rules, as CI runs them"
	@echo "make clean      remove virtual environments and caches (never runs/)"
	@echo ""
	@echo "PYTHON=python3.12 VENV=.venv312 choose another interpreter and environment;"
	@echo "RUN_DIR=runs/demo2 starts a demo of its own."

demo: install
	@$(BIN)/megatron-bupo train --config conf/demo.yaml run_dir=$(RUN_DIR)

test: install-dev
	@$(BIN)/python -m pytest

test-fast: install-dev
	@$(BIN)/python -m pytest -m "not slow"

check: install-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/python -m pytest -q tests/test_layering.py tests/test_house_style.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch comes first and alone, so that nothing else decides which build of it is taken.
$(VENV)/.installed: setup.py $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV) (a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests and checks need"
	@$(PIP) --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf .venv .venv312 build *.egg-info .pytest_cache .ruff_cache
	find megatron_bupo tools tests examples -name __pycache__ -prune -exec rm -rf {} +
