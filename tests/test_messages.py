"""Messages for people go through the logger "hvdtrain"."""

import subprocess
import sys

import pytest

IMPORT = "from hvdtrain.messages import logger"


def ran(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_messages_are_lines_on_standard_error():
    script = IMPORT + "; logger.info('one'); logger.warning('two'); logger.error('three')"
    assert ran(script) == ("", "hvdtrain: one\nhvdtrain: warning: two\nhvdtrain: three\n")


def test_a_message_ends_the_line_of_a_progress_bar():
    script = (
        "from hvdtrain.messages import logger, terminal; print('1/3', end=''); terminal.in_line = True;"
        "logger.info('one'); logger.info('two')"
    )
    assert ran(script) == ("1/3\n", "hvdtrain: one\nhvdtrain: two\n")


@pytest.mark.parametrize(
    "choose",
    [
        "log.setLevel(logging.WARNING)",
        "log.addFilter(lambda record: record.levelno >= logging.WARNING)",
    ],
)
def test_a_script_filters_them(choose):
    # Before hvdtrain is imported, and after.
    for order in (f"{choose}\n{IMPORT}", f"{IMPORT}\n{choose}"):
        script = f"import logging\nlog = logging.getLogger('hvdtrain')\n{order}"
        assert ran(f"{script}\nlogger.info('a'); logger.warning('b')") == ("", "hvdtrain: warning: b\n")


def test_a_script_redirects_them(tmp_path):
    target = tmp_path / "messages.log"
    add = f"log.handlers[:] = [logging.FileHandler({str(target)!r})]"
    for order in (f"{add}\n{IMPORT}", f"{IMPORT}\n{add}"):
        script = f"import logging\nlog = logging.getLogger('hvdtrain')\n{order}\nlogger.info('kept')"
        assert ran(script) == ("", "")
    assert target.read_text() == "kept\nkept\n"
