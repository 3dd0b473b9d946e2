"""Layers that compute over all ranks."""
