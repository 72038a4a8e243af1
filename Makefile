# Every target makes the environment it needs; PYTHON chooses the interpreter, PIP_FLAGS what pip is told.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
SOURCES := latency_profiler service workers migrations tests benchmarks

.PHONY: demo up test check format openapi bench-search bench-latency bench-latency-full
.DEFAULT_GOAL := check

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Secateurs needs Python 3.11 or newer; set PYTHON=…")'
	$(PYTHON) -m venv .venv

# The stamps are older than pyproject.toml when the environment is out of date.
.venv/.all: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e '.[all]'
	touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	touch .venv/.all $@

demo:
	@start=$$(date +%s) && $(MAKE) --no-print-directory .venv/.all && \
	exec $(BIN)/python -m service.demo --install-seconds $$(( $$(date +%s) - start ))

up: .venv/.all
	exec $(BIN)/secateurs up

test: .venv/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: .venv/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && unset SECATEURS_DATABASE_URL && \
	export SECATEURS_HOME="$$home" && \
	$(BIN)/python -m service.admin migrate && $(BIN)/python -m service.admin check && \
	$(BIN)/python -m service.app | diff service/openapi.json - || { echo 'run: make openapi'; exit 1; }

bench-search: .venv/.dev
	$(BIN)/python benchmarks/speed.py

bench-latency: .venv/.dev
	$(BIN)/python benchmarks/latency.py

bench-latency-full: .venv/.dev
	$(BIN)/python benchmarks/latency.py --full

openapi: .venv/.dev
	$(BIN)/python -m service.app > service/openapi.json.new && mv service/openapi.json.new service/openapi.json

format: .venv/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
