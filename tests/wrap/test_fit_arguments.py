"""Check the callbacks that `--wrap` adds to a `fit`."""

from types import SimpleNamespace

import keras
import pytest

from hvdtrain.wrap import fit_arguments


@pytest.mark.parametrize(
    "seconds, steps, said", [(0.002, 20, ["a step takes 2.0 ms on 2 ranks"]), (0.02, 20, []), (0.002, 5, [])]
)
def test_short_steps_are_named_once(monkeypatch, seconds, steps, said):
    clock, sentences = [0.0], []
    monkeypatch.setattr(fit_arguments, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    last = fit_arguments.LastCallback(SimpleNamespace(size=2, say=sentences.append), [])
    monkeypatch.setattr(last, "_compare", lambda: None)
    monkeypatch.setattr(last, "_agree_to_stop", lambda: None)
    for epoch in range(2):
        for step in range(steps + 1):
            clock[0] += seconds
            last.on_train_batch_end(step)
        last.on_epoch_end(epoch)
    assert [sentence.partition(",")[0] for sentence in sentences] == said


def test_a_callback_list_of_the_script_gets_the_first_and_the_last_callback():
    engine, mine = SimpleNamespace(size=2), keras.callbacks.Callback()
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    given = keras.callbacks.CallbackList([mine], add_history=False, model=model)
    for _ in range(2):  # a list that is used again has each of them once at its place
        arguments = {"callbacks": given}
        fit_arguments.add_callbacks(engine, model, arguments)
        assert arguments["callbacks"] is given
    first, *others, last = given.callbacks
    assert isinstance(first, fit_arguments.FirstCallback) and isinstance(last, fit_arguments.LastCallback)
    assert others == [mine]
