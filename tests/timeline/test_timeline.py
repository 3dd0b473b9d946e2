"""What a rank records: whole at every moment, whatever happens to the process, the disk or the threads."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hvdtrain.timeline.recorder import Timeline
from hvdtrain.timeline.recordings import TraceError, native_events, native_path_of, path_of, read_trace


def recorded(path):
    """The events of a file that any reader of JSON takes."""
    return json.loads(path.read_text())


def phases(events):
    """Beginnings by name and ends as None, in the order of the file."""
    return [each.get("name") for each in events if each["ph"] in "BE"]


def python(code, *args, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_file_of_chromes_trace_format(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0, size=2)
    with timeline.span("allreduce.x", "NEGOTIATE_ALLREDUCE"):
        pass
    with timeline.span("allreduce.x", "ALLREDUCE"), timeline.span("allreduce.x", "MPI_ALLREDUCE"):
        pass
    timeline.close()
    events = recorded(tmp_path / "t.json")
    assert phases(events) == ["NEGOTIATE_ALLREDUCE", None, "ALLREDUCE", "MPI_ALLREDUCE", None, None]
    names = {each["pid"]: each["args"]["name"] for each in events if each.get("name") == "process_name"}
    drawn = [each for each in events if each["ph"] in "BE"]
    assert {names[each["pid"]] for each in drawn} == {"allreduce.x"}
    assert [each["ts"] for each in drawn] == sorted(each["ts"] for each in drawn)
    about = events[0]["args"]
    assert about["rank"] == 0 and about["size"] == 2 and about["host"]
    assert abs(about["start_time_since_epoch_in_micros"] / 1e6 - timeline.path.stat().st_mtime) < 60


def test_rank_0_writes_the_path_asked_for_and_the_others_beside_it(tmp_path):
    for rank, name in enumerate(["run.5.json", "run.5.rank1.json", "run.5.rank2.json"]):
        timeline = Timeline(tmp_path / "run.5.json", rank)
        timeline.close()
        assert timeline.path == tmp_path / name
        assert recorded(tmp_path / name)[0]["args"]["rank"] == rank
    assert path_of(tmp_path / "bare", 3).name == "bare.rank3"


def test_the_file_stays_where_it_was_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timeline = Timeline("t.json", 0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    timeline.close()
    assert timeline.path == tmp_path / "t.json"


def test_the_file_is_whole_json_after_every_event(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0)
    path = timeline.path
    assert len(recorded(path)) == 1
    with timeline.span('näme "quoted"\n', "ALLREDUCE"):
        assert phases(recorded(path)) == ["ALLREDUCE"]
        assert recorded(path)[1]["args"]["name"] == 'näme "quoted"\n'
    assert phases(recorded(path)) == ["ALLREDUCE", None]
    timeline.close()


def test_an_error_within_a_span_ends_it_and_passes_on(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0)
    with pytest.raises(KeyError), timeline.span("x", "ALLREDUCE"):
        raise KeyError
    assert phases(recorded(timeline.path)) == ["ALLREDUCE", None]
    timeline.close()


def test_cycles_are_marked_when_asked(tmp_path):
    for mark, count in ((True, 2), (False, 0)):
        timeline = Timeline(tmp_path / "t.json", 0, mark)
        for phase in ("NEGOTIATE_ALLREDUCE", "ALLREDUCE", "NEGOTIATE_BROADCAST"):
            with timeline.span("x", phase):
                pass
        timeline.close()
        marks = [each for each in recorded(timeline.path) if each.get("name") == "CYCLE_START"]
        assert len(marks) == count
        assert all(each["ph"] == "i" and each["s"] == "g" for each in marks)


def test_threads_that_work_on_one_tensor_at_once_do_not_mix_their_slices(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0)
    together = threading.Barrier(4)

    def work(phase):
        together.wait(30)
        for _ in range(200):
            with timeline.span("x", phase), timeline.span("x", f"{phase} inner"):
                pass

    threads = [threading.Thread(target=work, args=(f"phase {i}",)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    timeline.close()
    open_, seen = {}, 0
    for event in recorded(timeline.path):
        stack = open_.setdefault((event["pid"], event.get("tid")), [])
        if event["ph"] == "B":
            assert not stack or event["name"] == f"{stack[-1]} inner"
            stack.append(event["name"])
            seen += 1
        elif event["ph"] == "E":
            stack.pop()
    assert seen == 1600 and not any(open_.values())


def test_a_row_is_used_again_by_the_next_thread(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0)

    def work():
        with timeline.span("x", "ALLREDUCE"):
            pass

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    timeline.close()
    assert {each["tid"] for each in recorded(timeline.path) if each["ph"] == "B"} == {0}


def test_after_close_nothing_is_recorded_and_nothing_fails(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0)
    with timeline.span("x", "ALLREDUCE"):
        timeline.close()
        timeline.close()
    with timeline.span("y", "ALLREDUCE"):
        pass
    assert phases(recorded(timeline.path)) == ["ALLREDUCE"]


def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path):
    code = """if 1:
        import sys, time
        from hvdtrain.timeline.recorder import Timeline
        timeline = Timeline(sys.argv[1], 0)
        with timeline.span("x", "NEGOTIATE_ALLREDUCE"):
            pass
        with timeline.span("x", "ALLREDUCE"):
            print("inside", flush=True)
            time.sleep(60)
    """
    with python(code, tmp_path / "t.json") as process:
        assert process.stdout.readline() == b"inside\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert phases(recorded(tmp_path / "t.json")) == ["NEGOTIATE_ALLREDUCE", None, "ALLREDUCE"]


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise SystemError"])
def test_a_process_that_ends_without_close_has_recorded_everything(tmp_path, ending):
    code = f"""if 1:
        import sys
        from hvdtrain.timeline.recorder import Timeline
        with Timeline(sys.argv[1], 0).span("x", "ALLREDUCE"):
            pass
        {ending}
    """
    with python(code, tmp_path / "t.json") as process:
        process.wait(60)
    assert phases(recorded(tmp_path / "t.json")) == ["ALLREDUCE", None]


def test_a_forked_worker_does_not_write_into_the_file(tmp_path):
    timeline = Timeline(tmp_path / "t.json", 0)
    child = os.fork()
    if child == 0:
        with timeline.span("in the worker", "ALLREDUCE"):
            pass
        timeline.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with timeline.span("x", "ALLREDUCE"):
        pass
    timeline.close()
    assert "worker" not in timeline.path.read_text()
    assert phases(recorded(timeline.path)) == ["ALLREDUCE", None]


def test_a_disk_that_fills_up_ends_the_recording_with_one_sentence_and_not_the_training(tmp_path):
    code = """if 1:
        import sys
        from hvdtrain.timeline.recorder import Timeline
        timeline = Timeline(sys.argv[1], 1)
        for _ in range(1000):
            with timeline.span("x", "ALLREDUCE"):
                pass
        print("trained to the end")
    """
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))}
    with python(code, tmp_path / "t.json", **full) as process:
        said, complained = (text.decode() for text in process.communicate())
    assert said == "trained to the end\n" and process.returncode == 0
    assert len(complained.splitlines()) == 1
    assert "rank 1" in complained and "t.rank1.json" in complained and "training continues" in complained
    events = read_trace(tmp_path / "t.rank1.json")
    assert phases(events)[:2] == ["ALLREDUCE", None] and len(events) > 50


@pytest.mark.parametrize("path, kind", [("absent/t.json", FileNotFoundError), (".", IsADirectoryError)])
def test_a_path_that_cannot_be_opened_is_an_error_that_names_it(tmp_path, path, kind):
    with pytest.raises(kind, match="Rank 0: the timeline cannot be written") as caught:
        Timeline(tmp_path / path, 0)
    assert str(tmp_path / path) in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_is_full_at_the_start_is_an_error(tmp_path):
    (tmp_path / "t.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot be written"):
        Timeline(tmp_path / "t.json", 0)


# What Horovod's core writes: no tid, markers without a pid, its own beginning, several events a line.
HOROVOD = (
    '[\n{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros":%d}},\n'
    '{"name": "process_sort_index", "ph": "M", "pid": 0, "args": {"sort_index": 0}},\n'
    '{"ph": "i", "name": "CYCLE_START", "ts": 10, "s": "g"},'
    '{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "grad.0"}},\n'
    '{"name": "process_sort_index", "ph": "M", "pid": 1, "args": {"sort_index": 1}},\n'
    '{"ph": "B", "name": "ALLREDUCE", "ts": 20, "pid": 1},{"ph": "B", "name": "QUEUE", "ts": 21, "pid": 1}'
)
WHOLE = HOROVOD + ',{"ph": "E", "ts": 22, "pid": 1},{"ph": "E", "ts": 23, "pid": 1}]'


class Native:
    """Stands in for an engine with a core that records by itself."""

    def __init__(self, text):
        self.text, self.calls = text, []

    def __call__(self, path, mark_cycles):
        self.calls.append(("start", path, mark_cycles))
        self.path = path
        return self.stop

    def stop(self):
        self.calls.append(("stop",))
        if self.text is not None:
            self.path.write_text(self.text)


def with_native(path, native):
    timeline = Timeline(path, 0, True, native)
    with timeline.span("mine", "ALLREDUCE"):
        pass
    timeline.close()
    timeline.close()
    return recorded(path)


def test_what_the_engines_core_recorded_is_taken_over_at_close(tmp_path):
    path = tmp_path / "t.json"
    native = Native(WHOLE % 5_000_500)
    events = with_native(path, native)
    assert native.calls == [("start", native_path_of(path), True), ("stop",)]
    theirs = [each for each in events if each.get("cat") == "horovod"]
    assert phases(theirs) == ["ALLREDUCE", "QUEUE", None, None]
    names = {each["pid"]: each["args"]["name"] for each in events if each.get("name") == "process_name"}
    assert {names[each["pid"]] for each in theirs if each["ph"] in "BE"} == {"grad.0"}
    # The same moments, in microseconds since the epoch, counted from our beginning and from Horovod's.
    epoch = events[0]["args"]["start_time_since_epoch_in_micros"]
    moments = [epoch + each["ts"] - 5_000_500 for each in theirs if each["ph"] in "BE"]
    assert moments == pytest.approx([20, 21, 22, 23], abs=1.5)
    assert not native_path_of(path).exists()


def test_a_core_that_had_nothing_to_record_is_no_trouble(tmp_path, capfd):
    assert phases(with_native(tmp_path / "t.json", Native(""))) == ["ALLREDUCE", None]
    assert capfd.readouterr().err == "" and not native_path_of(tmp_path / "t.json").exists()


def test_what_the_core_of_a_killed_run_left_is_not_taken_for_this_run_s(tmp_path):
    native_path_of(tmp_path / "t.json").write_text(WHOLE % 1)
    Timeline(tmp_path / "t.json", 0).close()
    assert not native_path_of(tmp_path / "t.json").exists()


@pytest.mark.parametrize("text", [None, "nonsense", '[{"ph": "M", "args": {}}]'])
def test_a_core_that_wrote_nothing_readable_costs_one_sentence(tmp_path, capfd, text):
    assert phases(with_native(tmp_path / "t.json", Native(text))) == ["ALLREDUCE", None]
    assert "Horovod's own phases are missing" in capfd.readouterr().err


def test_an_engine_without_a_core_has_nothing_to_take_over(tmp_path, capfd):
    assert phases(with_native(tmp_path / "t.json", lambda path, mark_cycles: None)) == ["ALLREDUCE", None]
    assert capfd.readouterr().err == ""


def test_a_core_that_was_killed_is_read_up_to_its_last_whole_event(tmp_path):
    text, path = HOROVOD % 1000, tmp_path / "n.json"
    second = text.index('{"ph": "B", "name": "QUEUE"')
    for cut in range(second, len(text) + 1):
        path.write_text(text[:cut])
        events = native_events(path, 1000, rows=7)
        assert phases(events) == ["ALLREDUCE", "QUEUE"][: 1 + (cut == len(text))]
        assert {each["pid"] for each in events if each["ph"] == "B"} == {8}


def test_a_file_damaged_before_its_end_is_named_so(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('[\n{"ph": "M"},\n{"ph": "B", "ts"\0\0\0\n{"ph": "E", "ts": 2}\n]\n')
    with pytest.raises(TraceError, match="damaged after 1 event"):
        read_trace(path)
