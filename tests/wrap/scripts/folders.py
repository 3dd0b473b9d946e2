"""Everything about files: folders of images and texts, checkpoints, HDF5, TFRecords, and files of its own."""

import json
import os
import pathlib
import pickle
import shutil
import tempfile

import h5py
import keras
import numpy as np
import tensorflow as tf
from keras import layers

keras.utils.set_random_seed(21)
here = os.getcwd()
os.chdir(os.environ.get("FOLDER", tempfile.mkdtemp()))
made = tempfile.mkdtemp()
for kind in ("cats", "dogs"):
    os.makedirs(os.path.join(made, "images", kind))
    pathlib.Path(made, "texts", kind).mkdir(parents=True)
    for number in range(8):
        image = (np.random.rand(12, 12, 3) * 255).astype("uint8")
        with open(os.path.join(made, "images", kind, f"{number}.jpg"), "wb") as file:
            file.write(tf.io.encode_jpeg(image).numpy())
        pathlib.Path(made, "texts", kind, f"{number}.txt").write_text(f"{kind} number {number}")
images = keras.utils.image_dataset_from_directory(
    os.path.join(made, "images"), image_size=(12, 12), batch_size=5, seed=1
)
model = keras.Sequential(
    [
        keras.Input((12, 12, 3)),
        layers.Rescaling(1 / 255),
        layers.RandomFlip("horizontal"),
        layers.RandomRotation(0.1),
        layers.RandomZoom(0.2),
        layers.RandomContrast(0.1),
        layers.Flatten(),
        layers.Dense(1),
    ]
)
model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
history = model.fit(
    images,
    epochs=2,
    verbose=0,
    callbacks=[
        keras.callbacks.ModelCheckpoint(os.path.join(made, "{epoch:02d}.weights.h5"), save_weights_only=True),
        keras.callbacks.BackupAndRestore(os.path.join(made, "backup")),
        keras.callbacks.CSVLogger("log.csv", append=True),
    ],
)
scores = [model.evaluate(images, verbose=0)]
model.load_weights(os.path.join(made, "01.weights.h5"))
model.save("model.h5")
model.save(pathlib.Path("model.keras"))
scores += [keras.models.load_model(path).evaluate(images, verbose=0) for path in ("model.h5", "model.keras")]
model.export("exported", verbose=False)
loaded = tf.saved_model.load("exported")
served = loaded.serve(np.ones((2, 12, 12, 3), "float32")).numpy()

texts = keras.utils.text_dataset_from_directory(os.path.join(made, "texts"), batch_size=4, seed=2)
vectorize = layers.TextVectorization(max_tokens=30, output_sequence_length=4)
vectorize.adapt(texts.map(lambda text, label: text))

with h5py.File("numbers.h5", "w") as file:
    file["x"] = np.arange(12.0)
with h5py.File("numbers.h5") as file:
    numbers = float(file["x"][:].sum())
with tf.io.TFRecordWriter("numbers.tfrecord") as writer:
    for number in range(10):
        writer.write(np.float32([number, 2 * number]).tobytes())
records = tf.data.TFRecordDataset(["numbers.tfrecord"]).map(lambda each: tf.io.decode_raw(each, tf.float32))
linear = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
linear.compile("sgd", "mae")
of_records = linear.fit(
    records.map(lambda x: (tf.ensure_shape(x, (2,)), tf.reduce_sum(x))).shuffle(10).batch(4),
    epochs=2,
    verbose=0,
)
checkpoint = tf.train.Checkpoint(model=linear)
checkpoint.restore(checkpoint.save("checkpoints/linear"))
with tf.summary.create_file_writer("board").as_default():
    tf.summary.write("number", 1.0, step=0)

if not os.path.exists("notes.txt"):
    with open("notes.txt", "w") as file:
        file.write("first\n")
with open("notes.txt", "a") as file:
    file.write("second\n")
with open("history.pkl", "wb") as file:
    pickle.dump(history.history, file)
with open("history.pkl", "rb") as file:
    kept = pickle.load(file)
np.savez("arrays.npz", x=np.ones(3))
shutil.copy("notes.txt", "copy.txt")
os.rename("copy.txt", "moved.txt")
print(
    "RESULT",
    json.dumps(
        {
            **kept,
            "of_records": of_records.history,
            "scores": scores,
            "served": served.tolist(),
            "words": sorted(map(len, vectorize.get_vocabulary())),
            "numbers": numbers,
            "lines": [len(open(name).readlines()) for name in ("notes.txt", "moved.txt", "log.csv")],
            "arrays": float(np.load("arrays.npz")["x"].sum()),
            "made": len(os.listdir(made)),
            "names": len(os.listdir(".")),
        }
    ),
)
shutil.rmtree(made)
os.chdir(here)
