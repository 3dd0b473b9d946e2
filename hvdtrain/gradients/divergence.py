"""Compare trained variables over the ranks after the training, including those that are not averaged."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Engine, MismatchError, ranks_text
from hvdtrain.gradients.naming import variable_name
from hvdtrain.gradients.projections import checksum, precision, projected
from hvdtrain.gradients.trained_variables import Key, Trained, key_of, registry
from hvdtrain.gradients.verification import Policy

# On hosts with different CPUs an update may round differently; so many rounding errors do not end a job.
_ROUNDINGS = 1000

_PLAIN = (
    "Expected: the same values, but {updater} with gradients that are not averaged over the ranks. Give it "
    "hvd.DistributedOptimizer(...), or take the gradients from hvd.DistributedGradientTape(tape). If each "
    "rank is to train its own, register it: optimizer.register_local_var(variable) of a "
    "hvd.DistributedOptimizer, or tape.register_local_source(variable)."
)
_AVERAGED = (
    "Expected: the same values, as their gradients are averaged. The ranks started from different values, or "
    "something sets them on some ranks only. Call hvd.broadcast_variables(model.variables, root_rank=0) before "
    "the first step, when the model is built, or give model.fit the callback "
    "hvd.callbacks.BroadcastGlobalVariablesCallback(0)."
)
_AFTERWARDS = (
    "They were the same when they were verified. If one rank has loaded other values since, all is well; "
    "otherwise the ranks no longer train one model, and HVDTRAIN_VERIFY=every:100 finds out since when."
)
_JOINED = "hvd.join() lets a rank stop before the others; hvd.broadcast_variables makes them equal again."
_PERHAPS = (
    "Nothing averages their gradients. If each rank is to train its own, all is well; otherwise use "
    "hvd.DistributedOptimizer(...) or hvd.DistributedGradientTape(tape)."
)


@dataclass(frozen=True)
class Difference:
    """A variable that differs between ranks.

    Args:
        one: The record of the variable on the first of its ranks.
        others: The ranks that differ from the first one.
        rounded: Whether rounding alone may be the cause.
    """

    one: Trained
    others: tuple[int, ...]
    rounded: bool


def compare(engine: Engine, variables: Iterable[Any], when: str) -> None:
    """Compare the trainable variables of one model now. All ranks of the engine call this.

    Args:
        engine: The ranks that train the model together.
        variables: The variables, the same list on all ranks; local ones are not compared.
        when: The time of the comparison, for the message: "after the first epoch".

    Raises:
        MismatchError: On every rank, if one of them differs.
    """
    if Policy.from_environment().never:
        return
    compared = [trained for variable in variables if (trained := _in_model(engine, variable)) is not None]
    numbered = {replace(trained.key, number=number): trained for number, trained in enumerate(compared)}
    differences = _differences(engine, numbered)
    _judge(engine, differences, when)
    if not differences:
        _warn_of_plain(engine, compared)


def compare_at_end(engine: Engine) -> None:
    """Compare all trained variables that still exist when all ranks have reached the end of the script.

    Args:
        engine: The world.

    Raises:
        MismatchError: On every rank, if variables differ that should be the same.
    """
    compared = [] if Policy.from_environment().never else registry.alive()
    _judge(
        engine,
        _differences(engine, {trained.key: trained for trained in compared}),
        "at the end of the script",
    )


def _in_model(engine: Engine, variable: Any) -> Trained | None:
    """Return the record of a variable of a model; None if this engine's ranks may have different values."""
    if registry.is_local(variable):
        return None
    known = registry.find(variable)
    if known is None:
        return Trained(lambda: variable, key_of(engine, variable, False), variable_name(variable))
    if known.key.averaged and known.key.ranks != engine.ranks:
        return None
    return replace(known, key=key_of(engine, variable, known.key.averaged), expected=True, verified=False)


