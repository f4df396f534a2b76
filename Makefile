# Every target sets up .venv by itself; `make train` and `make test` are all that a fresh machine
# with Python >= 3.10, make and a C++ compiler needs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CPP_FILES := $(shell find csrc tests/cuda_emulator bench -name '*.h' -o -name '*.cpp' -o -name '*.cu*')
NATIVE_SOURCES := $(shell find csrc -type f) setup.py setup_cuda.py pyproject.toml

.PHONY: train test test-torch bench peers gate gpu-check lint format sanitize mutate clean

train: $(READY)
	$(PY) examples/train_gpt.py --out runs/train_gpt

# Several processes share the cores: threads that wait must sleep, which halves the time.
test sanitize mutate: export OMP_WAIT_POLICY := passive

test: $(READY)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --cov --cov-report=term --cov-fail-under=90

# The core tests with another torch, such as `make test-torch TORCH=2.6.0`, in .venv-torch-2.6.0,
# which takes several GB where that torch brings CUDA. Results in runs/torch-2.6.0.
test-torch:
	@test -n "$(TORCH)" || { echo "which torch? make test-torch TORCH=2.6.0" >&2; exit 2; }
	bash tests/torch_version.sh $(TORCH) $(PYTHON)

# Figures of this machine, in bench/results and the documents; about an hour on a quiet one.
bench: $(READY)
	bash bench/figures.sh $(PY)

# What other packages offer on a CPU, to be measured beside fusedopt.
peers: $(READY)
	$(PY) -m pip install -q -c constraints.txt bitsandbytes deepspeed pytorch_optimizer torch-optimi torchao

# Ratios to torch's fused step, with a wide margin; alone on the machine.
gate: $(READY)
	$(PY) -m pytest -q -m timing tests/test_gate.py

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

# torch first and from the constraints, so that no other package brings in another build of it.
$(VENV)/.deps: constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt triton
	$(PY) -m pip install -q -c constraints.txt ninja numpy setuptools pybind11 wheel
	touch $@

# While the extension is built, where make may do two things at once.
$(VENV)/.tools: $(VENV)/.deps
	$(PY) -m pip install -q -c constraints.txt build clang-format expecttest hypothesis matplotlib mypy \
	  pre-commit pytest pytest-cov pytest-xdist rich ruff typer
	$(PY) -m pip install -q -c constraints.txt accelerate keras lightning transformers
	touch $@

$(VENV)/.native: $(VENV)/.deps $(NATIVE_SOURCES)
	FUSEDOPT_REQUIRE_NATIVE=1 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(READY): $(VENV)/.native $(VENV)/.tools
	touch $@

clean:
	rm -rf build dist *.egg-info fusedopt/_C*.so
