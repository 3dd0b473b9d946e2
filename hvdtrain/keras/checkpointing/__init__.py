"""Save, stop and resume a training for `hvd.callbacks.Checkpoint`."""
