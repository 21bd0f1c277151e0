# make quickstart   set up, then run examples/quickstart (ARGS="..." is passed on)
# make test         the tests that need no GPU
# make check        ruff, mypy and the syntax of the shell scripts
# make setup        only make .venv; EXTRAS=gpu,test adds Transformer Engine, PYTHON=... names the interpreter

SHELL := bash
BIN := .venv/bin
EXTRAS ?= test
WORKERS ?= 2
SCRIPTS := .ci/run $(wildcard tools/*.sh)

.PHONY: help setup quickstart test check clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

setup:
	@tools/setup_env.sh $(EXTRAS)

quickstart: setup
	$(BIN)/megatron-erpd run examples/quickstart/recipe.yaml $(ARGS)

# Distributed tests bring processes of their own: more workers than cores only makes them wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not gpu and not long' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check:
	@tools/setup_env.sh dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	@for script in $(SCRIPTS); do echo "bash -n $$script"; bash -n $$script || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
