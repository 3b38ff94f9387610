# Every target prints its purpose with `make help`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt integrations/langchain/pyproject.toml integrations/llama_index/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]' \
		-e integrations/langchain -e integrations/llama_index
	touch $@

install: $(STAMP) ## create .venv with everything (pinned by constraints.txt)

demo: $(STAMP) ## the main job: compress generated documents, answer from spans and from text
	$(BIN)/ctxcomp demo

test: $(STAMP) ## style, types and all tests
	$(BIN)/ruff check .
	$(BIN)/mypy ctxcomp_rag integrations/langchain/langchain_ctxcomp integrations/llama_index/llama_index_ctxcomp
	$(BIN)/python -m pytest

golden: $(STAMP) ## parity with the official code only
	$(BIN)/python -m pytest -k golden

test-ray: $(STAMP) ## the job on a Ray cluster of this machine, with kills (minutes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/jobs/slow_ray.py

fix: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

.PHONY: help install demo test golden test-ray fix clean
