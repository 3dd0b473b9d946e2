"""The ways in which TensorFlow runs a function of tensors; each takes and returns NumPy arrays."""

import numpy as np
import tensorflow as tf


def eagerly(function, *inputs):
    return tf.nest.map_structure(np.asarray, function(*(tf.constant(each) for each in inputs)))


def in_function(function, *inputs):
    return eagerly(tf.function(function), *inputs)


def in_session(function, *inputs):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        results = function(*(tf.constant(each) for each in inputs))
        session.run(tf.compat.v1.global_variables_initializer())
        return session.run(results)


MODES = {"eager": eagerly, "function": in_function, "session": in_session}


def gradient(function, *inputs, upstream=None):
    """The gradients of a function's first output, by the means that the mode has."""
    if not tf.compat.v1.get_default_graph().building_function and not tf.executing_eagerly():
        output = tf.nest.flatten(function(*inputs))[0]
        return tf.gradients(output, list(inputs), None if upstream is None else [upstream])
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = tf.nest.flatten(function(*inputs))[0]
    return tape.gradient(output, list(inputs), upstream)
