# Each target sets up what it needs in .venv; a second call finds the stamp files and starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo bench bench-gpu tables study test test-gpu test-compat lint clean

# Threads that wait must not spin: where another program shares the cores, that slows each step many times over.
demo: $(VENV)/.demo
	OMP_WAIT_POLICY=passive $(BIN)/trady demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# The kernels on a device instead of in the interpreter.
test-gpu: $(VENV)/.dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu tests/ops

# The same suite with the oldest torch and triton that are supported.
test-compat: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest

# Numbers in bench/results; a stopped run goes on. On a GPU: make bench-gpu. For a first look: make bench MODE=quick.
MODE := cpu

# The bars come first, with the wait policy that a user of torch has: lean layers run more and smaller operations, and
# each wakes a thread that sleeps.
bench: $(VENV)/.bench
	$(BIN)/python -m trady_triton.bench.bench_bars --mode $(MODE)
	OMP_WAIT_POLICY=passive $(BIN)/python -m trady_triton.bench --mode $(MODE)

bench-gpu: $(VENV)/.bench
	$(BIN)/python -m trady_triton.bench.bench_bars --mode cuda
	$(BIN)/python -m trady_triton.bench --mode cuda

# The tables of the READMEs from results, and the demo's where `make demo` has run; `make bench` does it as well.
tables: $(VENV)/.bench
	$(BIN)/python -m trady_triton.bench.bench_memory
	$(BIN)/python -m trady_triton.bench.report $(if $(wildcard demo-output/demo.json),--demo demo-output/demo.json)

# docs/paper.md anew, from a folder of images and weights: make study DATA=path. A stopped run goes on.
study: $(VENV)/.demo
	@test -n "$(DATA)" || { echo "make study DATA=path: wanted the folder that bench/specs/*.yaml name files of"; exit 2; }
	OMP_WAIT_POLICY=passive $(BIN)/trady study bench/specs/recordings.yaml --data $(DATA) --out bench/results/paper
	OMP_WAIT_POLICY=passive $(BIN)/trady study bench/specs/rankings.yaml --data $(DATA) --out bench/results/paper/nets
	OMP_WAIT_POLICY=passive $(BIN)/trady experiment bench/specs/paper.yaml --data $(DATA) --out runs/paper --workers 2
	$(BIN)/trady study --results runs/paper/results.csv --out bench/results/paper --page docs/paper.md

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[demo,dev,hf,lightning]"
	touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(BIN)/python $(INSTALL) -c constraints.txt -e ".[demo,bench]"
	touch $@

$(OLDEST)/.dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) "torch==2.11.0" "triton==3.6.0" -e ".[demo,dev,hf,lightning]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST)
