"""Provide layers that compute over all ranks."""
