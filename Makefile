# Two commands from a fresh clone: `make demo` and `make test`. Both share .venv and build/.
PYTHON ?= python3
RANKS  ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SHELL  := /bin/bash

.PHONY: help setup demo claims test test-slow lint clean

help:
	@echo "make demo       micro world -> shards -> stage 1 -> stage 2 -> evaluation (about 13 minutes, set-up included)"
	@echo "make claims     the papers' claims put to the micro world -> docs/claims.md (well over an hour)"
	@echo "make test       the tests, on tiny random models (minutes)"
	@echo "make test-slow  what takes longer: the demo's pipeline, checked"
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
		'. examples/micro/world.sh && python -m examples.micro.claims $(if $(SEEDS),--seeds $(SEEDS))'

test: $(READY)
	$(BIN)/python -m pytest --durations=10

test-slow: $(READY)
	$(BIN)/python -m pytest -m 'slow and not gpu' --durations=10 --timeout=2400

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror

clean:
	rm -rf build runs mlflow.db mlruns
