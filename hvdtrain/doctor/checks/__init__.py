"""What doctor looks at: one subject a file, each check a function that returns a `Finding`.

A check judges; what it judges was asked by `doctor.inquiry` or is read from this host in a line or
two. Whatever parses a text takes the text, so that the tests can hand it recorded ones.
"""
