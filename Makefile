# Every verb sets up what it needs; nothing outside this folder is written.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHROMIUM := /usr/bin/chromium
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint format types soak compat mutants sanitize arm bench bench-peers bench-guard docs wheel try-wheel clean test-page

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmserve needs Python 3.11 or newer, found %s" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# What the demo needs; a complete set-up contains it.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (about a minute)"
	$(PIP) install -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing everything into $(VENV) (one to two minutes)"
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.demo $@

setup: $(VENV)/.dev  ## .venv with everything for development

demo: $(VENV)/.demo  ## train, quantize, serve, load-test (ARGS=--once: then exit)
	@$(BIN)/llmserve demo $(ARGS)

test: $(VENV)/.dev  ## all tests but the soak
	$(BIN)/python -m pytest $(ARGS)

test-page: $(VENV)/.dev | $(CHROMIUM)  ## the page in a real browser: Chromium from Debian's package
	$(BIN)/python -m pytest tests/integration/page $(ARGS)

$(CHROMIUM):
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium

soak: $(VENV)/.dev  ## the long tests: engines killed, overload, chaos, a million random operations (docs/reliability.md)
	$(BIN)/python -m pytest -m soak $(ARGS)

compat: $(VENV)/.dev  ## other people's clients against a server, each in its own environment
	$(BIN)/python tests/compat/run.py $(ARGS)

mutants: $(VENV)/.dev  ## break the engine's rules in turn: a test must catch each
	$(BIN)/python tests/mutation/engine_rules.py $(ARGS)

sanitize: $(VENV)/.dev  ## the kernels' tests under the address, undefined-behaviour and thread sanitizers
	bash tests/sanitize/sanitize.sh address $(ARGS)
	bash tests/sanitize/sanitize.sh thread $(ARGS)

arm: $(VENV)/.dev  ## the kernels' tests on an Arm processor, played by qemu
	bash tests/arm/arm.sh $(ARGS)

check:  ## exactly what CI runs
	bash .ci/run

lint: $(VENV)/.dev  ## style, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell

format: $(VENV)/.dev  ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev  ## static types
	$(BIN)/mypy llmserve training export server benchmarks

bench: $(VENV)/.demo  ## offline throughput of the demo's model against a plain loop
	$(BIN)/llmserve bench throughput demo-run/train/model --concurrency 1,4,16 --baseline plain $(ARGS)

bench-peers: $(VENV)/.demo  ## ours and other programs on one model (MODEL=models/M SHAPE=M ARGS='--llama-cpp DIR ...')
	$(BIN)/llmserve bench peers $(MODEL) --shape $(SHAPE) --out docs/results $(ARGS)

bench-guard: $(VENV)/.dev  ## fail if the checkout costs more than a commit (BASE=HEAD): instructions, or times in turn
	$(BIN)/python tests/guard/run.py --base $(or $(BASE),HEAD) $(ARGS)

docs: $(VENV)/.dev  ## write docs/cli.md from the parsers, other pages' figures from results
	$(BIN)/python docs/generate.py

wheel: $(VENV)/.dev  ## dist/llmserve-*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation -o dist . > /dev/null
	@ls dist/*.whl

try-wheel: wheel  ## install the wheel in a clean environment and use it
	bash tests/packaging/try_wheel.sh dist/*.whl

clean:  ## remove what the other verbs made, .venv and the demo's run too
	rm -rf $(VENV) build dist *.egg-info demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis
