"""Settings are defined in one place, documented from there, and misspelled ones are reported."""

import ast
import re
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain import settings

PACKAGE = Path(hvdtrain.__file__).parent
ROOT = PACKAGE.parent
NAME = re.compile(r"HVDTRAIN_[A-Z][A-Z_]*")


def test_the_documentation_holds_the_table():
    assert settings.table() in (ROOT / "docs/settings.md").read_text()


def test_each_variable_that_is_mentioned_is_a_setting():
    folders = ("hvdtrain", "slurm", "docs", "keras_examples", "scripts")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".sbatch")
    ]
    mentioned = {name: path for path in files for name in NAME.findall(path.read_text())}
    assert mentioned
    for name, path in mentioned.items():
        assert not settings.unknown({name: "1"}), path


def test_only_settings_reads_them_from_an_environment():
    """`environ.get("HVDTRAIN_…")` or `environ["HVDTRAIN_…"]` elsewhere would have a default of its own."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            read = []
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "get"
            ):
                read = node.args[:1] if ast.unparse(node.func.value) != "settings" else []
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                read = [node.slice]
            for name in read:
                literal = isinstance(name, ast.Constant) and NAME.fullmatch(str(name.value))
                assert not literal, f"{path}:{node.lineno}"


@pytest.mark.parametrize("value, expected", [("mpi", "mpi"), (" mpi ", "mpi"), ("", "auto"), (None, "auto")])
def test_a_value_or_the_default(value, expected):
    environ = {} if value is None else {"HVDTRAIN_ENGINE": value}
    assert settings.get("HVDTRAIN_ENGINE", environ) == expected
    assert settings.is_set("HVDTRAIN_ENGINE", environ) == (expected != "auto")


def test_no_such_setting():
    with pytest.raises(KeyError):
        settings.get("HVDTRAIN_MOTOR", {})


def test_a_misspelled_setting_is_named_with_the_nearest():
    (sentence,) = settings.unknown({"HVDTRAIN_VERFIY": "off", "HVDTRAIN_VERIFY": "off", "HOME": "/"})
    assert sentence.startswith("HVDTRAIN_VERFIY is set, but") and sentence.endswith(
        "Did you mean HVDTRAIN_VERIFY?"
    )


def test_a_name_like_no_other():
    assert "docs/settings.md" in settings.unknown({"HVDTRAIN_QQQ": "1"})[0]


def test_what_hvdtrain_sets_itself_is_known():
    assert settings.unknown({"HVDTRAIN_RUN_TOKEN": "x", "HVDTRAIN_RESTART": "1"}) == []
