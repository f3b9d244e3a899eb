# `make train` and `make test` need a bare Python >= 3.11 and nothing else: each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint bench clean

train: .venv/ready  ## the embedded three-phase run on a CPU, about ten minutes
	$(BIN)/python train.py

test: .venv/ready .venv/triton-3.6.0
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m bench

# torch goes in first, by itself: resolved together with the rest, a newer build of several gigabytes could be
# taken instead.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# The Triton of torch 2.11, unpacked beside the environment's own: tests compile the kernels with both.
.venv/triton-3.6.0: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0

clean:
	rm -rf .venv runs
