# The two commands: `make train` and `make test`. Either may come first; set up already, both start in seconds.
#   PYTHON=python3.12 make train   chooses the interpreter;   make train NP=2   the number of ranks.
#   make one T=tests/keras/test_contract.py NP=2 ENGINE=mpi K=name   runs one file, on ranks or (NP=0) in one process.
# Each target is phony and each path relative: make itself cannot handle a folder whose path has spaces.

PYTHON ?=
NP ?= $(if $(filter one,$(MAKECMDGOALS)),2,4)
T ?=
K ?=
ENGINE ?=

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

.PHONY: train test test-all test-cluster one setup clean

train: setup
	@if [ -x .venv/bin/horovodrun ]; \
	then command="horovodrun -np $(NP) python keras_examples/digits_cnn.py"; \
	else command="hvdtrain run -np $(NP) keras_examples/digits_cnn.py"; fi; \
	echo "$$command"; $(IN_VENV) $$command $(QUIETLY)

# `exec`, so that a signal which make passes on reaches the runner, which ends what it has started.
RUN_ALL = @exec env $(IN_VENV) python tests/run_all.py

# All areas within minutes.
test: setup
	$(RUN_ALL) --quick

# Every test, and what depends on engine and number of ranks on all of them.
test-all: setup
	$(RUN_ALL)

# A real Slurm of four hosts on this machine; as root, with Slurm installed. Says why where it cannot.
test-cluster: setup
	$(RUN_ALL) --cluster

one: setup
	$(if $(T),,$(error make one T=tests/keras/test_contract.py [NP=2] [ENGINE=mpi] [K=name]))
	$(RUN_ALL) --one "$(T)" --sizes $(NP) $(if $(ENGINE),--engines $(ENGINE)) -- $(if $(K),-k "$(K)")

setup:
	@sh scripts/set_up.sh "$(PYTHON)"

clean:
	rm -rf .venv .cache build dist *.egg-info
