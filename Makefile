# make train   installs what is missing, builds the embedded corpus, trains, evaluates, exports
# make test    installs what is missing, runs the CPU test suite
# ARGS="..."   is handed on: make train ARGS="train.num_steps=200", make test ARGS="-k packing"

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: train test test-quickstart gpu bench lint clean

train: $(VENV)/installed
	deepspeed launch/train.py --ds_config configs/zero3.json $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not gpu and not multi_gpu and not slurm and not slow" $(ARGS)

test-quickstart: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests/test_quickstart.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 13) else f"error: {sys.executable} is Python {v.major}.{v.minor}; TokenFLEX runs on 3.10 to 3.12: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,mpi,dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info

# GPU tests and kernel microbenchmarks on a machine with no more than torch, Triton and pytest, in under ten minutes;
# writes docs/results/kernels-<device>.json and .svg. No conftest: it belongs to the trainer and its packages.
GPU_TESTS := tests/kernels/test_kernel_gpu.py tests/model/test_attention.py tests/model/test_liger.py \
             tests/benchmarks/kernels/test_bench_kernels.py
gpu bench: export BENCH_SECONDS ?= 300
gpu bench:
	PYTHONPATH=kernels:. timeout --foreground -k 20 -s INT 570 python3 -m pytest -s --noconftest -m "gpu and not slow" $(GPU_TESTS) $(ARGS)
