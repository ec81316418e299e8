# Two things that a newcomer does: `make quickstart`, `make test`. Plain commands for both are in the README.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-lmms lint types install install-dev clean

help:
	@echo "make quickstart   install, write the lab's data, train DPA and vanilla, show both (offline after the install)"
	@echo "make test         install, run the tests"
	@echo "make test-lmms    install lmms-eval into .venv-lmms (1 GB), run it on small tasks, compare its scorers with ours"
	@echo "make lint types   ruff, mypy"

quickstart: install
	$(BIN)/dpa lab make data/lab
	$(BIN)/dpa run recipes/quickstart.yaml

test: install-dev
	$(BIN)/python -m pytest -n 2 tests

# Of its own: lmms-eval pins packages that the constraints hold at other versions.
test-lmms: $(VENV)-lmms/.installed
	$(VENV)-lmms/bin/python -m pytest tests/unit/evaluate/harness tests/unit/benchmarks/test_score_parity.py

$(VENV)-lmms/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,lmms]'
	@touch $@

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dpa needs Python 3.11 or newer; name one: make PYTHON=python3.12 quickstart"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(VENV)-lmms data runs build *.egg-info
