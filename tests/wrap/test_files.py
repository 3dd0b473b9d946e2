"""Check that two ranks that write one file at the same moment each have their own copy, in any order."""

import os
import time

import pytest

from hvdtrain.wrap import files

QUESTIONS = ("_lexists", "_lstat", "_is_dir")


@pytest.mark.parametrize("moment", range(1, 9))
@pytest.mark.parametrize("before", [None, "old"])
def test_another_rank_writes_while_this_one_opens_to_append(tmp_path, monkeypatch, moment, before):
    path, own = tmp_path / "log.csv", tmp_path / "own"
    if before is not None:
        path.write_text(before)
        os.utime(path)
    begun = path.stat().st_ctime + 1e-9 if before is not None else time.time() - 1
    copies = files._Copies(str(own), begun)
    asked = []

    def asking(ask):
        def then(place):
            asked.append(place)
            if len(asked) == moment:
                with path.open("a") as file:
                    file.write("rank 0")
            return ask(place)

        return then

    for name in QUESTIONS:
        monkeypatch.setattr(files, name, asking(getattr(files, name)))
    place = copies.for_writing(str(path), keep=True)
    monkeypatch.undo()
    assert place == str(own) + str(path)
    with open(place, "a") as file:  # noqa: PTH123 - as a logger does
        file.write(", mine")
    with open(place) as file:  # noqa: PTH123
        text = file.read()
    # The old content may be missing, as nobody reads this copy. A file that rank 0 created is never visible.
    assert text.endswith(", mine")
    assert "rank 0" not in text or before is not None
