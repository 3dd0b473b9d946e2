"""Check the layout: which folder imports which, no cycles, and nothing heavy where a login node starts."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hvdtrain"

# Each folder or module at the top level, and exactly what it imports of the others.
IMPORTS = {
    "cli": {"batch", "bench", "doctor", "horovod_build", "launch", "timeline"},
    # What starts and examines jobs.
    "batch": {"doctor", "launch", "settings"},
    "bench": {
        *(
            "backends",
            "collectives",
            "cores",
            "gradients",
            "keras",
            "launch",
            "runtime",
            "safe_path",
            "topology",
        ),
    },
    "doctor": {
        *(
            "collectives",
            "cores",
            "keras",
            "launch",
            "patching",
            "runtime",
            "safe_path",
            "settings",
            "topology",
        ),
    },
    "horovod_build": {"collectives", "safe_path"},
    "launch": {
        *("as_horovod", "collectives", "cores", "heartbeat", "patching", "process_activity", "safe_path"),
        *("script", "settings", "stop_request", "topology"),
    },
    # What scripts import, and the ways of running scripts that were not written for hvdtrain.
    "as_horovod": {"keras", "patching", "runtime", "safe_path", "script", "tensorflow", "topology"},
    "wrap": {
        *(
            "backends",
            "collectives",
            "data",
            "keras",
            "patching",
            "runtime",
            "safe_path",
            "script",
            "settings",
        ),
        "topology",
    },
    "tensorflow": {"backends", "collectives", "data", "gradients", "keras", "runtime", "timeline"},
    "keras": {
        *("backends", "checkpoints", "collectives", "cores", "data", "gradients", "heartbeat", "messages"),
        *("patching", "runtime", "settings", "stop_request", "timeline"),
    },
    # What they are made of.
    "data": {"backends", "collectives", "runtime"},
    "gradients": {"collectives", "settings"},
    "timeline": {"messages", "runtime"},
    "runtime": {
        "collectives",
        "heartbeat",
        "messages",
        "process_activity",
        "settings",
        "topology",
    },
    "backends": {"collectives", "gradients"},
    # The launcher reads in the heartbeat where each rank waits; Horovod's threads are not counted as work.
    "collectives": {"heartbeat", "messages", "process_activity", "settings", "topology"},
    "checkpoints": set(),
    "cores": set(),
    "heartbeat": {"settings"},
    "messages": set(),
    "patching": set(),
    "process_activity": set(),
    "safe_path": set(),
    "script": set(),
    "settings": set(),
    "stop_request": set(),
    "topology": set(),
}


def modules():
    """Return the path of each module, by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def names(path):
    """Yield the dotted names that a file imports, also inside of functions, but not for type annotations only."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node))[:14]
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(module):
    """Return the modules of hvdtrain that one of them imports."""
    found = set()
    for name in names(MODULES[module]):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", "hvdtrain", module}


def folder(module):
    return module.split(".")[1]


def test_each_folder_imports_what_the_table_says():
    found = {name: set() for name in IMPORTS}
    for module in MODULES:
        if module != "hvdtrain":
            found[folder(module)] |= {folder(other) for other in imported(module)} - {folder(module)}
    assert found == IMPORTS


def test_the_package_itself_imports_nothing():
    assert list(names(MODULES["hvdtrain"])) == []


def test_tests_mirror_the_package():
    folders = {path.name for path in (PACKAGE.parent / "tests").iterdir() if path.is_dir()}
    assert folders - {"cluster", "runner", "__pycache__"} <= set(IMPORTS)


def test_no_module_imports_itself_through_others():
    order = graphlib.TopologicalSorter({module: imported(module) for module in MODULES})
    order.prepare()  # raises CycleError with the modules


def test_functions_of_keras_are_replaced_in_its_patches_only():
    # Apart from the modes that change more than Keras, and the check for stock Horovod.
    allowed = ("keras.patches.", "wrap.", "as_horovod", "launch.supervision.rank_main", "doctor.probes")
    users = [module for module in MODULES if "hvdtrain.patching" in imported(module)]
    assert [module for module in users if not module.removeprefix("hvdtrain.").startswith(allowed)] == []


# Modules with variables that change while a program runs. The engine in use and its sets are in `runtime`; what
# else lives as long as the process, and not as long as an engine, is listed by name.
STATE = {
    "runtime": {"_engine", "_checks", "_checked", "engines_of_sets"},
    "runtime.process_sets": {"global_process_set"},
    # What other processes see of this one, or it of them.
    "heartbeat": {"_page", "_waits"},
    "messages": {"terminal"},
    "stop_request": {"_asked"},
    "checkpoints.folder": {"_locked"},
    # Functions of Keras and Python that are replaced, and what the replacements remember.
    "patching": {"replaced", "_translated"},
    "keras.patches.model_fit": {"_checks_data", "_checks_validation"},
    "keras.patches.optimizers": {"_recorded"},
    "keras.patches.usage_warnings": {"_printed"},
    "wrap.files": {"_copies"},
    "wrap.fit_arguments": {"_scaled"},
    "wrap.model_calls": {"_verdicts"},
    "wrap.same_batches": {"_receiving"},
    "wrap.script_errors": {"_errors_in_threads"},
    # Names that must differ within a process, variables of graphs, memory that was prepared.
    "gradients.reducer": {"_numbers"},
    "gradients.trained_variables": {"registry"},
    "keras.elastic.running": {"_calls"},
    "backends.tensorflow.host_calls": {"_turns"},
    "backends.tensorflow.in_place": {"_libc", "_advised", "_zeros", "_numbers"},
    "collectives.horovod.library": {"serves_hvdtrain"},
    "collectives.mpi.ring": {"_schedule"},
}


def variables(tree):
    """Yield the names at the top of a module that are in small letters, and are made by a call or empty."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            made = ast.unparse(node.value or target)
            unchanging = re.match(r"ContextVar\(|logging\.getLogger\(|\[['\"]|[\w.'\"]+$", made)
            if isinstance(target, ast.Name) and target.id.strip("_").islower() and not unchanging:
                yield target.id


