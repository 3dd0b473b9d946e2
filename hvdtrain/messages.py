"""Write messages for people through the logger "hvdtrain", which a script can redirect, filter or silence.

The handler that this module adds writes each message to standard error, after "hvdtrain: ". The caller decides
which rank writes a message: rank 0 writes what concerns all ranks (`Engine.say`, `Engine.warn`).

    logging.getLogger("hvdtrain").setLevel(logging.WARNING)   # no lines about engine and verification
    logging.getLogger("hvdtrain").handlers[:] = [logging.FileHandler("hvdtrain.log")]
"""

import logging
import sys

logger = logging.getLogger("hvdtrain")


class TerminalHandler(logging.Handler):
    """A handler that writes each message on a separate line to standard error.

    Attributes:
        in_line: True while this process has written a part of a line, such as a progress bar, to standard output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_line = False

    def emit(self, record: logging.LogRecord) -> None:
        """End an unfinished line, and write the message."""
        if self.in_line:
            self.in_line = False
            print(flush=True)  # on standard output, where the progress bar is
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        print(f"hvdtrain: {prefix}{self.format(record)}", file=sys.stderr, flush=True)


terminal = TerminalHandler()
if not logger.handlers:  # a script may have added its own handler before it imports hvdtrain
    logger.addHandler(terminal)
    # absl, which TensorFlow imports, handles messages of the root logger, and would write each one a second time.
    logger.propagate = False
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
