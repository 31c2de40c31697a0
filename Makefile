# Every target installs what it needs into .venv, pinned by constraints.txt, and again only when pyproject.toml or
# constraints.txt changes. Arguments: make train ARGS="--task text". Another interpreter: make train PYTHON=python3.12.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --no-compile -c constraints.txt

# Installing without compiling takes half the time; so that it costs no later start, what is imported must be cached.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train bench curves docs test test-frameworks test-pytorch test-gpu test-slow lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

train: .venv/.train ## train a model: onepass train $(ARGS)
	@$(BIN)/onepass train $(ARGS)

bench: .venv/.train ## time the optimizers: onepass bench $(ARGS)
	@$(BIN)/onepass bench $(ARGS)

curves: .venv/.train ## measure what docs/how-to-choose.md shows: every algorithm on two tasks, about 20 minutes
	@$(BIN)/python benchmarks/curves.py $(ARGS)

docs: .venv/.dev ## build the documentation: site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: lint docs ## format, lint, types, documentation and all quick tests: pytest $(ARGS)
	@$(BIN)/python -m pytest -n auto $(ARGS)

test-frameworks: .venv/.frameworks ## the tests which run accelerate, lightning, transformers, timm and others
	@$(BIN)/python -m pytest -m frameworks $(ARGS)

test-pytorch: .venv/.dev ## PyTorch's own optimizer tests: make test-pytorch FOLDER=the folder test of PyTorch's source code
	@$(BIN)/python tests/support/pytorch_suite.py "$(FOLDER)" $(ARGS)

test-gpu: .venv/.dev ## the tests which need a GPU
	@$(BIN)/python -m pytest -m gpu tests/test_cuda.py $(ARGS)

test-slow: .venv/.dev ## the tests which take long
	@$(BIN)/python -m pytest -m "slow and not frameworks and not gpu" $(ARGS)

lint: .venv/.dev ## ruff format --check, ruff check, basedpyright
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/basedpyright

format: .venv/.dev ## format the code and mend what ruff can
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

clean: ## remove caches and built packages; .venv and runs stay
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	@find . \( -name .venv -o -name .git \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

.venv/.train: EXTRAS := train
.venv/.dev: EXTRAS := dev
.venv/.frameworks: EXTRAS := test,frameworks
# timm without its torchvision, whose builds on package indexes do not load with torch's build for the CPU.
.venv/.frameworks: ALONE := timm
.venv/.train .venv/.dev .venv/.frameworks: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing onepass[$(EXTRAS)] into .venv (the first time takes a minute or two) ..."
	@$(INSTALL) -e '.[$(EXTRAS)]'
	$(if $(ALONE),@$(INSTALL) --no-deps $(ALONE))
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "onepass needs Python 3.10 or newer, but PYTHON=$(PYTHON) is %d.%d: choose another with make PYTHON=..." % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv
