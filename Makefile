# Two commands from a fresh clone: `make demo` and `make test`. Both share .venv and build/.
PYTHON ?= python3
RANKS  ?= 2
INPUTS ?= 100000
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SHELL  := /bin/bash

.PHONY: help setup demo claims test test-slow docs screenshots lint fuzz chaos clean

help:
	@echo "make demo       micro world -> shards -> stage 1 -> stage 2 -> evaluation (about 13 minutes, set-up included)"
	@echo "make claims     the papers' claims put to the micro world -> docs/claims.md (70 minutes)"
	@echo "make test       the tests, on tiny random models (minutes)"
	@echo "make test-slow  what takes longer: demo and tutorial, two hosts, every recipe (an hour)"
	@echo "make chaos      a run on two hosts under every fault (minutes, root; SEED=N for the same again)"
	@echo "make fuzz       strangers' files, bent: INPUTS (100000) for each reader (an hour)"
	@echo "make docs       the documentation as a site -> build/site"
	@echo "make screenshots  of the demo in MLflow, its report and its page -> docs/img (needs chromium)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make clean      remove what the above made (not .venv)"

setup: $(READY)

# torch first: csrc/ is built against it, without build isolation.
$(READY): constraints.txt setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		setuptools wheel ninja numpy packaging torch torchaudio
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[dev,micro]'
	@# pip hides what the build says; nothing is compiled twice.
	@$(BIN)/python csrc/build.py
	@touch $@

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" RANKS=$(RANKS) bash examples/micro/demo.sh

claims: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash -euo pipefail -c \
		'. examples/micro/world.sh; python -m examples.micro.claims $(if $(SEEDS),--seeds $(SEEDS))'

test: $(READY)
	$(BIN)/python -m pytest --durations=10

test-slow: $(VENV)/.slow
	$(BIN)/python -m pytest -m 'slow and not gpu' --durations=10 --timeout=3600 -n 2 --dist loadfile

# Beyond the rest: the page to talk to a model, who drives a browser to it, and LLMs in 8 bit.
$(VENV)/.slow: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[ui,browser,int8]'
	@touch $@

# Of the demo's runs, for docs/img; needs a Chromium.
screenshots: $(VENV)/.slow
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m examples.micro.screenshots

docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

chaos: $(READY)
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED))

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz all --inputs $(INPUTS)

clean:
	rm -rf build runs mlflow.db mlruns
