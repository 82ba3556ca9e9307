# What a machine needs: Python 3.11 or newer, and make. Everything else is installed into .venv-* here.

PYTHON ?= python3
PYTEST_FLAGS ?= -n 2
DEV := .venv-dev
DEMO := .venv-demo

.DEFAULT_GOAL := help
.PHONY: help demo test check soak bench overhead peers clean

help: ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1@\2/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(DEMO)/installed ## set up and train on digits, kill the run half way, start it again, compare
	$(DEMO)/bin/python examples/demo.py

test: $(DEV)/installed check ## set up, check and test everything
	$(DEV)/bin/python -m pytest $(PYTEST_FLAGS)

check: $(DEV)/installed ## style, types and floors, without tests
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/pyright --pythonpath $(DEV)/bin/python
	$(DEV)/bin/lint-imports --no-logo --no-cache

soak: $(DEV)/installed ## the campaigns (kills, flips, signals) at their full number; hours
	$(DEV)/bin/python -m pytest -m campaign --soak --timeout=14400 $(PYTEST_FLAGS)

bench: $(DEV)/installed ## what supervision and saving cost, beside what they are measured against; half an hour
	$(DEV)/bin/python -m benchmarks.costs
	$(DEV)/bin/python -m benchmarks.saving
	$(DEV)/bin/python -m benchmarks.boards
	$(DEV)/bin/python -m benchmarks.restarts

overhead: $(DEV)/installed ## the share of a run that saving takes when it may take 3.5 %; ten minutes
	$(DEV)/bin/python -m benchmarks.overhead

peers: $(DEV)/installed ## install the other tools that the saving benchmark compares with
	$(DEV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'

clean: ## remove what was made here
	rm -rf $(DEV) $(DEMO) runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A failed installation leaves no stamp, and is begun anew.
$(DEV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(DEV)
	$(DEV)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(DEV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DEMO)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv --clear $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[examples]'
	touch $@