def test_only_these_modules_have_state():
    found = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        changed = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
        if names := changed | set(variables(tree)):
            found[module.removeprefix("hvdtrain.")] = names
    assert found == STATE


IMPORT_EACH = """
import importlib, sys
import hvdtrain, keras

for name in sys.argv[1:]:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "hvdtrain"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "tf_keras"):  # what a plain install does not bring
            raise
"""


@pytest.mark.jobs
def test_each_module_can_be_the_first_that_is_imported():
    # A package's __init__ runs before its modules, which the graph of imports does not show.
    command = [sys.executable, "-c", IMPORT_EACH, *(name for name in MODULES if "__main__" not in name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITHOUT_FRAMEWORKS = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras", "torch", "jax"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import hvdtrain.collectives, hvdtrain.gradients
for package in (hvdtrain.collectives, hvdtrain.gradients):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

import numpy as np
from hvdtrain import runtime
engine = runtime.init()
rank, size = engine.rank, engine.size
mine = np.arange(6.0) + rank
np.testing.assert_array_equal(engine.allreduce(mine, "sum"), size * np.arange(6.0) + sum(range(size)))
np.testing.assert_array_equal(engine.grouped_allreduce([mine, mine[:2]], "max")[1], mine[:2] - rank + size - 1)
np.testing.assert_array_equal(engine.allgather(np.full(2, rank)), np.repeat(range(size), 2))
np.testing.assert_array_equal(engine.broadcast(mine, 0), np.arange(6.0))
assert len(engine.reducescatter(np.ones(6))) == 6 // size
assert engine.alltoall(mine)[0].shape == (6,)
assert engine.allgather_object({"rank": rank}) == [{"rank": other} for other in range(size)]
print("sums without a framework on", size)
"""


@pytest.mark.jobs
@pytest.mark.smoke
@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives_and_gradients_need_no_framework(ranks, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_FRAMEWORKS)
    engine = "mpi" if ranks > 1 else "single"
    command = [sys.executable, "-c", "from hvdtrain.cli import main; main()", "run", "-np", str(ranks)]
    done = subprocess.run(
        [*command, str(script)],
        env=os.environ | {"HVDTRAIN_ENGINE": engine},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"sums without a framework on {ranks}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module",
    ["hvdtrain", "hvdtrain.cli", "hvdtrain.launch.run", "hvdtrain.batch.submit", "hvdtrain.runtime"],
)
def test_what_starts_on_a_login_node_loads_neither_tensorflow_nor_mpi(module):
    heavy = ("tensorflow", "keras", "mpi4py.MPI")
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_three_abstract_bases():
    bases = [
        f"{path.name}:{node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == "ABC" for base in node.bases)
    ]
    assert set(bases) == {"engine.py:Engine", "bridge.py:Bridge", "schemes.py:Scheme"}
