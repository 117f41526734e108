PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-compat
LLAMA := $(VENV)/.llama-cpp
NATIVE := $(VENV)/.native
# llama.cpp's kernels for AMX crash; built without them, it can lay 4-bit weights out for the CPU
NO_AMX := $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

.DEFAULT_GOAL := help
.PHONY: help setup native demo test sanitize lint bench figures frontier compat clean

help: ## these lines
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(STAMP) $(NATIVE) ## a virtual environment with everything in it (some minutes, once)

# torch by itself first: the plain release for CPUs where one is at hand, not gigabytes for GPUs
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[train,eval,remote,server,dev]" -c constraints.txt
	@touch $@

# the native CPU engine, again where its sources changed; where it cannot be built everything else works
$(NATIVE): $(STAMP) hatch_build.py $(wildcard pastalm/engines/native/src/*)
	@$(PYTHON) hatch_build.py && touch $@ || echo "there is no native engine here: its tests are skipped"

native: ## the native CPU engine alone, compiled where it lies; needs a C++ compiler
	@$(PYTHON) hatch_build.py

# llama.cpp is compiled from source, some minutes; its tests are skipped where that is not possible
$(LLAMA): $(STAMP)
	CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" \
	  $(BIN)/pip install --quiet --disable-pip-version-check -e ".[llama-cpp]" -c constraints.txt \
	  || echo "llama.cpp cannot be built here: its tests are skipped"
	@touch $@

demo: $(STAMP) $(NATIVE) ## one prompt decoded asynchronously, then sequentially, with both times
	$(BIN)/pasta demo

test: lint $(LLAMA) $(NATIVE) ## lint, types, imports, and every test
	@command -v chromium chromium-browser google-chrome >/dev/null \
	  || echo "no Chromium on PATH: the tests of the server's page are skipped (Debian: apt-get install chromium)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

sanitize: $(STAMP) ## the native engine over random plans under the compiler's checks, and for other processors (minutes)
	$(BIN)/python -m pytest -m sanitizers tests/engines

# two environments: LlamaIndex wants an older openai than the others
$(CLIENTS)/.installed: tests/compat/requirements.txt tests/compat/requirements-llama-index.txt
	$(PYTHON) -m venv $(CLIENTS)/all
	$(CLIENTS)/all/bin/pip install --quiet --disable-pip-version-check -r tests/compat/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)/llama-index
	$(CLIENTS)/llama-index/bin/pip install --quiet --disable-pip-version-check -r tests/compat/requirements-llama-index.txt
	@touch $@

compat: $(STAMP) $(CLIENTS)/.installed ## the server through real clients, installed apart in .venv-compat (minutes, once)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m compat tests/compat

lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check pastalm tests runs benchmarks examples docs hatch_build.py
	$(BIN)/ruff format --check pastalm tests runs benchmarks examples docs hatch_build.py
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) $(NATIVE) ## what a thread costs, by number of threads (see benchmarks/)
	$(BIN)/python benchmarks/forkjoin.py --rounds 3

figures: $(STAMP) ## figures of results/ into the documents; with PROMPTS=FILE the shipped adapter is measured first
	$(if $(PROMPTS),runs/shipped.sh $(PROMPTS))
	$(BIN)/python runs/figures.py

frontier: $(STAMP) $(NATIVE) ## PROMPTS=FILE: quality against speed, every adapter and method (an hour); LIMIT=3 tries it
	@test -n "$(PROMPTS)" || { echo "make frontier PROMPTS=FILE: prompts in AlpacaEval's form"; exit 2; }
	runs/frontier.sh $(PROMPTS)
	$(if $(LIMIT),,$(BIN)/python runs/figures.py)

clean: ## what make made
	rm -rf build/native pastalm/engines/native/libpastalm.so pastalm/engines/native/not_built.txt
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
