# Two commands do everything: `make train` and `make test`. Both make the environment first, where it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Threads that wait by spinning make training many times slower when anything else is running beside it.
export GOMP_SPINCOUNT ?= 0

.PHONY: train test slow docs lab export clean

train: $(READY)
	@mkdir -p outputs
	$(BIN)/papermill nbs/05_train.ipynb outputs/05_train.ipynb -p backbone resnet18 --log-output --no-progress-bar
	@$(BIN)/ctbm show

# The notebooks' own laws, each notebook run by papermill in a kernel of its own; then what crosses them. 05_train is the job itself, 20_compare
# does it several times: the tests run them with small settings. Both processors are busy with notebooks, so that these read files one by one.
test: $(READY)
	$(BIN)/ruff check
	$(BIN)/python .ci/tools.py
	OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/python .ci/notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

# What takes too long to be asked for at every change: whole trainings, networks at their published size, several devices together.
slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist load -m slow

# The site, from registry packages alone; fails on a broken link, a missing picture, a name that is not there.
docs: $(READY)
	$(BIN)/python .ci/docs/build.py

lab: $(READY)
	$(BIN)/jupyter lab nbs

# After editing notebooks: clean them, write the package and the README from them.
export: $(READY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python .ci/readme.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache _docs _proc

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ctbm needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
