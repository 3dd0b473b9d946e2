"""Who may import whom: down only, and nothing heavy where a login node starts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hvdtrain"

# Each floor may import itself and what stands to its right.
FLOORS = [
    "cli",
    "launch",
    "diagnose",
    "bench",
    "as_horovod",
    "wrap",
    "tensorflow",
    "keras",
    "gradients",
    "data",
    "process_sets",
    "built",
    "runtime",
    "unwatched",
    "collectives",
    "checkpoints",
    "preempted",
    "cores",
    "topology",
    "heartbeat",
    "limits",
    "processes",
    "mpi_identity",
    "mpi_wheel",
    "script",
    "replacing",
    "safe_path",
]
# launch, diagnose and bench stand side by side.
BESIDE = {"diagnose": {"launch"}, "bench": {"launch"}}


def floor_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_down(path):
    mine = floor_of(path)
    if mine == "__init__":
        assert list(imports(path)) == []
        return
    allowed = set(FLOORS[FLOORS.index(mine) :]) | BESIDE.get(mine, set())
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hvdtrain" and len(parts) > 1 and parts[1] in FLOORS:
            assert parts[1] in allowed, f"{path.name} imports {name}, which stands above it"


def test_gradients_never_ask_the_runtime_and_know_no_keras():
    for path in (PACKAGE / "gradients").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(("keras", "hvdtrain.runtime"))]


@pytest.mark.parametrize(
    "module",
    ["hvdtrain", "hvdtrain.cli", "hvdtrain.launch.run", "hvdtrain.launch.submit", "hvdtrain.runtime"],
)
def test_what_starts_on_a_login_node_loads_neither_tensorflow_nor_mpi(module):
    heavy = ("tensorflow", "keras", "mpi4py.MPI")
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_two_abstract_bases_no_more():
    bases = [
        f"{path.name}:{node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == "ABC" for base in node.bases)
    ]
    assert set(bases) <= {"base.py:Engine", "compression.py:Compressor"}
