# Everything a newcomer needs; each target installs what it needs first.
PYTHON ?= python3
PORT ?= 8000
USERS ?= 8
SECONDS ?= 60
LOCUST ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help setup setup-dev serve test lint format bench loadtest compose-test test-clients train-pair clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(INSTALLED) ## install the service into .venv

setup-dev: $(INSTALLED_DEV) ## the same, with what tests, linters and training need

serve: $(INSTALLED) ## serve the bundled pair on 127.0.0.1 (PORT=8000)
	$(BIN)/diffuspec serve --port $(PORT)

test: $(INSTALLED_DEV) ## run the tests
	$(BIN)/python -m pytest -q

lint: $(INSTALLED_DEV) ## style, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## compare plain and speculative decoding side by side; writes reports/
	$(BIN)/diffuspec bench

loadtest: $(INSTALLED) ## load a server on 127.0.0.1 for a minute (PORT=8000); writes reports/loadtest.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[loadtest]"
	$(BIN)/python deploy/loadtest/run.py --url http://127.0.0.1:$(PORT) --users $(USERS) --seconds $(SECONDS) -- $(LOCUST)

compose-test: $(INSTALLED_DEV) ## build, start and try the compose deployment; needs Docker
	$(BIN)/python -m pytest -q -p no:cacheprovider deploy/tests

test-clients: $(INSTALLED) ## try litellm, langchain-openai, schemathesis and others against a server (an environment of its own)
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r tests/e2e/clients/requirements.txt
	$(BIN)/python tests/e2e/clients/serve_and_run.py .venv-clients/bin/python $(CLIENTS)

train-pair: $(INSTALLED_DEV) ## train the bundled pair again (hours on a CPU; resumable)
	$(BIN)/python -m models.training all

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis reports


$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.13,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/diffuspec compile
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,lint]"
	@touch $@
