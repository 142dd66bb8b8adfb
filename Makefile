# `make train` and `make test` set up what they need on first use; the raw commands stand in README.md.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BENCHES = load train gpu_train lora encode startup dedupe weightdiff decode gpu_decode quantize demo

.PHONY: help train tour test test-robust test-all verify lint bench clean

help:
	@echo "make train     fine-tune the embedded model (a minute on two cores)"
	@echo "make tour      the whole road, from seeds to a compared model: minutes, offline"
	@echo "make test      the tests; test-robust: kills, load, browser; test-all: these and the slow ones"
	@echo "make verify    only the comparisons with other software, and how far apart they are"
	@echo "make lint      style, as CI checks it"
	@echo "make bench     measure against the peers, into bench/RESULTS.md"
	@echo "make clean     remove the environment"

train: $(VENV)/.ready
	$(BIN)/python fsdp_train.py

tour: $(VENV)/.ready-test
	rm -rf runs/tour
	$(BIN)/python tests/test_pipeline.py --out runs/tour

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest

test-robust: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "robust and not slow"

test-all: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m ""

verify: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -m parity

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every script prints its table; together they are bench/RESULTS.md.
bench: $(VENV)/.ready-bench
	@test -d runs/tiny/model || $(BIN)/torchrun fsdp_train.py
	@rm -f bench/RESULTS.md.partial
	@for script in $(BENCHES); do \
	  $(BIN)/python bench/$$script.py >>bench/RESULTS.md.partial || exit 1; \
	done
	@mv bench/RESULTS.md.partial bench/RESULTS.md && cat bench/RESULTS.md

clean:
	rm -rf $(VENV) *.egg-info

# One environment, filled as far as asked: .ready runs, .ready-test also tests, .ready-bench compares.
$(VENV)/.ready: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.ready-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	@touch $@ $(VENV)/.ready

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: sudo apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@touch $@
