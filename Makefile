# What people type. Every target installs what it needs into .venv first; a second run does not install again.
#
#   make rl                            the whole recipe of examples/tiny.yaml, with a report at the end
#   make rl CONFIG=my.yaml             another recipe
#   make rl ARGS="rl.steps=20 seed=1"  other values
#   make test                          the tests

PYTHON ?= python3
CONFIG ?= examples/tiny.yaml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := $(BIN)/megatron-ext

.DEFAULT_GOAL := help
.PHONY: help setup pretrain sft mpo discover rl test bench check format journeys chaos slurm clean

help:  ## this list
	@echo "usage: make TARGET [CONFIG=examples/tiny.yaml] [ARGS=\"section.field=value ...\"] [PYTHON=python3]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' Makefile | expand -t 12

setup: $(STAMP)  ## install everything into .venv, with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

pretrain: $(STAMP)  ## the recipe up to pretraining
	$(RUN) run "$(CONFIG)" --until pretrain $(ARGS)

sft: $(STAMP)  ## the recipe up to fine-tuning
	$(RUN) run "$(CONFIG)" --until sft $(ARGS)

mpo: $(STAMP)  ## the recipe up to preferences, which tiny.yaml leaves out: ARGS="mpo.steps=200 mpo.optimizer.lr=1e-4"
	$(RUN) run "$(CONFIG)" --until mpo $(ARGS)

discover: $(STAMP)  ## the recipe up to the expert clusters
	$(RUN) run "$(CONFIG)" --until discover $(ARGS)

rl: $(STAMP)  ## the whole recipe: pretraining, fine-tuning, expert clusters, RL, accuracies before and after, report
	$(RUN) run "$(CONFIG)" $(ARGS)

test: $(STAMP)  ## the tests: unit, parallel, architecture, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not journey" --numprocesses 2 $(ARGS)

bench: $(STAMP)  ## the benchmarks against their peers, half an hour or more; ARGS="--only generation" for one
	$(BIN)/python tools/bench/all.py $(ARGS)

journeys: $(STAMP)  ## the long tests: whole recipes as a user types them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m journey --timeout 1800 $(ARGS)

chaos: $(STAMP)  ## kills and stops, at random, what a run is made of, and compares what comes out with an undisturbed run; a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python tools/chaos/chaos.py $(ARGS)

slurm: $(STAMP)  ## the tests of SLURM jobs, on a cluster of this machine; needs its packages: tools/slurm_local/cluster.sh install, as root
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/journeys/test_slurm.py $(ARGS)

check: $(STAMP)  ## lint, format, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
