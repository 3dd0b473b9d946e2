"""The ranks' files as one: real recordings joined, clocks aligned, the rank that is late named, bad files too."""

import json
import os
import signal
import subprocess
import sys

import pytest

from hvdtrain.timeline import merge as module
from hvdtrain.timeline.recorder import Timeline
from hvdtrain.timeline.recordings import aligned_starts, load, native_path_of, path_of
from hvdtrain.timeline.waiting_times import is_transfer, slices, time_in, waiting

HVDTRAIN = [sys.executable, "-c", "from hvdtrain.cli import main; main()"]


def write(path, rank, spans, host="node1", clock="a", epoch=1_000_000_000, on_clock=0.0, size=None):
    """Writes a rank's file with slices (tensor number, phase, start, end), in any order."""
    head = {
        "name": f"rank {rank} ({host})",
        "start_time_since_epoch_in_micros": epoch,
        "rank": rank,
        "size": size,
        "host": host,
        "clock": clock,
        "start_on_clock_in_micros": on_clock,
    }
    events = [{"name": "process_name", "ph": "M", "pid": 0, "args": head}]
    for number in sorted({each[0] for each in spans}):
        events.append({"name": "process_name", "ph": "M", "pid": number, "args": {"name": f"grad.{number}"}})
    timed = [
        event
        for tensor, phase, start, end in spans
        for event in (
            {"name": phase, "ph": "B", "ts": start, "pid": tensor, "tid": 0},
            {"ph": "E", "ts": end, "pid": tensor, "tid": 0},
        )
    ]
    path = path_of(path, rank)
    path.write_text(json.dumps(events + sorted(timed, key=lambda each: each["ts"])))
    return path


def names(events, kind):
    return {
        (each["pid"], each["tid"]) if kind == "thread_name" else each["pid"]: each["args"]["name"]
        for each in events
        if each.get("name") == kind
    }


def told(capsys):
    """What was printed to standard output, and to standard error."""
    said = capsys.readouterr()
    return said.out, said.err


def test_one_process_a_rank_and_one_row_a_tensor(tmp_path, capsys):
    spans = [(1, "NEGOTIATE_ALLREDUCE", 0, 10), (1, "ALLREDUCE", 10, 30), (2, "BROADCAST", 30, 40)]
    for rank in range(3):
        write(tmp_path / "t.json", rank, spans, host=f"node{rank}")
    assert module.merge([str(tmp_path / "t.json")]) == 0
    events = json.loads((tmp_path / "t.merged.json").read_text())["traceEvents"]
    processes, rows = names(events, "process_name"), names(events, "thread_name")
    assert sorted(processes.values()) == ["rank 0 (node0)", "rank 1 (node1)", "rank 2 (node2)"]
    for process in processes:
        mine = [each for each in events if each["pid"] == process and each["ph"] in "BE"]
        drawn = [(rows[each["pid"], each["tid"]], each.get("name"), each["ts"]) for each in mine]
        assert drawn == [
            ("grad.1", "NEGOTIATE_ALLREDUCE", 0),
            ("grad.1", None, 10),
            ("grad.1", "ALLREDUCE", 10),
            ("grad.1", None, 30),
            ("grad.2", "BROADCAST", 30),
            ("grad.2", None, 40),
        ]
    out, err = told(capsys)
    assert f"{tmp_path / 't.merged.json'}: 18 events of 3 ranks" in out and err == ""


def test_files_named_one_by_one_and_an_output(tmp_path):
    files = [str(write(tmp_path / name, rank, [(1, "ALLREDUCE", 0, 1)])) for rank, name in enumerate("ab")]
    assert module.merge(files, str(tmp_path / "out.json")) == 0
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert len(names(events, "process_name")) == 2


def test_the_others_are_found_whatever_their_name_holds(tmp_path):
    for rank in (0, 1, 2, 10):
        write(tmp_path / "my [run].5.json", rank, [(1, "ALLREDUCE", 0, 1)])
    write(tmp_path / "my run.5.json", 3, [(1, "ALLREDUCE", 0, 1)])
    assert module.merge([str(tmp_path / "my [run].5.json")]) == 0
    events = json.loads((tmp_path / "my [run].5.merged.json").read_text())["traceEvents"]
    assert [name.split()[1] for name in names(events, "process_name").values()] == ["0", "1", "2", "10"]


