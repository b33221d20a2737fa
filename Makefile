# make demo      from nothing to a model that writes Python, in minutes on two CPU cores
# make test      the fast tests, in under five minutes
# make gauntlet  every fault of tests/test_faults.py, and many ranks; the slow ones too
# make gpu       what only an NVIDIA GPU can show
# Each sets up what it needs in .venv. PYTHON=python3.12 make ... takes another interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test gauntlet gpu clean

demo: $(VENV)/ready
	$(RUN) data/stdlib/prepare.py
	$(RUN) train.py config/train_small.py
	$(RUN) sample.py --out_dir=out-small --num_samples=2
	$(RUN) sample.py --out_dir=out-small --num_samples=1 --start="class Queue:"

test: $(VENV)/ready-for-tests
	$(RUN) -m pytest -q -n 2 -m "not slow and not gpu" tests

gauntlet: $(VENV)/ready-for-tests
	$(RUN) -m pytest -q -n 2 tests/test_faults.py tests/test_ranks.py

gpu: $(VENV)/ready-for-tests
	@$(RUN) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} sees none")'
	$(RUN) -m pytest -q -m gpu tests/test_gpu.py

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("bareGPT needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/ready-for-tests: $(VENV)/ready tests/requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) out-small
