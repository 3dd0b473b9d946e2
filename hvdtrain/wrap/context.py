"""Keep track of whether Keras runs a step of all ranks, and whether a model computes the rows of this rank."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from hvdtrain.collectives.engine import Engine
from hvdtrain.wrap.row_shard import Share

_engine: ContextVar[Engine | None] = ContextVar(
    "the ranks of a running fit, evaluate or predict", default=None
)
_share: ContextVar[Share | None] = ContextVar("the rows on which a model is called", default=None)
# Takes the name of a layer and a loss that it adds; returns the loss that Keras keeps.
_combine: ContextVar[Callable[[str, Any], Any] | None] = ContextVar(
    "changes the losses that layers add", default=None
)
_testing: ContextVar[bool] = ContextVar("a model is tested on generated rows", default=False)


@contextlib.contextmanager
def of_all_ranks(engine: Engine) -> Iterator[None]:
    """Mark the time in which all ranks do the same step. Other threads are not affected."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


@contextlib.contextmanager
def on_rows(share: Share) -> Iterator[None]:
    """Mark the time in which a model computes the rows of this rank."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


@contextlib.contextmanager
def adding(combine: Callable[[str, Any], Any]) -> Iterator[None]:
    """Pass each loss that a layer adds through a function, for the time of this context.

    Args:
        combine: Takes the name of a layer and a loss; returns the loss that Keras keeps.
    """
    token = _combine.set(combine)
    try:
        yield
    finally:
        _combine.reset(token)


@contextlib.contextmanager
def on_no_rows() -> Iterator[None]:
    """Mark the time in which something is created that belongs to no batch, such as a weight."""
    tokens = _engine.set(None), _share.set(None), _combine.set(None)
    try:
        yield
    finally:
        _engine.reset(tokens[0])
        _share.reset(tokens[1])
        _combine.reset(tokens[2])


@contextlib.contextmanager
def testing() -> Iterator[None]:
    """Mark the time in which a model computes generated rows on this rank alone."""
    token = _testing.set(True)
    try:
        with on_no_rows():
            yield
    finally:
        _testing.reset(token)


def is_testing() -> bool:
    """Return whether the results are used only to test a model."""
    return _testing.get()


def engine() -> Engine | None:
    """Return the engine of the ranks that do the same step, or None if this rank works alone."""
    return _engine.get()


def share() -> Share | None:
    """Return the rows of this rank, or None if all ranks compute the same."""
    return _share.get()


def combine() -> Callable[[str, Any], Any] | None:
    """Return the function for the losses that layers add, or None if they stay unchanged."""
    return _combine.get()
