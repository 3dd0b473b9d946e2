"""Examine TensorFlow, MPI and an allreduce in separate processes, each of which prints one line of JSON.

A newline precedes the JSON, because earlier output of a library may have ended without one.
Doctor itself loads neither TensorFlow, which is slow and prints much, nor MPI, which may abort the process.
"""
