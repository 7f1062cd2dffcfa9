# The two commands to know are `make demo` and `make test`. Each makes .venv first, where it is missing or out of date,
# from exact pins; Python 3.11 or newer and a C++ compiler are all that must be there before.

VENV   := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest -q -n 2 --dist loadscope
PIP    := $(PYTHON) -m pip install --disable-pip-version-check --quiet

# The first interpreter that runs and is new enough: python3.11 is what the pins were tested with.
FIND_PYTHON = for name in python3.11 python3 python3.12 python3.13; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$name; break; fi; done

.DELETE_ON_ERROR:
.PHONY: help demo miniplm real pd-sweep test test-fast test-slow test-long check bench clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.built  ## one student, six ways, on real text; a table and a plot in demo-out/
	$(PYTHON) examples/demo/demo.py

miniplm: $(VENV)/.built  ## MiniPLM on text with planted noise: what is dropped, what it does to a student
	$(PYTHON) examples/miniplm/miniplm.py

real: $(VENV)/.built $(VENV)/.real  ## a real teacher, SmolLM2-135M, and three students of its tokenizer: hours; REAL_SEED, REAL_STEPS
	$(PYTHON) examples/real/real.py

pd-sweep: $(VENV)/.built  ## the design space of pre-training distillation: truncation, temperature, loss, alpha; SWEEP='--only k'
	$(PYTHON) examples/pretraining_distillation/sweep.py $(SWEEP)

test: $(VENV)/.built $(VENV)/.dev  ## every test but the long ones: ten minutes on two cores
	$(PYTEST) --durations 15

test-fast: $(VENV)/.built $(VENV)/.dev  ## the tests that take less than a second each: two minutes on two cores
	$(PYTEST) -m "not slow and not long"

test-slow: $(VENV)/.built $(VENV)/.dev  ## those that test-fast leaves out: whole runs, kills, resumes, large tables of cases
	$(PYTEST) -m "slow and not long"

test-long: $(VENV)/.built $(VENV)/.dev  ## twenty kills instead of five, more signals, every layout of four ranks; minutes each
	$(PYTHON) -m pytest -q -m long

check: $(VENV)/.built $(VENV)/.dev  ## ruff and mypy --strict
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: $(VENV)/.built  ## every benchmark, one table each
	set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(PYTHON) $$script; done

clean:  ## remove all that make made: .venv, the native extension, caches, demo-out/
	rm -rf $(VENV) build dist *.egg-info megakd/_csrc*.so demo-out real-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: requirements/base.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "error: no Python 3.11 or newer found; install it, e.g. apt install python3.11-venv" >&2; exit 1; fi; \
	if ! $(PYTHON) -c '' >/dev/null 2>&1; then echo "making $(VENV) with $$python"; $$python -m venv --clear $(VENV); fi
	@echo "installing requirements/base.txt into $(VENV): some minutes the first time"
	@$(PIP) -r requirements/base.txt
	@touch $@

# What only tests and checks need, triton among it: large, and nothing that runs on a CPU asks for it.
$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt requirements/eval.txt
	@echo "installing requirements/dev.txt into $(VENV)"
	@$(PIP) -r requirements/dev.txt
	@touch $@

$(VENV)/.real: $(VENV)/.installed requirements/real.txt requirements/eval.txt
	@echo "installing requirements/real.txt into $(VENV)"
	@$(PIP) -r requirements/real.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	@echo "building the native extension"
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
