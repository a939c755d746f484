# `make measure` and `make test` do all the set-up there is; both work on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SCALE ?= quick
OUT ?= report
# Real speech features, for problem 05: this package carries them, and none of its code is run.
SPEECH = $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps aeon

.PHONY: measure test lint format checkpoints clean

measure: $(VENV)/installed
	$(BIN)/transformer-problems measure --scale $(SCALE) --out $(OUT)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

checkpoints: $(VENV)/installed
	$(BIN)/python scripts/train_checkpoints.py

clean:
	rm -rf $(VENV) report .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[retrieval,onnx,clinic]'
	$(SPEECH)
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(SPEECH)
	touch $(VENV)/installed $@
