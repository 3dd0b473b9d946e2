"""TensorFlow: tensors as buffers, calls of the host in a graph, differentiable collectives."""
