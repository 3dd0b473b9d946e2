"""Connect TensorFlow: tensors as buffers, host calls in a graph, differentiable collectives."""
