"""The wire: one interface, one file an engine."""
