"""Check the hint that steps are too short to gain from more ranks."""

from types import SimpleNamespace

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
