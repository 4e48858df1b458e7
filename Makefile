# make run    trains FedKD and FedAvg and compares them; the first call installs into .venv
# make test   the default test suite, in WORKERS=2 processes
# make check  style, types and the default test suite, in as many
# make slow   the tests that start Flower's own processes, one after another
# make nightly  what takes another environment, root or many minutes
# make faults everything that can go wrong, one by one, and what must hold afterwards
# make bench  where the time of a run goes

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: run test slow nightly check faults bench install

run: install
	$(BIN)/fedkd compare conf/digits_fedkd.yaml conf/digits_fedavg.yaml

test: install
	$(BIN)/python -m pytest -m "not slow and not nightly" -n $(WORKERS)

slow: install
	$(BIN)/python -m pytest -m "slow and not nightly"

nightly: install
	$(BIN)/python -m pytest -m nightly

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not nightly" -n $(WORKERS)

faults: install
	$(BIN)/python -m pytest -q -m "not slow and not nightly" tests/integration/faults

bench: install
	$(BIN)/python benchmarks/round_time.py

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
