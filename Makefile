# `make train` and `make test` install what they need on first use; README.md has the plain commands.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
BENCHES = load train gpu_train lora preferences capability encode bpe startup dedupe weightdiff decode gpu_decode quantize demo

.PHONY: help train tour farm real test test-robust test-all verify lint typecheck bench clean

help:
	@echo "make train        fine-tune the embedded model (a minute on two cores)"
	@echo "make tour         the whole road, from seed tasks to a compared model, offline"
	@echo "make farm         the tiny model learns from preferences, by each method (ten minutes)"
	@echo "make real         tune SmolLM2-135M, a published model (98 MB; a quarter of an hour)"
	@echo "make test         the tests (under three minutes on two cores)"
	@echo "make test-robust  kills, fuzzing, load, several processes, a browser"
	@echo "make test-all     every test, also those that take minutes or gigabytes"
	@echo "make verify       only the comparisons with other software, and the distances"
	@echo "make lint         style; make typecheck: types; both as CI checks them"
	@echo "make bench        measure against the peers, into bench/results"
	@echo "make clean        remove the environment"

train: $(VENV)/.ready
	$(BIN)/python fsdp_train.py

tour: $(VENV)/.ready-test
	rm -rf runs/tour
	PYTHONPATH=tests $(BIN)/python -m helpers.tour --out runs/tour

farm: $(VENV)/.ready
	$(BIN)/python -m bench.farm

real: $(VENV)/.ready
	rm -rf runs/real
	$(BIN)/python -m bench.real

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-robust: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "robust and not slow" -n auto --maxprocesses 2 --dist loadfile

test-all: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m ""

verify: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -m "parity and not slow"

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.ready-test
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Every script prints its tables, and keeps them in the file of the day; then, what may be quoted.
bench: $(VENV)/.ready-bench
	@test -d runs/tiny/model || $(BIN)/torchrun fsdp_train.py
	@for script in $(BENCHES); do $(BIN)/python -m bench.$$script || exit 1; done
	@$(BIN)/python -m bench.measure

clean:
	rm -rf $(VENV) *.egg-info

# One environment with as many extras as asked for: .ready to run, .ready-test, .ready-bench.
$(VENV)/.ready: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e .
	@touch $@

$(VENV)/.ready-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e '.[$*]'
	@touch $@ $(VENV)/.ready

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: sudo apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $@
