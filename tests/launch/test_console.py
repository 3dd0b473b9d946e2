"""The screen: what is shown, what is left out, and that no line garbles another."""

import io

import pytest

from hvdtrain.launch.supervision import console
from hvdtrain.launch.supervision.console import Console
from hvdtrain.launch.supervision.protocol import STDERR, STDOUT

# What Keras 3.15 writes for an epoch, recorded; the bar shortened.
LINE = "━".encode()
FIRST = (
    b"\r\x1b[1m1/3\x1b[0m \x1b[32m" + 6 * LINE + b"\x1b[0m\x1b[37m" + 14 * LINE + b"\x1b[0m \x1b[1m0s\x1b[0m"
)
FIRST += b" 212ms/step - loss: 0.0000e+00"
LAST = b"\x08" * 60 + b"\r\x1b[1m3/3\x1b[0m \x1b[32m" + 20 * LINE + b"\x1b[0m\x1b[37m\x1b[0m "
LAST += b"\x1b[1m0s\x1b[0m 7ms/step - accuracy: 0.5000 - loss: nan"
EPOCH = b"Epoch 1/2\n" + FIRST + LAST + b"  \n"
TQDM = b"\r 10%|# | 1/10 [00:00<00:01]\r100%|##| 10/10 [00:01<00:00]\n"
OLD = b"\r3/3 [=====] - 0s - loss: 1.0\n"


class Screen:
    """A console over one file for both streams, as a terminal is."""

    def __init__(self, verbose=False):
        self.file = io.BytesIO()
        self.console = Console(verbose, self.file, self.file)

    def after(self, *writes):
        for rank, stream, data in writes:
            self.console.write(rank, stream, data)
        self.console.finish()
        return self.file.getvalue()


def test_rank_0_keeps_its_bar():
    assert Screen().after((0, STDOUT, EPOCH)) == EPOCH


@pytest.mark.parametrize(
    "bar", [EPOCH, TQDM, b"\r3/3 [=====] - 0s - loss: 1.0\n"], ids=["keras", "tqdm", "old"]
)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_bars_of_other_ranks_are_left_out_however_they_arrive(bar, piece):
    pieces = [(2, STDOUT, bar[at : at + piece]) for at in range(0, len(bar), piece)]
    assert Screen().after(*pieces, (2, STDOUT, b"after\n")) == b"[2] after\n"


def test_text_behind_the_bar_of_another_rank_is_kept():
    assert Screen().after((1, STDOUT, FIRST + LAST + b"saved the model\n")) == b"[1] saved the model\n"


def test_a_line_of_windows_is_no_bar():
    assert Screen().after((1, STDOUT, b"one\r\ntwo\r\n")) == b"[1] one\n[1] two\n"


def test_what_looks_like_a_bar_but_was_not_redrawn_is_shown():
    assert Screen().after((1, STDOUT, b"3/3 files, 100%|x|\n")) == b"[1] 3/3 files, 100%|x|\n"


def test_lines_of_another_rank_wait_for_the_end_of_rank_0s_line():
    shown = Screen().after((0, STDOUT, b"first, "), (1, STDOUT, b"other\n"), (0, STDOUT, b"second\nthird"))
    assert shown == b"first, second\n[1] other\nthird"


def test_lines_of_another_rank_start_a_line_when_rank_0_keeps_drawing(monkeypatch):
    monkeypatch.setattr(console, "WAIT", 0)
    screen = Screen()
    screen.console.write(0, STDOUT, FIRST)
    screen.console.write(1, STDOUT, b"news\n")
    screen.console.tick()
    assert screen.after((0, STDOUT, LAST)) == FIRST + b"\n[1] news\n" + LAST


def test_lines_cut_anywhere_are_put_together():
    writes = [(rank, STDOUT, b"%d" % rank) for _ in range(3) for rank in (1, 2)]
    assert Screen().after(*writes, (1, STDOUT, b"\n")) == b"[1] 111\n[2] 222\n"


NOISE = [
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n",
    b"I0000 00:00:1795418133.663602    4756 port.cc:153] oneDNN custom operations are on. You may see\n",
    b"I0000 00:00:1795418134.102811    4756 cpu_feature_guard.cc:227] This TensorFlow binary is optimized\n",
    b"To enable the following instructions: AVX2 AVX512F, in other operations, rebuild TensorFlow\n",
    b"2026-11-23 07:05:33.123456: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.\n",
    b"E0000 00:00:1795418133.663602 47 cuda_dnn.cc:8579] Unable to register cuDNN factory: Attempting to\n",
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("noise", NOISE)
def test_start_up_noise_is_left_out_unless_asked_for(rank, noise):
    writes = [(rank, STDERR, noise[:40]), (rank, STDERR, noise[40:] + b"mine\n")]
    prefix = b"[1] " if rank else b""
    assert Screen().after(*writes) == prefix + b"mine\n"
    assert Screen(verbose=True).after(*writes) == prefix + noise + prefix + b"mine\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_errors_of_tensorflow_and_of_the_user_are_shown(rank):
    said = b"E0000 00:00:1795418133.66 47 cuda_platform.cc:51] failed call to cuInit\n"
    said += b"I1123 07:05:33.1 4 train.py:1] x\n"
    shown = Screen().after((rank, STDERR, said))
    assert shown.replace(b"[1] ", b"") == said


def test_a_question_on_standard_error_is_shown_before_its_line_ends(monkeypatch):
    monkeypatch.setattr(console, "WAIT", 0)
    screen = Screen()
    screen.console.write(0, STDERR, b"well? ")
    screen.console.tick()
    assert screen.file.getvalue() == b"well? "
    assert screen.after((0, STDERR, b"yes\n")) == b"well? yes\n"
