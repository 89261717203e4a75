# `make suites` runs the suite on the tiny synthetic model; `make test` runs the project's own tests. Both first make the
# environment in .venv, once, and again only when pyproject.toml changes. Only python3 (3.11 or newer) with venv is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PYTEST_ARGS ?=

.PHONY: suites test baselines portable-baselines bench lint env clean

suites: $(STAMP)
	$(BIN)/python -m pytest suites --benchmark-columns=min,median,max,rounds $(PYTEST_ARGS)

# OpenMP threads that spin while they wait stall each other on a busy machine. Two processes, which wait for each other where
# something is timed, take little more than half of the time that one takes.
test: $(STAMP) lint
	HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest tests -n 2 --dist loadfile $(PYTEST_ARGS)

# Records what is the same on every machine (bytes, tensors, forwards, how linears compute on a CPU), after a change that
# was meant: make portable-baselines REASON="what changed".
portable-baselines: $(STAMP)
	$(BIN)/python -m pytest suites -k "disk or weights or linears or forwards or dispatch or quality" --zimage-device cpu --zimage-runs 1 \
	    --zimage-config "*,!@sage" \
	    --update-baselines --update-reason "$(REASON)" $(PYTEST_ARGS)

# Records this machine's timings and memory (five runs a variant), so that later runs are judged against them. What is
# recorded already stays, here and in git; to record anew, delete .zimage/baselines first.
baselines: $(STAMP)
	$(BIN)/python -m pytest suites --benchmark-disable --update-baselines --update-mode new \
	    --update-reason "recorded on this machine by make baselines" $(PYTEST_ARGS)

# What any machine can show in a few minutes. Not here: cold_read.py (of a file on the disk and a GPU of yours), pure_share.py
# and several_gpus.py (of the results of sessions at full size) and quality_repeat.py (ten sessions, one after another).
bench: $(STAMP)
	$(BIN)/python benchmarks/decision_rule.py
	$(BIN)/python benchmarks/paired_rule.py
	$(BIN)/python benchmarks/import_cost.py
	$(BIN)/python benchmarks/harness_overhead.py
	$(BIN)/python benchmarks/sampling_cost.py
	$(BIN)/python benchmarks/server_overhead.py
	$(BIN)/python benchmarks/between_machines.py --slower 0.04
	$(BIN)/python benchmarks/between_machines.py --metric cold_load --slower 0.6

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pytest-zimage needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .zimage
