"""List the functions of Keras that hvdtrain replaces: `hvdtrain doctor --patches`."""

import json
import os
import subprocess
import sys

from hvdtrain import safe_path


def list_patches(as_json: bool = False) -> int:
    """Start hvdtrain in a process of its own, and print what it has replaced there.

    Args:
        as_json: Whether to print a JSON list of `{replaced, by, purpose}` in place of the list.

    Returns:
        The exit code: 1 if hvdtrain cannot start.
    """
    done = subprocess.run(
        [sys.executable, *safe_path.main_of("hvdtrain.doctor.probes.patches")],
        env=os.environ | {"HVDTRAIN_ENGINE": "single", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"hvdtrain cannot start here; `hvdtrain doctor` finds out why.\n{done.stderr}", file=sys.stderr)
        return 1
    rows = json.loads(done.stdout.splitlines()[-1])
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for module in dict.fromkeys(row["by"] for row in rows):
        of_module = [row for row in rows if row["by"] == module]
        print(f"{module}: {of_module[0]['purpose']}")
        for row in of_module:
            print(f"    {row['replaced']}")
    print("--as-horovod and --wrap replace more functions; see docs/horovod.md and docs/wrap.md.")
    return 0
