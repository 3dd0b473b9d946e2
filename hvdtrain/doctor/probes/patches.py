"""Print as JSON which functions of Keras and Python hvdtrain replaces at `hvd.init()`."""

import json
import sys

import hvdtrain.keras as hvd
from hvdtrain import patching


def main() -> None:
    """Start hvdtrain in one process, and print each replaced function, the module that did it, and its purpose."""
    hvd.init()
    rows = []
    for entry in patching.replaced:
        purpose = (sys.modules[entry.by].__doc__ or "").splitlines()[0]
        rows.append({"replaced": entry.name, "by": entry.by, "purpose": purpose})
    print(json.dumps(rows))
