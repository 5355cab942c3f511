# make pretrain   set up .venv, prepare the default corpus and pretrain a small mixture of experts on it
# make test       set up .venv, lint, type-check and test
# make test-cluster   the tests on a cluster of two hosts, which needs root
# make help       the other targets
#
# PYTHON=python3.12 make pretrain   chooses the interpreter of .venv (3.10 or newer)

PYTHON ?= python3
RECIPE ?= examples/pretrain.yaml
PROCESSES ?= 2
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell grep -m 1 '^torch==' constraints.txt)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Child processes (the deepspeed launcher, its ranks, pyright) find the venv's programs first.
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: help setup pretrain test test-cluster debian lint format clean

help:
	@echo "make pretrain   prepare the default corpus (once) and pretrain $(RECIPE) on $(PROCESSES) processes"
	@echo "make test       ruff, pyright and every test"
	@echo "make test-cluster   every launcher, and faults, on a Slurm cluster of two hosts made of namespaces (root)"
	@echo "make debian     install the Debian packages that tests use (root)"
	@echo "make lint       ruff and pyright only"
	@echo "make format     let ruff rewrite the sources"
	@echo "make setup      create .venv and install (the others do it when needed)"
	@echo "make clean      remove .venv and caches; data/ and runs/ stay"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no $(PYTHON) here: set PYTHON to a Python 3.10 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $$("$(PYTHON)" --version 2>&1) is too old: set PYTHON to a Python 3.10 or newer" >&2; exit 1; }
	@test -x "$(BIN)/python" || { echo "== creating .venv with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv "$(VENV)"; }
	@echo "== installing $(TORCH), then megasparse and the versions in constraints.txt (a few minutes)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$(TORCH)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"

pretrain: $(INSTALLED)
	@echo "== preparing data/stdlib (nothing to do the second time)"
	@megasparse prepare --output data/stdlib
	@echo "== pretraining $(RECIPE) on $(PROCESSES) processes"
	@deepspeed --num_gpus $(PROCESSES) --log_level error --module megasparse train $(RECIPE)

test: $(INSTALLED) lint
	@echo "== pytest"
	@python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-cluster: $(INSTALLED) debian
	@if [ "$$(id -u)" != 0 ]; then echo "skipped: the tests on two hosts need root, for namespaces and slurmd"; exit 0; fi; \
		tests/cluster/two_hosts.sh python -m pytest -q -p no:cacheprovider --durations=5 tests/cluster $(PYTEST_ARGS)

# chromium shows reports; the others are the cluster's.
DEBIAN := chromium iproute2 munge openssh-server pdsh slurm-client slurmctld slurmd
debian:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(DEBIAN) >/dev/null 2>&1; then \
		echo "== installing $(DEBIAN)"; \
		apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
			--no-install-recommends $(DEBIAN) >/dev/null; fi

lint: $(INSTALLED)
	@echo "== ruff"
	@ruff check .
	@ruff format --check .
	@echo "== pyright"
	@pyright

format: $(INSTALLED)
	@ruff check --fix .
	@ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
