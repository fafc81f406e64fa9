# One verb each. `make demo` and `make test` need Python 3.10+, make and a C++ compiler; they make
# the environment in .venv/ themselves.
PYTHON ?= python3
VENV ?= .venv
SERVING ?= .venv-serving
TORCH ?= torch==2.13.0
# Without a GPU the CPU build of torch is taken where that index can be reached: it is smaller by
# several GB. TORCH_INDEX= (empty) asks the configured indexes alone.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
JOBS ?= auto
# Without a GPU one architecture shows that the CUDA ops compile. A wheel has all of them.
export T4R_FAST_CUDA_ARCHS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo 90a)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)
C_FILES := '*.cpp' '*.h' '*.cu' '*.cuh'

.PHONY: setup build test test-fast cuda-on-cpu mutate-cuda sanitize lint check fmt demo doctor bench bench-table bench-micro \
        bench-t4rec gpu gpu-budget roofline nox nvtabular-env clean

setup: $(VENV)/.installed

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) has no venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PIP) install -q --retries 1 $(addprefix --extra-index-url ,$(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(PIP) install -q "setuptools>=77" wheel "cmake>=3.24" ninja "pybind11>=2.13"
	$(PIP) install -q --no-build-isolation -e ".[test,lint]"
	@touch $@

build: setup

demo: setup
	$(BIN)/t4r-fast demo

# One thread per test process: OpenMP teams of several processes slow each other down many times.
test: setup cuda-on-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test-fast: setup cuda-on-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

# Against a real Triton Inference Server and onnxruntime, in an environment of its own: the wheel that carries the
# server needs numpy 1. t4r_fast itself is this checkout, as `setup` has built it.
.PHONY: test-serving
test-serving: $(SERVING)/.installed
	OMP_NUM_THREADS=1 T4R_FAST_REQUIRE_TRITON=1 PYTHONPATH=$(CURDIR) \
	  $(SERVING)/bin/python -m pytest -o addopts="-q --strict-markers" tests/test_triton.py tests/test_graph.py $(ARGS)

# Latency in process, over HTTP and over Triton; beside Transformers4Rec where T4R_PEER_PYTHON names
# the python of its environment.
.PHONY: bench-serving
bench-serving: $(SERVING)/.installed
	OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 PYTHONPATH=$(CURDIR) $(SERVING)/bin/python -W ignore -m benchmarks.serving $(ARGS)

$(SERVING)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(SERVING)
	$(BIN)/python -c "from importlib.metadata import requires; \
	  print(*(r.partition(';')[0] if '\"serv' in r else r for r in requires('t4r_fast') if 'extra' not in r or '\"serv' in r), \
	  'pytest>=8', sep='\n')" > $(SERVING)/requirements.txt
	$(SERVING)/bin/python -m pip --disable-pip-version-check install -q --retries 1 \
	  $(addprefix --extra-index-url ,$(TORCH_INDEX)) "$(TORCH)" "numpy<2"
	$(SERVING)/bin/python -m pip --disable-pip-version-check install -q -r $(SERVING)/requirements.txt
	@touch $@

# The CUDA ops built by g++ to run on the CPU, without and with sanitizers, for lane cuda-on-cpu.
cuda-on-cpu: setup
	$(BIN)/python tests/cuda_on_cpu/build.py

# Takes out each barrier and each bounds check of the CUDA kernels in turn; the tests must notice.
mutate-cuda: setup
	$(BIN)/python tests/cuda_on_cpu/mutate.py $(ARGS)

# The C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer; needs g++.
sanitize: setup
	$(BIN)/python tests/sanitize.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files $(C_FILES))

check: lint test

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(C_FILES))

doctor: setup
	$(BIN)/t4r-fast doctor

# make bench [OP="tied_softmax_loss item_topk"] [ARGS="--quick"]; docs/benchmarks.md says more.
bench: setup
	$(BIN)/t4r-fast bench $(OP) $(ARGS)

bench-table: setup
	$(BIN)/t4r-fast bench --table

bench-micro: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-enable $(ARGS)

# Against the real Transformers4Rec, whose environment it makes unless T4R_PEER_PYTHON names one.
bench-t4rec: setup
	$(BIN)/python benchmarks/against_t4rec.py $(ARGS)

# GPU kernels compiled for every architecture; fails on spills and on numbers worse than the kept
# ones. ARGS=--every: all of their variants; ARGS=--update: keeps the new numbers. Needs nvcc, no GPU.
gpu-budget: setup
	$(BIN)/python -W ignore benchmarks/gpu_budget.py $(ARGS)

# Predicted times on GPUs that nobody has measured.
roofline: setup
	$(BIN)/python benchmarks/roofline.py $(ARGS)

# On a machine with a GPU: build, test, time; results go to benchmarks/results. Nine minutes.
gpu: setup
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# make nvtabular-env VENV=.venv-nvtabular PYTHON=python3.11: an environment with NVTabular 23.8 and this
# checkout, for `t4r-fast etl --engine nvtabular`; then T4R_NVTABULAR_PYTHON=.venv-nvtabular/bin/python
# lets tests/test_nvtabular.py use it. An old pip: newer ones refuse merlin-dataloader's metadata.
nvtabular-env:
	@test "$(VENV)" != .venv || { echo "error: name another folder: make nvtabular-env VENV=.venv-nvtabular"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: NVTabular 23.8 needs Python 3.11 here; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "pip==23.2.1" "setuptools>=77,<81" wheel
	$(PIP) install -q --retries 1 $(addprefix --extra-index-url ,$(TORCH_INDEX)) -r requirements/nvtabular.txt "$(TORCH)"
	$(PIP) install -q "cmake>=3.24" ninja "pybind11>=2.13"
	T4R_FAST_CUDA=0 $(PIP) install -q --no-build-isolation -c requirements/nvtabular.txt .

# The fast tests on every Python from 3.10 to 3.13 that is on the path; half an hour.
nox: setup
	$(PIP) install -q nox
	TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/nox --envdir .nox $(ARGS)

clean:
	rm -rf $(VENV) $(SERVING) build dist *.egg-info t4r_fast/*.so
