# make demo | test | gate | lint | lock | clean. The first four build .venv from requirements.lock when it is missing or out of date.

VENV := .venv
PYTHON := $(VENV)/bin/python
PYTHONS := python3.13 python3.12 python3.11 python3
UV := $(shell command -v uv 2>/dev/null)
WORKERS := 3
ARGS :=
GATE := results/runs/gate
TYPES := build/types

.PHONY: demo test gate lint lock clean

demo: $(VENV)/.ready
	$(PYTHON) -m benchmarks.demo --out results/demo $(ARGS)

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(WORKERS) --dist worksteal $(ARGS)

# Anew every time: a finished shard counts as done, whichever code has done it.
gate: $(VENV)/.ready
	rm -rf $(GATE)
	$(PYTHON) cli.py bench configs/suites/quick.yaml --workers $(WORKERS) --out $(GATE)
	$(PYTHON) cli.py check --baseline results/baselines/quick.json $(GATE) --junit $(GATE)/junit.xml $(ARGS)

# The type checker looks at a tree of links in which attacks/ is part of the package, as it is once installed.
lint: $(VENV)/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf $(TYPES)/robustbench_deq
	mkdir -p $(TYPES)/robustbench_deq
	ln -s $(CURDIR)/robustbench_deq/* $(CURDIR)/attacks $(TYPES)/robustbench_deq
	cd $(TYPES) && $(CURDIR)/$(PYTHON) -m mypy --config-file $(CURDIR)/pyproject.toml

# Keeps the present pins where they still fit; `make lock ARGS=--upgrade` moves them all.
lock:
	@uv='$(UV)'; [ -n "$$uv" ] || uv=$(VENV)/bin/uv; \
	[ -x "$$uv" ] || { echo "make lock: expected uv on PATH or in $(VENV), got neither; run 'make $(VENV)/.ready' first" >&2; exit 1; }; \
	"$$uv" pip compile pyproject.toml --quiet --extra test --extra dev --extra hub --extra peers --extra cluster --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis results/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last: an interrupted step leaves none and is done again. The lock brings uv, so this works in either kind
# of environment (one that uv made has no pip); it needs no network.
$(VENV)/.ready: $(VENV)/.locked pyproject.toml
	@$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --offline --no-deps --no-build-isolation --editable .
	@touch $@

# A candidate is run, not only found: it may be a wrapper with nothing behind it, or lack what venv needs.
$(VENV)/.locked: requirements.lock
	@needs='$(if $(UV),sys,ensurepip)'; python=; \
	for name in $(PYTHONS); do \
		if "$$name" -c "import sys, $$needs; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then python=$$name; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "make: expected Python 3.11 or newer with the venv module, got none of: $(PYTHONS); install one" >&2; exit 1; }; \
	rm -rf $(VENV) && \
	echo "Building $(VENV) with $$python $(if $(UV),and uv,and pip) from requirements.lock: several GB to download the first time (torch with CUDA), some minutes." && \
	if [ -n '$(UV)' ]; then \
		'$(UV)' venv --quiet --python "$$python" $(VENV) && \
		'$(UV)' pip install --quiet --python $(PYTHON) --require-hashes --only-binary :all: -r requirements.lock; \
	else \
		"$$python" -m venv $(VENV) && \
		$(PYTHON) -m pip install -qq --disable-pip-version-check --no-compile --require-hashes --only-binary :all: -r requirements.lock; \
	fi
	@touch $@
