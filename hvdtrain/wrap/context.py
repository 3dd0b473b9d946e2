"""What is going on: whether Keras is at work on behalf of all ranks, and whether a model computes its rows."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from hvdtrain.collectives.engine import Engine
from hvdtrain.wrap.row_shard import Share

_engine: ContextVar[Engine | None] = ContextVar("fit, evaluate or predict is at work", default=None)
_share: ContextVar[Share | None] = ContextVar("a model is being called on a rank's rows", default=None)
# Takes the name of a layer and a loss that it adds; returns the loss that Keras keeps.
_combine: ContextVar[Callable[[str, Any], Any] | None] = ContextVar("losses are being added", default=None)
_trying: ContextVar[bool] = ContextVar("a model is being tried on made-up rows", default=False)


@contextlib.contextmanager
def of_all_ranks(engine: Engine) -> Iterator[None]:
    """Marks the time in which all ranks do the same step; other threads do not see it."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


@contextlib.contextmanager
def on_rows(share: Share) -> Iterator[None]:
    """Marks the time in which a model computes a rank's rows."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


@contextlib.contextmanager
def adding(combine: Callable[[str, Any], Any]) -> Iterator[None]:
    """Mark the time in which the losses that layers add go through a function.

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
    """Marks the time in which something is made that has nothing to do with any batch, such as a weight."""
    tokens = _engine.set(None), _share.set(None), _combine.set(None)
    try:
        yield
    finally:
        _engine.reset(tokens[0])
        _share.reset(tokens[1])
        _combine.reset(tokens[2])


@contextlib.contextmanager
def trying() -> Iterator[None]:
    """Marks the time in which a model computes made-up rows on this rank alone."""
    token = _trying.set(True)
    try:
        with on_no_rows():
            yield
    finally:
        _trying.reset(token)


def is_trying() -> bool:
    """Tells whether what is computed is thrown away."""
    return _trying.get()


def engine() -> Engine | None:
    """Returns the ranks that are at the same step, or None where each is by itself."""
    return _engine.get()


def share() -> Share | None:
    """Returns which rows are being computed, or None where what is computed is the same on all ranks."""
    return _share.get()


def combine() -> Callable[[str, Any], Any] | None:
    """Return what losses go through that layers add, or None where they stay as they are."""
    return _combine.get()