def test_ranks_of_one_host_are_aligned_by_their_common_clock_and_hosts_by_the_time_of_day(tmp_path, capsys):
    # Somebody has set rank 1's time of day back by 400 s between the two starts.
    write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 100)], epoch=900_000_000, on_clock=5_000)
    write(tmp_path / "t.json", 1, [(1, "ALLREDUCE", 0, 100)], epoch=500_000_000, on_clock=5_040)
    write(tmp_path / "t.json", 2, [(1, "ALLREDUCE", 0, 100)], "node2", "b", epoch=900_000_070, on_clock=77)
    timelines = [load(path_of(tmp_path / "t.json", rank)) for rank in range(3)]
    assert aligned_starts(timelines) == [0, 40, 70]
    module.merge([str(tmp_path / "t.json")])
    events = json.loads((tmp_path / "t.merged.json").read_text())["traceEvents"]
    assert sorted(each["ts"] for each in events if each["ph"] == "B") == [0, 40, 70]
    assert "aligned by the time of day" in told(capsys)[0]


def test_two_processes_of_this_machine_are_aligned(tmp_path):
    code = """if 1:
        import sys, time
        from hvdtrain.timeline.recorder import Timeline
        timeline = Timeline(sys.argv[1], int(sys.argv[2]))
        began = time.monotonic()
        with timeline.span("x", "ALLREDUCE"):
            print(began, time.monotonic())
    """
    seen = []
    for rank in range(2):
        command = [sys.executable, "-c", code, str(tmp_path / "t.json"), str(rank)]
        out = subprocess.run(command, capture_output=True, check=True).stdout
        seen.append([float(number) * 1e6 for number in out.split()])
    timelines = [load(path_of(tmp_path / "t.json", rank)) for rank in range(2)]
    starts = aligned_starts(timelines)
    begins = [
        each["ts"] + start
        for one, start in zip(timelines, starts, strict=True)
        for each in one.events
        if each["ph"] == "B"
    ]
    # A span begins between the two moments that its process saw, on the clock that both share.
    assert seen[1][0] - seen[0][1] <= begins[1] - begins[0] <= seen[1][1] - seen[0][0]


def late_rank(tmp_path, late, ranks=3, steps=10):
    """Every step one rank comes 5 ms after the others, who wait; 10 ms of computing, 1 ms on the wire."""
    for rank in range(ranks):
        spans, now = [], 0
        for _ in range(steps):
            come = now + (15_000 if rank == late else 10_000)
            spans.append((1, "NEGOTIATE_ALLREDUCE", come, now + 15_010))
            spans.append((1, "ALLREDUCE", now + 15_010, now + 16_010))
            now += 16_010
        write(tmp_path / "t.json", rank, spans)


@pytest.mark.parametrize("late", [0, 2])
def test_the_rank_that_the_others_wait_for_is_named(tmp_path, capsys, late):
    late_rank(tmp_path, late)
    assert module.merge([str(tmp_path / "t.json")]) == 0
    out, _ = told(capsys)
    assert f"The others wait for rank {late}: 0.05 s" in out and "came last 10 times" in out
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    for rank, line in enumerate(lines):
        cells = [cell.strip() for cell in line]
        assert cells[0] == str(rank) and cells[1] == "node1"
        assert cells[3] == ("0%" if rank == late else "33%")
        assert cells[4] in ("6%", "7%")
        assert cells[5] == ("0.05 s, 10 times" if rank == late else "0.00 s, 0 times")


def test_no_rank_is_accused_where_all_come_together(tmp_path, capsys):
    late_rank(tmp_path, late=None)
    assert module.merge([str(tmp_path / "t.json")]) == 0
    assert "No rank keeps the others waiting." in told(capsys)[0]


def test_a_tensor_counts_for_the_ranks_of_its_process_set_only():
    def negotiation(tensor, start, end):
        return slices(
            [
                {"name": "NEGOTIATE_ALLREDUCE", "ph": "B", "ts": start, "pid": 1, "tid": 0},
                {"ph": "E", "ts": end, "pid": 1, "tid": 0},
            ],
            {1: tensor},
            end,
        )

    found = {
        0: negotiation("a", 0, 9_000),
        1: negotiation("a", 8_000, 9_000),
        2: negotiation("b", 0, 50),
        3: negotiation("b", 0, 5_050),
    }
    waits = waiting(found)
    assert {rank: (each.times, each.micros) for rank, each in waits.items()} == {
        0: (0, 0),
        1: (1, 8_000),
        2: (1, 5_000),
        3: (0, 0),
    }


