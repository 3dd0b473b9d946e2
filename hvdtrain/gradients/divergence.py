"""Compare trained variables over the ranks after the training, also those that nobody averages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hvdtrain.collectives.engine import Engine, MismatchError, ranks_text
from hvdtrain.gradients.naming import variable_name
from hvdtrain.gradients.projection import checksum, precision, projected
from hvdtrain.gradients.trained_variables import Key, Trained, key_of, registry
from hvdtrain.gradients.verification import Policy

# On hosts with different CPUs an update may round differently; so many times that is no reason to end a job.
_ROUNDINGS = 1000

_PLAIN = (
    "Expected: the same values, but {who} with gradients that are not averaged over the ranks. Give it "
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
    """A variable that differs.

    Args:
        one: The variable, as the first of its ranks knows it.
        others: The ranks that differ from the first one.
        rounded: Whether no more than rounding may be the cause.
    """

    one: Trained
    others: tuple[int, ...]
    rounded: bool


def compare(engine: Engine, variables: Iterable[Any], when: str) -> None:
    """Compare the trainable variables of one model now. All ranks of the engine call this.

    Args:
        engine: The ranks that train the model together.
        variables: The variables, the same list on all ranks; local ones are left out.
        when: The moment, for the message: "after the first epoch".

    Raises:
        MismatchError: On every rank, if one of them differs.
    """
    if Policy.from_environment().never:
        return
    compared = [one for each in variables if (one := _in_model(engine, each)) is not None]
    numbered = {replace(one.key, number=number): one for number, one in enumerate(compared)}
    differences = _differences(engine, numbered)
    _judge(engine, differences, when)
    if not differences:
        _warn_of_plain(engine, compared)


def compare_at_end(engine: Engine) -> None:
    """Compare all trained variables that are left when all ranks have come to the end of the script.

    Args:
        engine: The world.

    Raises:
        MismatchError: On every rank, if variables differ that should be the same.
    """
    compared = [] if Policy.from_environment().never else registry.alive()
    _judge(engine, _differences(engine, {one.key: one for one in compared}), "at the end of the script")


def _in_model(engine: Engine, variable: Any) -> Trained | None:
    """Return what is known of a variable of a model; None if this engine's ranks may hold different values."""
    if registry.is_local(variable):
        return None
    known = registry.find(variable)
    if known is None:
        return Trained(lambda: variable, key_of(engine, variable, False), variable_name(variable))
    if known.key.averaged and known.key.ranks != engine.ranks:
        return None
    return replace(known, key=key_of(engine, variable, known.key.averaged), expected=True, verified=False)


def _differences(engine: Engine, mine: Mapping[Key, Trained]) -> list[Difference]:
    """Find the variables that differ among all ranks that should hold the same values."""
    sums = _by_rank(engine, {key: checksum(_value(one)) for key, one in mine.items()})
    known = dict.fromkeys(key for of_rank in sums.values() for key in of_rank)
    wrong = [key for key in known if _differ([sums[rank].get(key) for rank in key.ranks])]
    if not wrong:
        return []
    accounts = _by_rank(engine, {key: _account(mine[key]) for key in wrong if key in mine})
    return [
        _difference(key, [(sums[rank][key], *accounts[rank][key]) for rank in key.ranks]) for key in wrong
    ]


def _by_rank(engine: Engine, mine: dict[Key, Any]) -> dict[int, dict[Key, Any]]:
    return dict(zip(engine.ranks, engine.allgather_object(mine), strict=True))


def _differ(sums: Sequence[int | None]) -> bool:
    """Tell whether checksums differ; not if some ranks lack the variable, which they then do not train."""
    return None not in sums and len(set(sums)) > 1


def _account(one: Trained) -> tuple[Trained, tuple[float, float, float]]:
    """Return what the other ranks have to know of a variable that differs."""
    value = _value(one)
    eps = precision(value.dtype) if value.dtype.kind not in "iub" else 0.0
    return replace(one, variable=None), (*projected(value), eps)


def _difference(key: Key, accounts: Sequence[tuple[int, Trained, tuple[float, float, float]]]) -> Difference:
    first, one, (projection, magnitude, eps) = accounts[0]
    farthest = max(abs(account[2][0] - projection) for account in accounts)
    others = tuple(rank for rank, account in zip(key.ranks, accounts, strict=True) if account[0] != first)
    return Difference(one, others, key.averaged and farthest <= _ROUNDINGS * eps * magnitude)


def _judge(engine: Engine, differences: Sequence[Difference], when: str) -> None:
    """Raise for what is certainly wrong, and warn of what may be right."""
    averaged = [each for each in differences if each.one.key.averaged]
    plain = [each for each in differences if not each.one.key.averaged]
    parted = [each for each in averaged if not each.rounded]
    wrong = [each for each in parted if not each.one.verified]
    if not parted and registry.together:
        # Were the averaged ones different now, one rank might have loaded another model after the training.
        wrong = [each for each in plain if each.one.expected]
    if wrong and not engine.has_joined:
        raise MismatchError(f"{_named(wrong, when)} {_reason(wrong[0].one)}")
    if differences:
        advice = _JOINED if engine.has_joined else _AFTERWARDS if averaged else _PERHAPS
        engine.warn(f"{_named([*averaged, *plain], when)} {advice}")


def _reason(one: Trained) -> str:
    if one.key.averaged:
        return _AVERAGED
    who = (
        f"an optimizer that is not distributed ({one.optimizer}) updates them"
        if one.optimizer
        else "something updates them"
    )
    return _PLAIN.format(who=who)


def _named(differences: Sequence[Difference], when: str) -> str:
    first = differences[0]
    more = f", as well as {_listed([each.one.name for each in differences[1:]])}" if differences[1:] else ""
    verb = "differs" if len(first.others) == 1 else "differ"
    return (
        f"The ranks hold different values of trained variables {when}: {first.one.name} on "
        f"{ranks_text(first.others)} {verb} from rank {first.one.key.ranks[0]}{more}."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _warn_of_plain(engine: Engine, compared: Sequence[Trained]) -> None:
    plain = [one for one in compared if one.optimizer and not one.key.averaged]
    if plain and not registry.warned:
        registry.warned = True
        engine.warn(
            f"the gradients of {_listed([one.name for one in plain])} are not averaged over the ranks, as "
            f"{plain[0].optimizer} is not distributed. The variables are the same on all ranks so far. Give it "
            f"hvd.DistributedOptimizer({plain[0].optimizer}(...)), unless train_step averages them itself."
        )


def _value(one: Trained) -> np.ndarray:
    return np.asarray(one.variable())
