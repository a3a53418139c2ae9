# Needs only git, make, and a python3 of 3.11 or newer with access to the package index.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train chat test sample notebooks prove check clean

train: $(VENV)/.ready  ## the quickstart, on a simulated mesh of 4 devices
	$(RUN) train.py --config=configs/quickstart.py --simulate=4 --config.mesh.fsdp=2 --config.mesh.tensor=2

chat: $(VENV)/.ready-deploy  ## talk with SmolLM2-135M-Instruct, sharded over 3 simulated devices
	@$(RUN) chat.py --simulate=3 --config.mesh.tensor=3

test: $(VENV)/.ready-test  ## the tests that fit into 6 minutes on 2 cores
	$(RUN) -m pytest $(WORKERS) --durations=10

sample: $(VENV)/.ready-dev  ## one case of every slow test, but of the notebooks
	$(RUN) -m pytest --sample --ignore=tests/test_notebooks.py $(WORKERS) --durations=10

notebooks: $(VENV)/.ready-dev  ## every notebook, from top to bottom
	$(RUN) -m pytest -m slow tests/test_notebooks.py -n 2 --durations=10

prove: $(VENV)/.ready-prove  ## everything there is, for hours: stopped anywhere, it goes on; docs/proofs.md has the result
	$(RUN) tests/prove.py

check: $(VENV)/.ready-dev  ## lint, format, types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: give a newer one, as in make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: this Python has no ensurepip, so it cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ready-deploy: $(VENV)/.ready requirements-deploy.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-deploy.txt
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-deploy requirements-islands.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-islands.txt
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt requirements-data.txt requirements-deploy.txt requirements-notebooks.txt requirements-islands.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.ready-prove: $(VENV)/.ready-dev requirements-prove.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-prove.txt
	@touch $@

clean:
	rm -rf $(VENV)
