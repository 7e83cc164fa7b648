# Each target sets up what it needs in .venv; a second call finds the stamp files and starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

# Threads that wait must not spin: where another program shares the cores, that slows each step many times over.
demo: $(VENV)/.demo
	OMP_WAIT_POLICY=passive $(BIN)/trady demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV)
