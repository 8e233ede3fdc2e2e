# Needs Python 3.11 or later, Rust and the package registries. Everything else goes to .venv, target and dist.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo build test lint-rust test-rust lint-python test-python test-wheel wheel bench test-clients sanitize gpu-env test-gpu test-gpu-kernels test-gpu-engine sanitize-gpu bench-gpu format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOGS := target/logs
MATURIN := env -u CONDA_PREFIX VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin
RUST := $(shell git ls-files rust 'Cargo.*' 2>/dev/null)

help: ## Say what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: build ## Run the embedded example: ten adapters and the base in one batch
	$(BIN)/slora demo

build: $(VENV)/.built ## Set up .venv and build slora into it

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; hint: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip 'maturin>=1.13,<2'
	touch $@

# Installs slora's own dependencies, too.
$(VENV)/.built: $(VENV)/.created pyproject.toml $(RUST)
	$(MATURIN) develop --release
	touch $@

$(VENV)/.tools: $(VENV)/.created pyproject.toml
	$(BIN)/pip install --quiet --group test
	touch $@

test: lint-rust test-rust lint-python test-python test-wheel ## Everything that runs without a GPU
	@echo; echo "cargo test:"; grep '^test result' $(LOGS)/cargo-test.txt
	@echo; echo "pytest:"; tail -n 1 $(LOGS)/pytest.txt

lint-rust:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

test-rust:
	mkdir -p $(LOGS)
	cargo test --workspace 2>&1 | tee $(LOGS)/cargo-test.txt

lint-python: $(VENV)/.built $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest slora._core --mypy-config-file pyproject.toml

test-python: $(VENV)/.built $(VENV)/.tools
	mkdir -p $(LOGS)
	$(BIN)/python -m pytest 2>&1 | tee $(LOGS)/pytest.txt

wheel: $(VENV)/.created ## Build the one wheel, for Python 3.11 and later
	rm -rf dist
	$(MATURIN) build --release --out dist

# The wheel's own dependencies take gigabytes (torch), so the clean environment sees .venv's packages behind its own. The
# folder is only put on the path: .venv's own installation of slora, which is a .pth file there, is not seen.
test-wheel: wheel $(VENV)/.built
	rm -rf target/wheel-env
	$(BIN)/python -m venv target/wheel-env
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(target/wheel-env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
	target/wheel-env/bin/pip install --quiet --no-deps --no-index dist/slora-*.whl
	cd target/wheel-env && bin/python -I ../../tests/wheel.py && bin/slora demo --device cpu

format: $(VENV)/.tools ## Format Rust and Python
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.built $(VENV)/.tools ## Measure bookkeeping, packing and generation on the CPU
	cargo bench --workspace
	$(BIN)/python benches/python/generate.py

test-clients: $(VENV)/.built $(VENV)/.tools ## LiteLLM and lm-evaluation-harness against the server; 900 MB more in .venv
	$(BIN)/pip install --quiet --group clients
	$(BIN)/python -m pytest tests/python/test_litellm.py tests/python/test_lm_eval.py

sanitize: $(VENV)/.built $(VENV)/.tools ## The emulated kernels under ThreadSanitizer and AddressSanitizer; needs no GPU
	$(BIN)/python tests/python/sanitize.py thread
	$(BIN)/python tests/python/sanitize.py address

# Where there is a GPU but no Rust, no history, or torch lies elsewhere:
#     make bench-gpu WHEEL=dist/slora-….whl GPU_PYTHON=python3 COMMIT=… [BENCHES="step serving"]
GPU_ENV := target/gpu-env
GPU_PYTHON ?= $(BIN)/python
WHEEL ?=
TOOL ?= both
OUT ?= benches/results
BENCHES ?= ops attention lora alternatives step serving generation

# As in test-wheel, but without pip, which may be missing there: a wheel is an archive of what lies in site-packages.
gpu-env: $(if $(WHEEL),,wheel) $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.built $(VENV)/.tools)
	rm -rf $(GPU_ENV)
	$(GPU_PYTHON) -m venv --without-pip $(GPU_ENV)
	site=$$($(GPU_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(GPU_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$site/behind.pth; \
	$(GPU_PYTHON) -m zipfile -e $(or $(WHEEL),dist/slora-*.whl) $$site
	$(GPU_ENV)/bin/python -I -c 'import slora; print(f"the wheel of slora {slora.__version__} is in {slora.__file__}")'

# In two parts, of some minutes each, for where a command may not take long. The first is what only a device has: kernels,
# steps, failures; the second the engine's behaviour, which the CPU has, too.
test-gpu: test-gpu-kernels test-gpu-engine ## Tests that need a CUDA device, of the installed wheel

test-gpu-kernels: gpu-env
	$(GPU_ENV)/bin/python -m pytest tests/gpu

test-gpu-engine: gpu-env
	$(GPU_ENV)/bin/python -m pytest tests/python --device=cuda

sanitize-gpu: gpu-env ## The kernels' tests under compute-sanitizer; TOOL=memcheck, racecheck or both
	tests/gpu/sanitizer.sh $(GPU_ENV)/bin/python $(TOOL)

bench-gpu: gpu-env ## Measure kernels, steps and swap-ins of the installed wheel on a CUDA device, into OUT
	mkdir -p $(OUT)
	for bench in $(BENCHES); do \
	  $(GPU_ENV)/bin/python benches/kernels/$$bench.py --out $(OUT)/gpu-$$bench.json; \
	done

clean: ## Remove what was built
	rm -rf $(VENV) target dist
