# make run    trains FedKD and FedAvg and compares them; the first call installs into .venv
# make test   the default test suite
# make check  style, types and the default test suite
# make faults everything that can go wrong, one by one, and what must hold afterwards
# make bench  where the time of a run goes

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test slow check faults bench install

run: install
	$(BIN)/fedkd compare conf/digits_fedkd.yaml conf/digits_fedavg.yaml

test: install
	$(BIN)/python -m pytest -m "not slow"

slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

faults: install
	$(BIN)/python -m pytest -q -m "not slow" tests/integration/faults

bench: install
	$(BIN)/python benchmarks/round_time.py

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
