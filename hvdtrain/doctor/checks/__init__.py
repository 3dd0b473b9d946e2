"""Check one subject of the environment in each file; a check is a function that returns a `Finding`.

A check judges facts that `doctor.probe_runner` collected or that it reads from this host in a line or
two. Functions that parse output take the text as an argument, so that tests can pass recorded output.
"""
