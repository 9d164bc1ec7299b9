# Two commands set everything up: `make quickstart` and `make test`. Both make .venv by themselves.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): requirements.txt pyproject.toml
	@echo "installing the pinned requirements into $(VENV) (a minute or two; elsewhere torch brings CUDA: some 3 GB)"
	@$(VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

test: $(READY) ## all tests of everyday length, without network, under ten minutes on two cores
	python -m pytest -n auto --maxprocesses 4

test-all: $(READY) ## the full matrix as well
	python -m pytest -n auto --maxprocesses 4 -m "slow or not slow"

lint: $(READY) ## ruff: check and format
	ruff check .
	ruff format --check .

format: $(READY) ## let ruff mend what it can
	ruff check --fix .
	ruff format .

clean: ## remove the environment and caches; runs and corpora stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
