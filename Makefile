# make quickstart the embedded world: evaluate the bundled base, align it, evaluate again (CPU, minutes)
# make test       lint, types and the fast tests, in a .venv made on first use
# make test-slow  the tests marked slow
# make bench      speed and memory beside their bounds, as ratios of one run
# make test-big   SDXL and SD3.5 medium at their true sizes on the CPU (7 GB of disk, 15 GB of
#                 memory, some 20 minutes)
# make fmt        format the code;  make wheel  build sdist and wheel into dist/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := dev,hub,judges,ocr,quant,ray,serve,torchao
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: quickstart test test-slow bench test-big lint fmt wheel

OUT ?= outputs/quickstart

quickstart: $(STAMP)
	$(BIN)/t2i-align quickstart --out $(OUT)

test: $(STAMP) lint
	$(PYTEST) -n 2

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu and not big" --timeout 1800

bench: $(STAMP)
	$(PYTEST) -m bench

test-big: $(STAMP)
	$(BIN)/python -m pytest -q -s -m big --timeout 3600

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fmt: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m build --no-isolation

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}; use make PYTHON=/path/to/python3.11" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Installed once, and again when what to install has changed.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
