# Two commands for a stranger: `make demo` and `make test`. Both make their own environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := $(VENV)/.peers
# A file stays with one process: its tests may share a daemon. One process more than processors: they often wait.
TOGETHER := -n $(shell expr $$(nproc) + 1) --dist loadfile --no-loadscope-reorder

.PHONY: help setup compiled demo test check explore format bench chaos lock vectors clean sim
help:            ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## the virtual environment with the locked dependencies
$(READY): lock/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed ($(PYTHON) is older; try make PYTHON=python3.12)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "python3-venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r lock/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Every process of ours would compile all it imports where the environment forbids to keep that.
compiled: $(READY)
	@$(BIN)/python -m compileall -q protocol terminal runner controlplane examples tests

demo: compiled   ## the main job, end to end, on real work
	@$(BIN)/python examples/demo/demo.py

test: compiled   ## every test there is
	$(BIN)/python -m pytest $(TOGETHER)

check: compiled  ## format, lint, types, import contracts, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m 'not slow' $(TOGETHER)

explore: $(READY) ## states of the engine that three commands can reach, nearest first: make explore STATES=10000 (0: all)
	@$(BIN)/python -m tests.exhaustive.explorer $(if $(STATES),--states $(STATES))

format: $(READY) ## rewrite to the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(PEERS): lock/peers.txt $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r lock/peers.txt
	@touch $@

bench: $(PEERS)  ## the benchmarks, side by side with their peers
	@$(BIN)/python bench/run.py
	@$(BIN)/python bench/output.py
	@$(BIN)/python bench/terminals.py

chaos: $(READY)  ## MINUTES=2 SEED=1: kill everything for a while, then count
	@$(BIN)/python -m tests.chaos.run

sim: $(READY)    ## seeded worlds: make sim SEEDS=1000 (SHORT=1: quick ones), or SEED=42 make sim to read the story of one
	@$(BIN)/python -m tests.sim.run $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000)) $(if $(SHORT),--short)

vectors: $(READY) ## write protocol/vectors anew
	$(BIN)/python -m tests.vectors.generate

lock: $(READY)   ## resolve and pin the dependencies anew
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --extra control pyproject.toml -o lock/runtime.txt
	$(BIN)/uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --extra control --group dev pyproject.toml -o lock/dev.txt
	$(BIN)/uv pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --python-version 3.11 --group peers -c lock/dev.txt -o lock/peers.txt

clean:           ## what make made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
