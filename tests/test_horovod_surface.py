"""Nothing that Horovod offers is missing, and every call that it takes is taken: compared with Horovod itself.

`python tests/test_horovod_surface.py` asks the Horovod that is installed and records its answers in
horovod_surface.json, so that the comparison is made also where there is no Horovod.
"""

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).with_name("horovod_surface.json")

# Horovod's modules from which scripts import, and those of hvdtrain that stand behind them.
MODULES = {
    "horovod.keras": "hvdtrain.keras",
    "horovod.keras.callbacks": "hvdtrain.keras.callbacks",
    "horovod.keras.elastic": "hvdtrain.keras.elastic",
    "horovod.tensorflow": "hvdtrain.tensorflow",
    "horovod.tensorflow.compression": "hvdtrain.tensorflow.compression",
    "horovod.tensorflow.elastic": "hvdtrain.keras.elastic",
    "horovod.tensorflow.functions": "hvdtrain.tensorflow.functions",
    "horovod.tensorflow.keras": "hvdtrain.keras",
    "horovod.tensorflow.keras.callbacks": "hvdtrain.keras.callbacks",
    "horovod.tensorflow.keras.elastic": "hvdtrain.keras.elastic",
    "horovod.tensorflow.mpi_ops": "hvdtrain.tensorflow.mpi_ops",
    "horovod.tensorflow.sync_batch_norm": "hvdtrain.tensorflow.sync_batch_norm",
    "horovod.tensorflow.util": "hvdtrain.tensorflow.util",
}
# These offer what they have imported from others of Horovod's; the rest import for themselves.
COLLECTIONS = {
    "horovod.keras",
    "horovod.tensorflow",
    "horovod.tensorflow.keras",
    "horovod.tensorflow.mpi_ops",
}

COMPILED = "concerns Horovod's compiled library"
NOT_SERVED = {
    "is_version_greater_equal_than": "in horovod.common.util; what Horovod's modules ask for TensorFlow's version",
    "check_installed_version": COMPILED,
    "get_ext_suffix": COMPILED,
    "get_average_backwards_compatibility_fun": "makes handle_average_backwards_compatibility, which is served",
    "CommitStateCallback.commit": "a step of the callback's own",
}
# Where Horovod's two modules for Keras contradict each other, the order is that of horovod.tensorflow.keras.
ORDERED_OTHERWISE = {
    ("horovod.keras", "DistributedOptimizer"): "has no backward_passes_per_step before num_groups",
    (
        "horovod.keras.callbacks",
        "BestModelCheckpoint",
    ): "has no save_weights_only; a word there is taken as mode",
}
OTHER_DEFAULTS = {
    ("horovod.keras", "allreduce"): "average is True there and None here; both mean a mean",
}
REQUIRED, AN_OBJECT = "(required)", "(an object)"


def surface(module: str) -> dict[str, Any]:
    """Lists the public names of a module of Horovod's, and of its classes, with the parameters of each."""
    return {name: parameters(value) for name, value in sorted(_offered(module))}


def _offered(module: str) -> Iterator[tuple[str, Any]]:
    for name, value in vars(importlib.import_module(module)).items():
        if name.startswith("_") or not _belongs(value, module):
            continue
        yield name, value
        for kind in getattr(value, "__mro__", ()):
            if kind.__module__.startswith("horovod"):
                methods = {
                    each: function for each, function in vars(kind).items() if not each.startswith("_")
                }
                yield from ((f"{name}.{each}", getattr(value, each)) for each in methods)


def _belongs(value: Any, module: str) -> bool:
    home = getattr(value, "__module__", None)
    if inspect.ismodule(value) or home == module:
        return not inspect.ismodule(value)
    return module in COLLECTIONS and (not isinstance(home, str) or home.startswith("horovod"))


def parameters(value: Any) -> list[list[Any]] | None:
    """Returns name, kind and default of each parameter but `self`; None for what cannot be called."""
    if not callable(value):
        return None
    taken = inspect.signature(value).parameters.values()
    return [[each.name, each.kind.name, _default(each)] for each in taken if each.name != "self"]


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is parameter.empty:
        return REQUIRED
    plain = parameter.default is None or isinstance(parameter.default, bool | int | float | str)
    return parameter.default if plain else AN_OBJECT


