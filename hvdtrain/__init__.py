"""Train one Keras model on many machines, and prove at the first step that it is one model.

Importing this package is free: it loads neither TensorFlow nor MPI. A training script imports
`hvdtrain.keras`.
"""

__version__ = "0.1.0"
