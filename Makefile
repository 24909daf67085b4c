# Every target sets up what is missing in .venv first. `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_FLAGS ?=
# Those that fill pages from databases of results measure nothing.
BENCHMARKS := $(filter-out benchmarks/common.py benchmarks/_%,$(shell grep -L "from _tables" benchmarks/*.py))

.PHONY: demo test lint docs format bench site clean

demo: $(STAMP)
	$(RUN)/methodbench demo

test: $(STAMP)
	$(RUN)/python -m pytest $(PYTEST_FLAGS)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict
	@echo "Open build/docs/index.html"

format: $(STAMP)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

bench: $(STAMP)
	missed=; for script in $(BENCHMARKS); do $(RUN)/python $$script || missed="$$missed $$script"; done; \
	  [ -z "$$missed" ] || { echo "limits missed or not run:$$missed"; exit 1; }

site: $(STAMP)
	$(RUN)/methodbench site build

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# uv installs from its own cache in seconds; where there is no uv for a platform, pip does the same more slowly. Quantus
# names a build of OpenCV whose files are those of the headless one, on which it runs as well.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check uv \
	  && $(RUN)/uv pip install --quiet --python $(RUN)/python --constraints constraints.txt --editable '.[all,dev,docs]' \
	  || $(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,docs]'
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt quantus cachetools
	touch $@
