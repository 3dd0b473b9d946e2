"""Reports: written, read back, compared; and sizes as people type them."""

import json
from dataclasses import replace

import pytest

from hvdtrain.bench import sizes
from hvdtrain.bench.compare import compare, differing_conditions, matching_rows, quartiles_apart
from hvdtrain.bench.report import Report, ReportError, Row, Spread, load

MACHINE = {"cpu": "one", "cores": 2, "hosts": ["a"], "pinned": True}


def row(contender="hvdtrain mpi", size=1024, times=(1.0, 2.0, 3.0), right=True):
    return Row({"bytes": size}, contender, {"latency_us": Spread.of(times)}, right)


def report(*rows, **changes):
    return replace(Report("allreduce", 2, MACHINE, {"dtype": "float32"}, list(rows) or [row()]), **changes)


def test_a_spread_holds_median_and_quartiles():
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(3, 2, 4, (4, 1, 3, 2, 5))
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, (7.0,))


def test_what_is_written_is_read_back(tmp_path):
    written = report(row(), row("raw MPI", right=False), left_out={"torch Gloo": "torch not installed"})
    (tmp_path / "a.json").write_text(written.to_json())
    read = load(str(tmp_path / "a.json"))
    assert read == written
    assert [each.contender for each in read.wrong] == ["raw MPI"]


def test_the_format_is_the_documented_one():
    fields = json.loads(report().to_json())
    names = {"bench", "hvdtrain", "date", "machine", "command", "options", "ranks", "left_out", "rows"}
    assert set(fields) == names
    assert fields["rows"] == [
        {
            "key": {"bytes": 1024},
            "contender": "hvdtrain mpi",
            "values": {"latency_us": {"median": 2.0, "low": 1.5, "high": 2.5, "rounds": [1.0, 2.0, 3.0]}},
            "right": True,
        }
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "no JSON",
        "3",
        '{"rows": [{"key": 1}]}',
        '{"rows": [], "odd": 1}',
        report(machine=[1]).to_json(),
        report(replace(row(), values={"latency_us": Spread("slow", 1, 2, ())})).to_json(),
    ],
)
def test_what_is_no_report_is_refused_with_a_sentence(tmp_path, capsys, text):
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text(text)
    good.write_text(report().to_json())
    with pytest.raises(ReportError, match="is not a report of hvdtrain bench"):
        load(str(bad))
    assert compare(str(good), str(bad)) == 2
    assert "bad.json is not a report" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert compare(str(tmp_path / "a.json"), str(tmp_path / "b.json")) == 2
    assert "a.json cannot be read: No such file or directory" in capsys.readouterr().err


def test_two_benchmarks_are_not_compared(tmp_path, capsys):
    for name, bench in (("a", "allreduce"), ("b", "step")):
        (tmp_path / name).write_text(report(bench=bench).to_json())
    assert compare(str(tmp_path / "a"), str(tmp_path / "b")) == 2
    assert "two reports of the same benchmark" in capsys.readouterr().err


def test_compare_shows_ratio_mark_and_what_only_one_has(tmp_path, capsys):
    before = report(row(), row("raw MPI"), row(size=4096))
    after = report(
        row(times=(4.0, 4.0, 4.0)), row("raw MPI", times=(2.0, 2.0, 3.0)), row("torch Gloo"), ranks=4
    )
    for name, each in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(each.to_json())
    assert compare(str(tmp_path / "a.json"), str(tmp_path / "b.json")) == 0
    shown = capsys.readouterr().out
    slower, same = (
        next(line for line in shown.splitlines() if name in line) for name in ("hvdtrain mpi", "raw MPI")
    )
    assert "2.000" in slower and "*" in slower
    assert "1.000" in same and "*" not in same
    assert "Different ranks: 2, then 4" in shown
    only = [line for line in shown.splitlines() if line.startswith("Only in")]
    assert [line.rpartition(": ")[2] for line in only] == ["4 KiB, hvdtrain mpi", "1 KiB, torch Gloo"]


def test_rows_match_by_work_and_contender():
    first, second = report(row(), row(size=4096)), report(row(size=4096), row("raw MPI"))
    assert [(one.key, other.key) for one, other in matching_rows(first, second)] == [
        ({"bytes": 4096}, {"bytes": 4096})
    ]


def test_circumstances_that_differ_are_named():
    other = report(machine={**MACHINE, "cpu": "two"}, options={"dtype": "float64"}, hvdtrain="9")
    lines = differing_conditions(report(hvdtrain="1"), other)
    assert lines == [
        "Different hvdtrain: 1, then 9",
        "Different machine cpu: one, then two",
        "Different option dtype: float32, then float64",
    ]


def test_quartiles_that_touch_are_not_apart():
    low, high = Spread(2, 1, 3, ()), Spread(4, 3, 5, ())
    assert not quartiles_apart(low, high) and not quartiles_apart(high, low)
    assert quartiles_apart(low, Spread(4, 3.1, 5, ())) and quartiles_apart(Spread(4, 3.1, 5, ()), low)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("4K", [4096]),
        ("4K:64K", [4096, 16384, 65536]),
        ("4K:256M", [4096 * 4**n for n in range(9)]),
        ("1k:8k:2", [1024, 2048, 4096, 8192]),
        ("16M, 64KiB,1MB", [65536, 1 << 20, 16 << 20]),
        ("8,8,4:8", [4, 8]),
        ("1G", [1 << 30]),
        ("3K:100K", [3 << 10, 12 << 10, 48 << 10]),
    ],
)
def test_sizes(text, expected):
    assert sizes.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "K", "0", "-4", "4X", "4K:", "64K:4K", "1:2:3:4", "4K:8K:1", "4K:8K:x", "1.5M", "4K;8K"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="Expected sizes such as 64K"):
        sizes.parse(text)


@pytest.mark.parametrize(
    "size, text", [(4, "4 B"), (1000, "1000 B"), (4096, "4 KiB"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_shown_as_people_read_them(size, text):
    assert sizes.format_size(size) == text
