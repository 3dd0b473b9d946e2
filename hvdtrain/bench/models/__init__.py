"""Five models, once for Keras and once for torch, with the same shapes and the same optimizer."""
