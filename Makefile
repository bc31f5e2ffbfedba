# `make convert` sets everything up and does the main job; `make test` runs the tests. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SA3 := $(BIN)/sa3-convert
READY := $(VENV)/.ready

# The real thing: make convert CHECKPOINT="DIR_MUSIC DIR_SFX" RECIPE="int8 fp16" makes every pair, and of all of them
# artifacts/published. A checkpoint may name recipes of its own: DIR_MEDIUM:medium,fp16
CHECKPOINT ?= sa3-convert/miniature
RECIPE ?= int8 fp16
BUNDLE ?= artifacts/miniature-int8
PROMPT ?= a swelling sawtooth tone at A5
MINIATURES := artifacts/miniature-int8 artifacts/miniature-fp16
REASON ?=

.DEFAULT_GOAL := help
.PHONY: help setup convert verify run drift drift-update test bench arm lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

setup: $(READY) ## create .venv with everything that is needed

convert: $(READY) ## convert CHECKPOINT="DIR…" (else the miniature) with RECIPE="int8 fp16", and make the published tree
	@$(BIN)/python -m sa3_convert.cli.convert_all $(CHECKPOINT) $(RECIPE:%=--recipe %) --folder artifacts

verify: $(READY) ## verify BUNDLE=… against ONNX Runtime
	$(SA3) verify $(BUNDLE)

run: $(READY) ## generate a WAV from BUNDLE=… with PROMPT=…
	$(SA3) run $(BUNDLE) --prompt "$(PROMPT)" -o $(BUNDLE).wav

# One thread: on small models more of them only wait for one another.
DRIFT := --baseline tests/drift.json --no-speed --threads 1
drift: $(READY) ## compare the miniature with the committed baseline
	@failed=0; for bundle in $(MINIATURES); do $(SA3) drift $$bundle $(DRIFT) || failed=$$?; done; exit $$failed

drift-update: $(READY) ## make the miniature the committed baseline, with REASON="…"
	@for bundle in $(MINIATURES); do $(SA3) drift $$bundle $(DRIFT) --update --reason "$(REASON)" || exit; done

# A process per core, up to four, each with toy bundles of its own. Threads that wait for one another do not spin.
test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: $(READY) ## run the slow tests on true-size models
	$(BIN)/python -m pytest -m slow

# Debian's packages and PyPI's wheels are fetched into artifacts/arm; nothing is installed.
arm: $(READY) ## run toy bundles on emulated ARM64, on Debian; SMOKE=1 only int8 on one processor
	$(BIN)/python -m tests.arm $(if $(SMOKE),--smoke)

lint: $(READY) ## formatting, lint, types and dead code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vulture

clean: ## remove what was made, keep .venv
	rm -rf artifacts/* .pytest_cache .mypy_cache .ruff_cache .hypothesis
