# `make search` and `make test` do everything on a fresh machine with Python 3.11: they set up .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: search test test-all lint docs bench clean

# a front in minutes: a quarter of the items, short recoveries, and no new trial after 3 minutes and 36 seconds
search: $(READY)
	$(BIN)/python search.py study=first benchmark.limit=100 method.lora.steps=30 budget.hours=0.06

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# every method on every shape of model
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --all-shapes

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# the pages and pictures that are made from the code and from figures already measured
docs: $(READY)
	$(BIN)/python docs/draw_layers.py
	$(BIN)/python bench/methods_page.py --page
	$(BIN)/python bench/architectures.py page

bench: $(READY)
	@for bench in $(filter-out bench/common.py bench/direct.py bench/ddp_case.py bench/kill_case.py bench/teacher_case.py bench/trl_case.py \
	bench/real.py bench/artifacts.py bench/methods_page.py bench/architectures.py bench/fuzz.py bench/damages.py bench/table.py bench/replay.py bench/searches.py bench/advisers.py,$(wildcard bench/*.py)); do $(BIN)/python $$bench || exit 1; done

# torch comes first, at its pinned version: a range would fetch gigabytes of CUDA packages onto a machine without a GPU
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "setting up .venv: a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

clean:
	rm -rf .venv outputs build dist