def _differences(engine: Engine, own: Mapping[Key, Trained]) -> list[Difference]:
    """Find the variables that differ among all ranks that should have the same values."""
    sums = _by_rank(engine, {key: checksum(_value(trained)) for key, trained in own.items()})
    known = dict.fromkeys(key for of_rank in sums.values() for key in of_rank)
    wrong = [key for key in known if _differ([sums[rank].get(key) for rank in key.ranks])]
    if not wrong:
        return []
    summaries = _by_rank(engine, {key: _summary(own[key]) for key in wrong if key in own})
    return [
        _difference(key, [(sums[rank][key], *summaries[rank][key]) for rank in key.ranks]) for key in wrong
    ]


def _by_rank(engine: Engine, own: dict[Key, Any]) -> dict[int, dict[Key, Any]]:
    return dict(zip(engine.ranks, engine.allgather_object(own), strict=True))


def _differ(sums: Sequence[int | None]) -> bool:
    """Return whether checksums differ; False if some ranks lack the variable, because they do not train it."""
    return None not in sums and len(set(sums)) > 1


def _summary(trained: Trained) -> tuple[Trained, tuple[float, float, float]]:
    """Return the record, projection, magnitude and precision of a variable that differs."""
    value = _value(trained)
    eps = precision(value.dtype) if value.dtype.kind not in "iub" else 0.0
    return replace(trained, variable=None), (*projected(value), eps)


def _difference(key: Key, summaries: Sequence[tuple[int, Trained, tuple[float, float, float]]]) -> Difference:
    expected, trained, (projection, magnitude, eps) = summaries[0]
    largest = max(abs(summary[2][0] - projection) for summary in summaries)
    others = tuple(rank for rank, summary in zip(key.ranks, summaries, strict=True) if summary[0] != expected)
    return Difference(trained, others, key.averaged and largest <= _ROUNDINGS * eps * magnitude)


def _judge(engine: Engine, differences: Sequence[Difference], when: str) -> None:
    """Raise an error for differences that are certainly wrong, and warn about those that may be intended."""
    averaged = [difference for difference in differences if difference.one.key.averaged]
    plain = [difference for difference in differences if not difference.one.key.averaged]
    diverged = [difference for difference in averaged if not difference.rounded]
    wrong = [difference for difference in diverged if not difference.one.verified]
    if not diverged and registry.together:
        # Only if the averaged ones are equal: otherwise one rank may have loaded another model after the training.
        wrong = [difference for difference in plain if difference.one.expected]
    if wrong and not engine.has_joined:
        raise MismatchError(f"{_named(wrong, when)} {_reason(wrong[0].one)}")
    if differences:
        advice = _JOINED if engine.has_joined else _AFTERWARDS if averaged else _PERHAPS
        engine.warn(f"{_named([*averaged, *plain], when)} {advice}")


def _reason(trained: Trained) -> str:
    if trained.key.averaged:
        return _AVERAGED
    updater = (
        f"an optimizer that is not distributed ({trained.optimizer}) updates them"
        if trained.optimizer
        else "something updates them"
    )
    return _PLAIN.format(updater=updater)


def _named(differences: Sequence[Difference], when: str) -> str:
    first = differences[0]
    more = (
        f", as well as {_listed([difference.one.name for difference in differences[1:]])}"
        if differences[1:]
        else ""
    )
    verb = "differs" if len(first.others) == 1 else "differ"
    return (
        f"The ranks hold different values of trained variables {when}: {first.one.name} on "
        f"{ranks_text(first.others)} {verb} from rank {first.one.key.ranks[0]}{more}."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _warn_of_plain(engine: Engine, compared: Sequence[Trained]) -> None:
    plain = [trained for trained in compared if trained.optimizer and not trained.key.averaged]
    if plain and not registry.warned:
        registry.warned = True
        engine.warn(
            f"the gradients of {_listed([trained.name for trained in plain])} are not averaged over the ranks, as "
            f"{plain[0].optimizer} is not distributed. The variables are the same on all ranks so far. Give it "
            f"hvd.DistributedOptimizer({plain[0].optimizer}(...)), unless train_step averages them itself."
        )


def _value(trained: Trained) -> np.ndarray:
    return np.asarray(trained.variable())