def differences(module: str, theirs: dict[str, Any]) -> list[str]:
    """Says what of a module of Horovod's is not, or is otherwise, in the one that stands behind it."""
    behind = importlib.import_module(MODULES[module])
    found = []
    for name, expected in theirs.items():
        if name in NOT_SERVED:
            continue
        try:
            value = _reached(behind, name)
        except AttributeError:
            found.append(f"{module}.{name} is missing")
            continue
        if expected is not None:
            found += [
                f"{module}.{name}{each}" for each in _refused(module, name, expected, parameters(value))
            ]
    return found


def _reached(behind: Any, name: str) -> Any:
    for part in name.split("."):
        behind = getattr(behind, part)
    return behind


def _refused(module: str, name: str, expected: list, offered: list) -> Iterator[str]:
    """Says which calls that Horovod takes would not be taken, or mean something else."""
    place = {each: index for index, (each, _, _) in enumerate(offered)}
    for index, (parameter, kind, default) in enumerate(expected):
        if kind.startswith("VAR_"):
            continue
        if parameter not in place:
            yield f": no parameter {parameter}"
        elif place[parameter] != index and (module, name) not in ORDERED_OTHERWISE:
            yield f": {parameter} is parameter {place[parameter]}, not {index}"
        elif default != REQUIRED and (module, name) not in OTHER_DEFAULTS:
            ours = offered[place[parameter]][2]
            if ours != default:
                yield f": {parameter} is {ours!r} by default, not {default!r}"


def asked() -> dict[str, Any]:
    """Asks the Horovod that is installed; in a process of its own, as it brings an MPI with it."""
    process = subprocess.run(
        [sys.executable, __file__, "--print"], capture_output=True, text=True, check=False
    )
    if process.returncode:
        pytest.skip(f"the Horovod installed here cannot be loaded: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout)


@pytest.fixture(scope="module", params=["recorded", "installed"])
def horovod(request) -> dict[str, Any]:
    if request.param == "recorded":
        return json.loads(RECORDED.read_text())
    if importlib.util.find_spec("horovod") is None:
        pytest.skip("no Horovod here")
    return asked()


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_there_and_takes_every_call(horovod, module):
    assert differences(module, horovod[module]) == []


def test_the_lists_of_names_are_whole(horovod):
    assert {name: len(names) for name, names in horovod.items() if not names} == {}
    for name in (
        "DistributedOptimizer",
        "load_model",
        "reducescatter",
        "start_timeline",
        "global_process_set",
    ):
        assert name in horovod["horovod.keras"] and name in horovod["horovod.tensorflow.keras"]
    assert "join" in horovod["horovod.tensorflow"] and "ProcessSet.included" in horovod["horovod.tensorflow"]


def test_exceptions_are_still_needed(horovod):
    """An exception that Horovod no longer gives cause for would hide the next difference."""
    everything = {name for names in horovod.values() for name in names}
    assert set(NOT_SERVED) <= everything
    for module, name in [*ORDERED_OTHERWISE, *OTHER_DEFAULTS]:
        offered = parameters(_reached(importlib.import_module(MODULES[module]), name))
        assert horovod[module][name] != offered[: len(horovod[module][name])]


@pytest.mark.parametrize(
    ("name", "expected", "difference"),
    [
        ("allfold", [], " is missing"),
        ("ProcessSet.colour", [], " is missing"),
        ("rank", [["colour", "POSITIONAL_OR_KEYWORD", None]], ": no parameter colour"),
        (
            "broadcast",
            [["root_rank", "POSITIONAL_OR_KEYWORD", REQUIRED]],
            ": root_rank is parameter 1, not 0",
        ),
        (
            "allgather",
            [["value", "POSITIONAL_OR_KEYWORD", REQUIRED], ["name", "POSITIONAL_OR_KEYWORD", "it"]],
            ": name is None by default, not 'it'",
        ),
    ],
)
def test_what_is_missing_is_found(name, expected, difference):
    found = differences("horovod.tensorflow.keras", {name: expected})
    assert found == [f"horovod.tensorflow.keras.{name}{difference}"]


def written(answers: dict[str, Any]) -> str:
    """Writes answers as JSON with a line for each name, so that a change can be read."""
    modules = [
        f'"{module}": {{\n'
        + ",\n".join(f'  "{name}": {json.dumps(each)}' for name, each in names.items())
        + "}"
        for module, names in answers.items()
    ]
    return "{" + ",\n".join(modules) + "}\n"


if __name__ == "__main__":
    answers = {module: surface(module) for module in MODULES}
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(answers))
    else:
        RECORDED.write_text(written(answers))
