# Everything here sets itself up: Python 3.11 or newer, git and make are all it asks for.
# `make` alone says what there is.

PYTHON ?= python3
BIN := .venv/bin
# The environment is made again only when what it is made of has changed (by content: git changes times).
STAMP := .venv/made-of-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')

# One thread a process: pytest runs two of them, and sums in one order repeat to the same bits. A file stays in one
# process, so that the runs its tests share are trained once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
step = @printf '\n== %s\n' '$(1)'

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: help setup demo docs test test-kill pictures verify adapterhub clean

help:
	@echo 'make demo       a whole small run: plan, train, evaluate, resume'
	@echo 'make test       format, lint, types, import borders, then every fast test'
	@echo 'make verify     the proofs of minutes: demo, kill and resume, every slow test'
	@echo 'make test-kill  only the proof that a killed run resumes to the same bits'
	@echo 'make docs       write the generated pages of docs/ again'
	@echo 'make pictures   train what docs/images shows and take its pictures again (needs Chromium)'
	@echo 'make adapterhub AdapterHub'"'"'s library beside ours, and the proof that it loads our bottleneck adapters'
	@echo 'make setup      only the environment, in .venv'
	@echo 'make clean      remove what these made (never runs/)'

setup: $(STAMP)

# torch comes first and alone, so that the build that your pip configuration prefers (CPU or CUDA) is taken.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'tunesmith needs Python 3.11 or newer; "$(PYTHON)" is' "$$($(PYTHON) -V 2>&1)." \
	    'Name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(call step,environment)
	@$(PYTHON) -m venv .venv || { echo 'no venv module: on Debian and Ubuntu, apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@rm -f .venv/made-of-* && touch $@

demo: $(STAMP)
	$(BIN)/tunesmith demo

docs: $(STAMP)
	$(BIN)/python tools/documents.py

PICTURED := .cache/pictures
pictures: $(STAMP)
	@rm -rf $(PICTURED)
	$(BIN)/tunesmith demo --out $(PICTURED)/demo
	$(BIN)/tunesmith demo --quick --out $(PICTURED)/40-epochs
	$(BIN)/tunesmith train $(PICTURED)/40-epochs/recipe.yaml train.epochs=2 --out $(PICTURED)/2-epochs
	$(BIN)/python tools/pictures.py $(PICTURED)/demo $(PICTURED)/2-epochs $(PICTURED)/40-epochs

test: $(STAMP)
	$(call step,lint)
	@$(BIN)/ruff check .
	$(call step,format)
	@$(BIN)/ruff format --check .
	$(call step,types)
	@$(BIN)/pyright -p . --pythonpath $(BIN)/python
	$(call step,import borders)
	@$(BIN)/lint-imports --no-cache
	$(call step,tests)
	@$(PYTEST) -n 2 --dist loadfile -m 'not slow and not gpu' --durations=10

test-kill: $(STAMP)
	$(call step,a killed run resumes to the same bits)
	@$(PYTEST) tests/e2e/test_kill.py -m slow

verify: $(STAMP)
	$(call step,demo)
	@$(BIN)/tunesmith demo
	$(call step,a killed run resumes to the same bits)
	@$(PYTEST) tests/e2e/test_kill.py -m slow
	$(call step,slow tests)
	@$(PYTEST) -m 'slow and not gpu' --ignore=tests/e2e/test_kill.py --durations=10

# It pins transformers 4.57, so it has an environment of its own.
adapterhub: $(STAMP)
	$(PYTHON) -m venv .cache/adapterhub
	.cache/adapterhub/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	.cache/adapterhub/bin/python -m pip install -q adapters==1.3.0 transformers==4.57.6
	@$(PYTEST) -s -m slow tests/e2e/test_adapterhub.py

clean:
	rm -rf .venv .cache .ruff_cache .hypothesis .pytest_cache .import_linter_cache build dist src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
