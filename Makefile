# The two commands: `make train` and `make test`. Either may come first; set up already, both start in seconds.
#   PYTHON=python3.12 make train   chooses the interpreter;   make train NP=2   the number of ranks.
# Each target is phony and each path relative: make itself cannot handle a folder whose path has spaces.

PYTHON ?=
NP ?= 4

# bash for its `2> >(…)`, which filters a stream and keeps the exit code.
SHELL := /bin/bash

# Root may start ranks in a container, and ranks that wait leave the core to those that compute.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_mpi_yield_when_idle := 1
export TF_CPP_MIN_LOG_LEVEL := 2

IN_VENV = PATH="$$PWD/.venv/bin:$$PATH"
# What TensorFlow prints before its log level counts, on every rank.
QUIETLY = 2> >(grep -v --line-buffered -e absl::InitializeLog -e 'oneDNN custom operations' >&2)

.PHONY: train test test-cluster setup clean

train: setup
	@if [ -x .venv/bin/horovodrun ]; \
	then command="horovodrun -np $(NP) python keras_examples/digits_cnn.py"; \
	else command="hvdtrain run -np $(NP) keras_examples/digits_cnn.py"; fi; \
	echo "$$command"; $(IN_VENV) $$command $(QUIETLY)

test: setup
	@$(IN_VENV) python tests/run_all.py

# A real Slurm of four hosts on this machine; as root, with Slurm installed. Says why where it cannot.
test-cluster: setup
	@$(IN_VENV) python -m pytest -m cluster -rs tests/cluster

setup:
	@sh scripts/set_up.sh "$(PYTHON)"

clean:
	rm -rf .venv .cache build dist *.egg-info
