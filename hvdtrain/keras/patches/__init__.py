"""Every place where a function of Keras is replaced, one file per Keras class."""
