# Two commands for a fresh machine: `make serve` and `make test`. Both are quick the second time.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
JOBS ?= 2
# A package index for torch alone, as https://download.pytorch.org/whl/cpu; empty: pip's own.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A torch that already sees a GPU is kept: it fits the driver.
HAS_CUDA_TORCH = $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
HAS_GPU = nvidia-smi >/dev/null 2>&1
GPU_TORCH := torch>=2.11,<2.16
CPU_TORCH := torch==2.13.0
# For the interpreter in which tests run the GPU's kernels; a torch for GPUs brings its own. xgrammar brings
# the newest, whose interpreter may not run them.
CPU_TRITON := triton==3.7.1

.DEFAULT_GOAL := help
.PHONY: help serve test lint lossless structured test-clients test-suites test-page check-numbers check-monitoring check-image \
	check-kubernetes check-ray faults fuzz soak audit bench bench-gpu bench-policies bench-trees bench-offload bench-overload \
	bench-connections models clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(STAMPS)/installed models ## Serve the default model: HOST, PORT, ARGS="--draft self:6 ..."
	$(BIN)/disco-serve serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMPS)/dev models ## Run the tests, in JOBS processes (ARGS are pytest's)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lossless: $(STAMPS)/dev models ## Run every losslessness test, and the full identity run (hours on 2 cores)
	$(BIN)/python -m pytest tests/lossless
	$(BIN)/python tests/lossless/acceptance.py $(ARGS)

structured: $(STAMPS)/dev models ## Check 200 random JSON schemas, with and without speculation
	$(BIN)/python tests/lossless/structured.py $(ARGS)

test-clients: $(STAMPS)/installed models ## Run other people's clients against a live server (PyPI, npm)
	$(BIN)/python tests/clients/run.py $(ARGS)

test-suites: $(STAMPS)/installed models ## Run lm-eval, guidellm, aiperf and schemathesis against a live server
	$(BIN)/python tests/suites/run.py $(ARGS)

test-page: $(STAMPS)/installed models ## Use the live page in headless Chromium (npm; Debian's chromium)
	$(BIN)/python tests/page/run.py $(ARGS)

check-numbers: $(STAMPS)/installed models ## Hold 200 answers' tokens to the server's metrics, exactly
	$(BIN)/python tests/suites/check_numbers.py $(ARGS)

check-monitoring: $(STAMPS)/dev models ## Ask every dashboard's and alert's query of a real Prometheus (Debian's)
	$(BIN)/python tests/suites/monitoring.py $(ARGS)

check-image: $(STAMPS)/installed models ## Build the CPU image with buildah and try it (as root; Debian's buildah, debootstrap, runc)
	$(BIN)/python docker/build_check.py $(ARGS)

check-kubernetes: $(STAMPS)/dev ## Render and validate the manifests (kubectl)
	$(PIP) install -r deploy/kubernetes/requirements.txt
	$(BIN)/python deploy/kubernetes/check.py

check-ray: $(STAMPS)/dev models ## Two replicas on Ray Serve, one killed
	$(PIP) install --editable ".[ray]"
	$(BIN)/python deploy/ray/check.py $(ARGS)

faults: $(STAMPS)/dev models ## Inject every fault, and kill the engine 100 times
	$(BIN)/python tests/fault/table.py --json out/faults/table.json
	$(BIN)/python tests/fault/kills.py --json out/faults/kills.json

fuzz: $(STAMPS)/dev models ## Send 20,000 mutated requests and raw garbage
	$(BIN)/python tests/fault/fuzz_http.py $(ARGS)

soak: $(STAMPS)/dev models ## Half an hour of 32 clients that do everything
	$(BIN)/python benchmarks/soak.py $(ARGS)

audit: $(STAMPS)/installed ## What is known of the dependencies (PyPI), and a list of them (CycloneDX)
	$(PYTHON) -m venv out/audit && out/audit/bin/pip install -q -r deploy/requirements-audit.txt
	out/audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o out/audit/sbom.json
	out/audit/bin/pip-audit --strict --no-deps --disable-pip -r docker/requirements.txt

lint: $(STAMPS)/dev ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMPS)/dev models ## Measure against transformers on this machine
	$(BIN)/python benchmarks/cpu_pair.py $(ARGS)

bench-gpu: $(STAMPS)/dev models ## Measure kernels, a widened pair, transformers and HTTP on this GPU
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-trees: $(STAMPS)/dev models ## Token trees beside chains, by budget
	$(BIN)/python benchmarks/trees.py $(ARGS)

bench-offload: $(STAMPS)/dev models ## A target larger than the GPU
	$(BIN)/python benchmarks/offload.py $(ARGS)

bench-overload: $(STAMPS)/dev models ## What four times too much load does
	$(BIN)/python benchmarks/overload.py $(ARGS)

bench-connections: $(STAMPS)/dev models ## 10,000 idle connections and 500 slow readers beside one client
	$(BIN)/python benchmarks/connections.py $(ARGS)

bench-policies: $(STAMPS)/dev models ## Measure every stop policy side by side, alone and under load
	$(BIN)/python benchmarks/policies.py $(ARGS)
	$(BIN)/python benchmarks/policy_load.py $(ARGS)

models: $(STAMPS)/installed ## Fetch the default model
	@$(BIN)/disco-serve models pull smollm2

clean: ## Remove the virtual environment and what the tools left (fetched models stay)
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find server engine classifiers tests benchmarks deploy docker -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	if $(HAS_CUDA_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	mkdir -p $(STAMPS) && touch $@

# First, and by itself, so that the rest takes the build that was chosen here.
$(STAMPS)/torch: $(STAMPS)/venv
	if $(HAS_GPU); then torch="$(GPU_TORCH)"; else torch="$(CPU_TORCH)"; fi; \
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$torch"
	touch $@

$(STAMPS)/installed: pyproject.toml $(STAMPS)/torch
	$(PIP) install --editable .
	touch $@

$(STAMPS)/dev: $(STAMPS)/installed
	$(PIP) install --editable ".[dev]"
	$(BIN)/python -c "import sys, torch; sys.exit(torch.version.cuda is None)" || $(PIP) install "$(CPU_TRITON)"
	touch $@