def test_time_on_the_wire_is_without_copies_and_counts_once_what_runs_at_once():
    events = [
        {"name": "ALLREDUCE", "ph": "B", "ts": 0, "pid": 1, "tid": 0},
        {"name": "MEMCPY_IN_FUSION_BUFFER", "ph": "B", "ts": 0, "pid": 1, "tid": 0},
        {"ph": "E", "ts": 40, "pid": 1, "tid": 0},
        {"name": "MPI_ALLREDUCE", "ph": "B", "ts": 50, "pid": 1, "tid": 0},
        {"ph": "E", "ts": 90, "pid": 1, "tid": 0},
        {"ph": "E", "ts": 100, "pid": 1, "tid": 0},
        {"name": "ALLGATHER", "ph": "B", "ts": 80, "pid": 2, "tid": 0},
        {"ph": "E", "ts": 120, "pid": 2, "tid": 0},
    ]
    assert time_in(slices(events, {1: "a", 2: "b"}, 120), is_transfer) == 80


def test_what_horovods_core_saw_on_rank_0_is_no_waiting_of_rank_0(tmp_path):
    begin = {"name": "NEGOTIATE_ALLREDUCE", "ph": "B", "ts": 0, "pid": 1, "tid": 0}
    end = {"ph": "E", "ts": 9_000, "pid": 1, "tid": 0}
    native = slices([{**begin, "cat": "horovod"}, end], {1: "a"}, 9_000)
    own = slices([begin, {**end, "ts": 1}], {1: "a"}, 9_000)
    assert waiting({0: native, 1: own})[1].times == 0


