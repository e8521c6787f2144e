# make demo    a small Lille is pretrained, fine-tuned and asked a question (some minutes, no GPU)
# make test    every check, in an environment of its own
# make lint    ruff: mistakes and formatting
# make faults  every command disturbed at each file-system call (a quarter of an hour)
# make gpu     what only a GPU can show: tests, loss curves, benchmarks (a quarter of an hour)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint faults gpu

demo: $(VENV)/.installed
	$(BIN)/python demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

faults: $(VENV)/.installed-dev
	$(BIN)/python tests/faults.py

gpu: $(VENV)/.installed-dev
	grep -v -e '^-r' -e llama-cpp requirements/bench.txt > $(VENV)/peers.txt
	-$(PIP) -r $(VENV)/peers.txt
	-$(PIP) $$(sed -n 's/^# *pip install \(--no-deps .*\)/\1/p' requirements/bench.txt)
	sh tests/on_gpu.sh checkpoints/on_gpu data/demo/pretrain $(BIN)/python

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV), some minutes the first time"
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements/dev.txt requirements/export.txt requirements/eval.txt $(VENV)/.installed
	$(PIP) -r requirements/dev.txt
	touch $@
