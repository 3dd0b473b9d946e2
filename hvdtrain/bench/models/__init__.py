"""Build five models, in Keras and in torch, with the same shapes and the same optimizer."""
