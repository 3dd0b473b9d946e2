"""Runs the scripts named on the command line one after another, in one process."""

import runpy
import sys
from pathlib import Path

# TensorFlow first, as many scripts have it.
import tensorflow as tf

for name in sys.argv[1:]:
    tf.keras.backend.clear_session()
    print("SCRIPT", name, flush=True)
    runpy.run_path(str(Path(__file__).parent / "scripts" / f"{name}.py"), run_name="__main__")
