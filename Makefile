# Everything happens in .venv; pip's own settings (an index, a proxy, a wheel folder) stay in force.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test test-slow lint types benchmark clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,video,dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/priorguide quickstart

test: $(VENV)/.installed lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	MYPYPATH=.typing $(BIN)/mypy --namespace-packages --explicit-package-bases -p priorguide.sample -p priorguide.callbacks -p priorguide.data -p priorguide.train

benchmark: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
