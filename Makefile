PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install lint types check test test-dist golden bench build ci

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## install autopar and its development tools at the tested versions
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'

lint:  ## ruff: lint and format check
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## mypy in strict mode
	$(PYTHON) -m mypy

check: lint types  ## lint, types and architecture
	$(PYTHON) -m pytest -q tests/test_architecture.py tests/test_surface.py

test:  ## all tests but the slow ones
	$(PYTHON) -m pytest

test-dist:  ## the tests that start several processes
	$(PYTHON) -m pytest -m dist

golden:  ## rewrite the expected texts; read the diff afterwards
	$(PYTHON) -m pytest -q tests/cli tests/test_readme.py --update-golden

bench:  ## planning times of the examples
	$(PYTHON) benchmarks/planning.py --quick

build:  ## wheel and source archive in dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

ci:  ## what CI does: a fresh clone, a fresh environment, the README's commands
	.ci/run
