"""SyncBatchNormalization on shares of a batch, against BatchNormalization on the whole of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdtrain.tensorflow as hvd

pytestmark = pytest.mark.ranks


def whole_batch(shares, shape, dtype="float64", offset=0.0):
    random = np.random.default_rng(0)
    return (random.standard_normal((sum(shares), *shape)) + offset).astype(dtype)


def share_of_rank(shares):
    start = sum(shares[: hvd.rank()])
    return slice(start, start + shares[hvd.rank()])


def trained(layer, x, weights, reduce):
    """Output, gradients by input, gamma and beta, and moving statistics after one training step."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(y**3 * weights)
    of_x, of_gamma, of_beta = tape.gradient(loss, [x, layer.gamma, layer.beta])
    return y, of_x, reduce(of_gamma), reduce(of_beta), layer.moving_mean, layer.moving_variance


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "function"])
@pytest.mark.parametrize(("shape", "axis"), [((3,), -1), ((4, 2, 3), -1), ((3, 4), 1)])
@pytest.mark.parametrize("uneven", [False, True])
def test_training_on_shares_is_training_on_the_whole(wrap, shape, axis, uneven):
    shares = [2 + uneven * rank for rank in range(hvd.size())]
    x = whole_batch(shares, shape)
    weights = np.random.default_rng(1).standard_normal(x.shape)
    mine = share_of_rank(shares)
    sync = hvd.SyncBatchNormalization(axis=axis, dtype="float64", momentum=0.5)
    plain = keras.layers.BatchNormalization(axis=axis, dtype="float64", momentum=0.5)
    sync.build((None, *shape))
    plain.build((None, *shape))
    ours = wrap(
        lambda: trained(sync, x[mine], weights[mine], lambda each: hvd.allreduce(each, op=hvd.Sum))[:4]
    )()
    theirs = trained(plain, x, weights, lambda each: each)
    for result, expected in zip(ours[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(result, expected[mine], rtol=1e-9, atol=1e-10)
    for result, expected in zip(ours[2:], theirs[2:4], strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(sync.moving_mean, plain.moving_mean, rtol=1e-10)
    np.testing.assert_allclose(sync.moving_variance, plain.moving_variance, rtol=1e-10)


def test_masked_samples_do_not_count():
    shares = [3] * hvd.size()
    x = whole_batch(shares, (4, 2))
    mask = np.random.default_rng(2).random((len(x), 4)) > 0.3
    mine = share_of_rank(shares)
    sync, plain = (
        hvd.SyncBatchNormalization(dtype="float64"),
        keras.layers.BatchNormalization(dtype="float64"),
    )
    ours = sync(tf.constant(x[mine]), training=True, mask=tf.constant(mask[mine]))
    theirs = plain(tf.constant(x), training=True, mask=tf.constant(mask))
    np.testing.assert_allclose(ours, theirs[mine], rtol=1e-5)  # Keras adds an epsilon to each count
    np.testing.assert_allclose(sync.moving_variance, plain.moving_variance, rtol=1e-5)


def test_a_rank_without_samples():
    shares = [4] + [0] * (hvd.size() - 1)
    x = whole_batch(shares, (3,))
    sync, plain = (
        hvd.SyncBatchNormalization(dtype="float64"),
        keras.layers.BatchNormalization(dtype="float64"),
    )
    ours = sync(tf.constant(x[share_of_rank(shares)]), training=True)
    theirs = plain(tf.constant(x), training=True)
    np.testing.assert_allclose(ours, theirs[share_of_rank(shares)], rtol=1e-9)
    np.testing.assert_allclose(sync.moving_mean, plain.moving_mean, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-4), ("mixed_float16", 1e-2)])
def test_large_means_lose_no_digits_that_the_plain_layer_keeps(dtype, rtol):
    shares = [8] * hvd.size()
    x = whole_batch(shares, (2,), "float32", offset=300.0)
    mine = share_of_rank(shares)
    sync = hvd.SyncBatchNormalization(dtype=dtype, momentum=0.0)
    plain = keras.layers.BatchNormalization(dtype="float32", momentum=0.0)
    sync(tf.constant(x[mine]), training=True)
    plain(tf.constant(x.astype("float16") if "16" in dtype else x), training=True)
    np.testing.assert_allclose(sync.moving_mean, plain.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(sync.moving_variance, plain.moving_variance, rtol=rtol)


def test_inference_and_frozen_layers_communicate_nothing():
    layer = hvd.SyncBatchNormalization()
    layer.build((None, 2))
    layer.moving_mean.assign([1.0, 2.0])
    if hvd.rank() == 0:  # were it to communicate, the ranks would not agree on their next operation
        np.testing.assert_allclose(layer(tf.constant([[1.0, 2.0]])), [[0.0, 0.0]], atol=1e-6)
        layer.trainable = False
        np.testing.assert_allclose(layer(tf.constant([[1.0, 2.0]]), training=True), [[0.0, 0.0]], atol=1e-6)
    hvd.barrier()


def test_in_fit_the_moving_statistics_are_those_of_the_whole():
    x = whole_batch([4] * hvd.size(), (3,), "float32")
    model = keras.Sequential(
        [keras.Input((3,)), hvd.SyncBatchNormalization(momentum=0.0), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x[share_of_rank([4] * hvd.size())], np.zeros((4, 1)), batch_size=4, verbose=0)
    np.testing.assert_allclose(model.layers[0].moving_mean, x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.layers[0].moving_variance, x.var(0), rtol=1e-4)


def test_names_settings_and_saving(tmp_path):
    assert hvd.SyncBatchNormalization().name.startswith("sync_batch_normalization")
    assert hvd.SyncBatchNormalization(fused=False, name="mine", center=False).name == "mine"
    for fused in (True, None):
        with pytest.raises(ValueError, match="cannot be fused"):
            hvd.SyncBatchNormalization(fused=fused)
    model = keras.Sequential([keras.Input((2,)), hvd.SyncBatchNormalization(momentum=0.7)])
    model.save(tmp_path / "model.keras")
    layer = keras.models.load_model(tmp_path / "model.keras").layers[0]
    assert type(layer) is hvd.SyncBatchNormalization and layer.momentum == 0.7
