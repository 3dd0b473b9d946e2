"""Commands, which run once; what they print, how they end and the files that they make are there for all ranks."""

import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np

folder = Path(os.environ["FOLDER"]) / "commands"
folder.mkdir()
ran = folder / "ran.txt"
results = {
    "codes": [os.system(f"cd {folder}; echo system >> ran.txt; mkdir made; echo 1 > made/a.txt; exit 3")]
}
results["sizes"] = [ran.stat().st_size, len(list(folder.rglob("*")))]


def text(*words):
    return [float(word) for word in words]


def run(line, **kwargs):
    return subprocess.run(f"echo run >> {ran}; {line}", shell=True, **kwargs)


done = run("echo 4; echo 5 >&2; exit 6", capture_output=True, text=True)
results["run"] = [done.returncode, *text(done.stdout, done.stderr)]
results["call"] = subprocess.call(["sh", "-c", f"echo call >> {ran}; exit 7"])
results["check_output"] = text(subprocess.check_output(["cat"], input=b"8"))
results["getoutput"] = text(subprocess.getoutput("echo 9"))
try:
    run("exit 10", check=True)
except subprocess.CalledProcessError as error:
    results["check"] = error.returncode
try:
    subprocess.run(["no-such-program-anywhere"])
except FileNotFoundError as error:
    results["missing"] = error.errno
with os.popen("echo 11; echo 12") as lines:
    results["popen"] = text(*lines)
with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    process.stdin.write("13\n")
    process.stdin.close()
    with subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.PIPE, text=True) as second:
        results["pipe"] = text(*second.communicate()[0].split())
results["ended"] = [process.returncode, second.poll()]
with (folder / "log.txt").open("w") as log:
    subprocess.run(["echo", "14"], stdout=log, check=True)
(folder / "notes.txt").write_text("15")
run(f"echo 16 >> {folder}/notes.txt; rm {folder}/made/a.txt", check=True)
results["files"] = text((folder / "log.txt").read_text(), (folder / "notes.txt").read_text().strip())
results["removed"] = float((folder / "made" / "a.txt").exists())

# What Python and C write by themselves is unpacked, copied and moved on each rank for itself.
(folder / "tree" / "deep").mkdir(parents=True)
(folder / "tree" / "deep" / "b.txt").write_text("17")
for kind in ("zip", "gztar"):
    packed = shutil.make_archive(str(folder / "packed"), kind, folder / "tree")
    shutil.unpack_archive(packed, folder / kind)
with zipfile.ZipFile(folder / "packed.zip") as archive:
    archive.extractall(folder / "z")
with tarfile.open(folder / "packed.tar.gz") as archive:
    archive.extractall(folder / "t")
shutil.copytree(folder / "tree", folder / "copy")
where = [folder / name / "deep" / "b.txt" for name in ("zip", "gztar", "z", "t", "copy")]
shutil.move(folder / "zip" / "deep" / "b.txt", folder / "moved.txt")
results["unpacked"] = text(*[path.read_text() for path in [*where[1:], folder / "moved.txt"]])
with h5py.File(folder / "numbers.h5", "w") as file:
    file["x"] = np.arange(3.0)
with h5py.File(folder / "numbers.h5") as file:
    results["h5"] = file["x"][:].tolist()
results["all"] = len([path for path in folder.rglob("*") if path.suffix in (".txt", ".h5", ".zip")])
model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])
model.compile("sgd", "mse")
results["loss"] = model.fit(np.ones((8, 2)), np.ones(8), verbose=0).history["loss"]
results["ran"] = ran.read_text().count("\n")
print("RESULT", json.dumps(results))
