# limpet, for people who have cloned it. `make demo` and `make test` need Python 3.10+ and a C++17 compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
SOURCES := $(shell git ls-files 'csrc/*' 'python/*' 'triton_kernels/*' CMakeLists.txt pyproject.toml constraints.txt README.md)

.PHONY: demo test test-slow bench fisher-peers lint format gpu-check wheel clean help

help:            ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip

# One stamp per set of extras: installs again when a source is newer.
$(VENV)/.installed-%: $(BIN)/python $(SOURCES)
	$(PIP) install -q -c constraints.txt '.[$*]'
	@touch $@

demo: $(VENV)/.installed-cli  ## learn Split MNIST task after task and show what was forgotten
	$(BIN)/limpet run --report report

test: $(VENV)/.installed-test  ## every fast test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -p no:benchmark

test-slow: $(VENV)/.installed-test  ## the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.installed-bench  ## time kernels beside torch and peers; one table of ratios
	$(BIN)/python -m pytest benches --benchmark-only -m "not slow"

fisher-peers: $(VENV)/.installed-bench  ## diagonal_fisher beside every other way that is installed: docs/fisher-peers.md
	$(BIN)/python benches/fisher_peers.py --results docs --docs docs $(if $(MODELS),--models $(MODELS))

lint: $(VENV)/.installed-lint $(VENV)/.installed-cli  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed-lint  ## rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

RESULTS ?= gpu-results
gpu-check:  ## on a machine with an NVIDIA GPU, no network needed: build, test and bench everything
	$(PYTHON) benches/gpu_check.py "$(RESULTS)"

wheel: $(BIN)/python  ## build/wheel/limpet-*.whl
	$(PIP) wheel -q --no-deps -w build/wheel .

clean:  ## forget everything built
	rm -rf $(VENV) build dist
