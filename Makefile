# Everything starts from Python 3.11+, make and git. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# uv from the machine where there is one, else from a small environment of our own: pip installs it into .uv/.
UV     := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

.PHONY: help setup demo test check federated crash fix docs bench clean

help:
	@echo "make demo   set up, then run the main job on a generated data set (about a minute)"
	@echo "make test   set up, then run the tests"
	@echo "make setup  the set-up alone, into .venv"
	@echo "make check  ruff, mypy, import contract, generated docs, tests"
	@echo "make federated  real servers and sites on this machine, killed and started again (minutes)"
	@echo "make crash  kill real trainings again and again, resume them, compare (many minutes)"
	@echo "make fix    let ruff format and mend what it can"
	@echo "make docs   write docs/configuration.md again from the code"
	@echo "make bench  run the benchmarks (minutes; results in benchmarks/results/)"

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

# Remade only when what it is made from changes, so that a second call is instant.
$(VENV)/.ready: pyproject.toml constraints.txt | $(filter .uv/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/ml-demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m ml_src.core.reference --check
	$(BIN)/python -m pytest -n 2 --dist loadgroup

federated: setup
	ML_SRC_WHOLE_FEDERATION=1 $(BIN)/python -m pytest tests/federated

crash: setup
	$(BIN)/python tests/crash/crash.py

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m ml_src.core.reference

bench: setup
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .uv dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