def test_a_killed_rank_is_merged_and_where_it_stopped_is_said(tmp_path, capsys):
    code = """if 1:
        import sys, time
        from hvdtrain.timeline.recorder import Timeline
        timeline = Timeline(sys.argv[1], 1)
        with timeline.span("grad.7", "NEGOTIATE_ALLREDUCE"):
            print("inside", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "t.json")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"inside\n"
        timeline = Timeline(tmp_path / "t.json", 0)
        with timeline.span("grad.7", "NEGOTIATE_ALLREDUCE"):
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        timeline.close()
    assert module.merge([str(tmp_path / "t.json")]) == 0
    out, err = told(capsys)
    assert "Rank 1's file ends during NEGOTIATE_ALLREDUCE of 'grad.7'" in out and err == ""
    assert "Rank 0's file" not in out


def test_a_file_cut_off_in_the_middle_of_an_event_is_read(tmp_path, capsys):
    """As a full disk leaves it."""
    path = write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1), (1, "ALLREDUCE", 2, 3)])
    path.write_text(path.read_text()[:-20])
    assert module.merge([str(path)]) == 0
    assert "3 events of 1 rank." in told(capsys)[0]


def test_what_the_core_of_a_killed_rank_0_recorded_is_merged_too(tmp_path, capsys):
    path = write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1)], epoch=1_000)
    native_path_of(path).write_text(
        '[\n{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros":1100}},\n'
        '{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "native.x"}},\n'
        '{"ph": "B", "name": "ALLREDUCE", "ts": 5, "pid": 1},{"ph": "E", "ts'
    )
    assert module.merge([str(path)]) == 0
    events = json.loads((tmp_path / "t.merged.json").read_text())["traceEvents"]
    rows = names(events, "thread_name")
    (native,) = (each for each in events if each.get("cat") == "horovod")
    assert rows[native["pid"], native["tid"]] == "native.x" and native["ts"] == 105
    assert "Rank 0's file ends" not in told(capsys)[0]


def test_a_bad_file_of_the_core_costs_only_what_the_core_knew(tmp_path, capsys):
    path = write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1)])
    native_path_of(path).write_text("nonsense")
    assert module.merge([str(path)]) == 0
    out, err = told(capsys)
    assert "2 events of 1 rank." in out and "t.native.json is not a trace" in err


BAD = {
    "empty": (b"", "is empty"),
    "zeros": (b"\0" * 100, "is empty"),
    "foreign": (b'{"traceEvents": []}', "is not a trace"),
    "binary": (os.urandom(500), "is not a trace"),
    "array": (b"[1, 2, 3]", "contains something other"),
    "timeless": (b'[{"ph": "M"}, {"ph": "B"}]', "without a time"),
    "horovods": (
        b'[{"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": 1}}]',
        "is not a timeline of hvdtrain",
    ),
    "no events": (b"[]", "is not a timeline of hvdtrain"),
    "damaged": (b'[{"ph": "M"},\n\xff\xff\n{"ph": "E", "ts": 1}\n]', "is damaged after 1 event"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_and_the_others_are_merged(tmp_path, capsys, kind):
    content, complaint = BAD[kind]
    good, bad = write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1)]), tmp_path / "t.rank1.json"
    bad.write_bytes(content)
    assert module.merge([str(good)]) == 0
    out, err = told(capsys)
    assert f"{bad} " in err and complaint in err and len(err.splitlines()) == 1
    assert "of 1 rank." in out
    assert module.merge([str(bad)]) == 2
    assert complaint in told(capsys)[1]
    assert not (tmp_path / "t.rank1.merged.json").exists()


def test_files_that_are_absent_or_folders_or_of_the_same_rank_are_named(tmp_path, capsys):
    good = write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1)])
    again = write(tmp_path / "u.json", 0, [(1, "ALLREDUCE", 0, 1)])
    files = [str(good), str(again), str(tmp_path / "absent.json"), str(tmp_path)]
    assert module.merge(files) == 0
    _, err = told(capsys)
    assert "absent.json cannot be read: No such file" in err and f"{tmp_path} cannot be read" in err
    assert f"{again} is of rank 0, as is {good}" in err
    assert module.merge([str(tmp_path / "no" / "absent.json")]) == 2


def test_an_output_that_cannot_be_written_or_would_destroy_an_input_is_refused(tmp_path, capsys):
    path = write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1)])
    before = path.read_bytes()
    assert module.merge([str(path)], str(path)) == 2
    assert "one of the files to merge" in told(capsys)[1] and path.read_bytes() == before
    assert module.merge([str(path)], str(tmp_path / "absent" / "o.json")) == 2
    assert "cannot be written: No such file" in told(capsys)[1]


def test_what_an_earlier_run_with_more_ranks_left_beside_is_left_out(tmp_path, capsys):
    for size in (4, 2):
        for rank in range(size):
            write(tmp_path / "t.json", rank, [(1, "ALLREDUCE", 0, 100)], size=size)
    assert module.merge([str(tmp_path / "t.json")]) == 0
    out, err = told(capsys)
    assert "of 2 ranks" in out and [line.split()[1] for line in err.splitlines()] == [
        str(path_of(tmp_path / "t.json", rank)) for rank in (2, 3)
    ]


def test_ranks_whose_files_are_on_other_hosts_are_named(tmp_path, capsys):
    for rank in (0, 2):
        write(tmp_path / "t.json", rank, [(1, "ALLREDUCE", 0, 100)], size=4)
    assert module.merge([str(tmp_path / "t.json")]) == 0
    assert "Not found: rank 1, 3." in told(capsys)[1]


def test_a_timeline_without_events_is_merged(tmp_path, capsys):
    for rank in range(2):
        Timeline(tmp_path / "t.json", rank).close()
    assert module.merge([str(tmp_path / "t.json")]) == 0
    assert "0 events of 2 ranks" in told(capsys)[0]


def test_the_command(tmp_path):
    write(tmp_path / "t.json", 0, [(1, "ALLREDUCE", 0, 1)])
    command = [*HVDTRAIN, "timeline", "merge"]
    done = subprocess.run([*command, "t.json", "-o", "o.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Wrote o.json" in done.stdout and (tmp_path / "o.json").is_file()
    done = subprocess.run([*command, "absent.json"], cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "absent.json cannot be read" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_merging_needs_neither_tensorflow_nor_mpi():
    code = (
        "import sys, hvdtrain.timeline.merge; sys.exit(bool({'tensorflow', 'mpi4py.MPI'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
