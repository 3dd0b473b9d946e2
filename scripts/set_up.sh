#!/bin/sh
# Makes .venv: hvdtrain, what it needs, and Horovod built into it. Done already, it takes a second.
# Usage: scripts/set_up.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*"; }
stop() { say "$*" >&2; exit 2; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
supported() { case $(version "$1") in 3.10 | 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac; }

# An interpreter asked for is taken or refused; else an existing .venv stays, or the first that fits is found.
choose_python() {
  if [ -n "$1" ]; then
    command -v "$1" >/dev/null || stop "PYTHON=$1 is not on PATH. Name an interpreter of Python 3.10 or newer."
    version "$1" >/dev/null || stop "PYTHON=$1 does not run: see what $1 -c 'print()' says."
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      stop "hvdtrain needs Python 3.10 or newer, and PYTHON=$1 is $(version "$1"). Try PYTHON=python3.12 make train."
    python=$1
    return
  fi
  for python in .venv/bin/python python3 python3.13 python3.12 python3.11 python3.10; do
    if supported "$python"; then return; fi
  done
  stop "hvdtrain needs Python 3.10 to 3.13, and python3 here is $(version python3 || say missing)." \
    "Install one, or name it: PYTHON=/path/of/python3.12 make train."
}

# Scripts in .venv/bin carry its place, so a folder that was moved needs a new one.
is_whole() {
  [ "$(cat .venv/place 2>/dev/null)" = "$PWD" ] && .venv/bin/python -m pip --version >/dev/null 2>&1
}

make_venv() {
  found=$(version .venv/bin/python || say none)
  wanted=$(version "$python")
  if [ "$found" = "$wanted" ] && is_whole; then return; fi
  if [ "$python" = .venv/bin/python ]; then
    choose_python "python$found"
    wanted=$found
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "Python $wanted lacks its venv module. On Debian or Ubuntu, as root: apt-get install python$wanted-venv"
  if [ -e .venv ]; then say "Making .venv anew: it held Python $found or was not whole, and Python $wanted is wanted."; fi
  rm -rf .venv
  "$python" -m venv .venv
  pwd >.venv/place
}

install_packages() {
  wanted=$(cat setup.py pyproject.toml | cksum)
  if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then return; fi
  say "Installing TensorFlow, Keras, mpi4py and Open MPI into .venv (Python $(version .venv/bin/python)); this takes a minute."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu,test]'
  say "$wanted" >.venv/installed
}

build_horovod() {
  if command -v g++ >/dev/null; then
    .venv/bin/hvdtrain build-horovod || say "So the mpi engine, which needs nothing compiled, does the work."
  elif [ ! -x .venv/bin/horovodrun ]; then
    say "No C++ compiler here (apt-get install g++ brings it): the mpi engine, which needs nothing compiled, does the work."
  fi
}

choose_python "${1:-}"
make_venv
install_packages
build_horovod
