"""Test the scheduler: one contender runs while all others are stopped, and no process is left behind."""

import os
import signal
import subprocess
import sys

import pytest

from hvdtrain.bench.contender_job import Contender
from hvdtrain.bench.scheduler import Scheduler
from hvdtrain.cores import physical
from hvdtrain.launch.hosts import LaunchError


def contender(name, **settings):
    return Contender(name, "fake_worker:prepare", settings)


def pids(answers):
    return [each["pid"] for each in answers]


def test_contenders_take_turns_and_another_is_first_in_each_round(marked):
    told = []
    with Scheduler([contender("a"), contender("b"), contender("c")], 2, progress=told.append) as scheduler:
        answers = scheduler.measure({"it": lambda who: {}}, 0, (1, 1), 4)["it"]
    assert [line for line in told if "round" in line] == [
        f"it: round {number} of 4, {name}"
        for number, names in enumerate(("abc", "bca", "cab", "abc"), 1)
        for name in names
    ]
    for turns in answers.values():
        seeds = [[each["request"]["seed"] for each in turn] for turn in turns]
        assert seeds == [[1, 1], [2, 2], [3, 3], [4, 4]]


def test_a_contender_may_sit_out_one_kind_of_work(marked):
    told = []
    with Scheduler([contender("a"), contender("b")], 1, progress=told.append) as scheduler:
        works = {"one": lambda who: {} if who.name == "a" else None, "other": lambda who: {}}
        answers = scheduler.measure(works, 0, (1, 1), 2)
    assert [line for line in told if "round" in line] == [
        *("one: round 1 of 2, a", "other: round 1 of 2, a", "other: round 1 of 2, b"),
        *("one: round 2 of 2, a", "other: round 2 of 2, b", "other: round 2 of 2, a"),
    ]
    turns = {(work, name): len(turns) for work, by_name in answers.items() for name, turns in by_name.items()}
    assert turns == {("one", "a"): 2, ("other", "a"): 2, ("other", "b"): 2}


@pytest.mark.parametrize("repeats, count", [((2, 7), 7), ((2, 100), 10), ((20, 100), 20)])
def test_work_is_repeated_for_the_time_of_a_turn_within_limits(marked, repeats, count):
    with Scheduler([contender("a", seconds=0.1)], 1) as scheduler:
        answers = scheduler.measure({"it": lambda who: {"repeat": 3}}, 1.0001, repeats, 1)
    assert [[each["request"]["repeat"] for each in turn] for turn in answers["it"]["a"]] == [[count]]


def test_whoever_is_not_at_work_is_stopped(marked):
    first, second = contender("first"), contender("second")
    with Scheduler([first, second], 2) as scheduler:
        idle = pids(scheduler.ask(first, {}))
        assert [each["others"] for each in scheduler.ask(second, {"look": idle})] == [["T", "T"]] * 2
        busy = pids(scheduler.ask(second, {}))
        answers = scheduler.ask(first, {"look": busy})
        assert pids(answers) == idle
        assert [each["others"] for each in answers] == [["T", "T"]] * 2


def test_every_rank_gets_the_request_and_answers_in_its_place(marked):
    who = contender("it", model="cnn")
    with Scheduler([who], 3) as scheduler:
        answers = scheduler.ask(who, {"number": 7})
    assert [each["settings"]["rank"] for each in answers] == [0, 1, 2]
    assert {each["settings"]["size"] for each in answers} == {3}
    assert {each["settings"]["model"] for each in answers} == {"cnn"}
    assert all(each["request"] == {"number": 7} for each in answers)
    assert len(set(answers[0]["settings"]["addresses"])) == 3


def test_ranks_have_a_core_each_where_there_are_enough(marked):
    cores = len(physical())
    with Scheduler([contender("it")], cores) as scheduler:
        assert scheduler.pinned
        taken = [set(each["cpus"]) for each in scheduler.ask(scheduler.present[0], {})]
    assert len(set.union(*taken)) == sum(map(len, taken))
    with Scheduler([contender("it")], cores + 1) as scheduler:
        assert not scheduler.pinned
        assert scheduler.ask(scheduler.present[0], {}) is not None


def test_a_contender_may_have_ranks_of_its_own_number(marked):
    one = Contender("one", "fake_worker:prepare", ranks=1)
    with Scheduler([contender("two"), one], 2) as scheduler:
        assert [len(scheduler.ask(who, {})) for who in scheduler.present] == [2, 1]


def test_peers_find_each_other_by_the_usual_variables(marked):
    with Scheduler([contender("it")], 2) as scheduler:
        environs = [each["environ"] for each in scheduler.ask(scheduler.present[0], {})]
    assert [each["RANK"] for each in environs] == [each["LOCAL_RANK"] for each in environs] == ["0", "1"]
    assert {(each["WORLD_SIZE"], each["MASTER_ADDR"]) for each in environs} == {("2", "127.0.0.1")}
    assert len({each["MASTER_PORT"] for each in environs}) == 1


def test_what_is_alone_sees_no_launcher(marked):
    from hvdtrain import topology

    alone = Contender("alone", "fake_worker:prepare", independent=True)
    with Scheduler([contender("together"), alone], 2) as scheduler:
        together, single = (scheduler.ask(who, {})[1]["environ"] for who in scheduler.present)
    assert topology.detect(together).rank == 1
    assert topology.detect(single) is None
    assert not [name for name in single if name.startswith(("OMPI_COMM", "PMIX_", "RANK", "MASTER_"))]


def test_what_is_stock_runs_without_our_settings_and_the_users(marked, monkeypatch):
    tuned = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_coll_tuned_use_dynamic_rules": "1"}
    tuned |= {"HOROVOD_CYCLE_TIME": "7", "I_MPI_ADJUST_ALLREDUCE": "2"}
    for name, value in tuned.items():
        monkeypatch.setenv(name, value)
    own = {"HOROVOD_CYCLE_TIME": "3", "HOROVOD_LOG_LEVEL": None}
    monkeypatch.setenv("HOROVOD_LOG_LEVEL", "info")
    stock = Contender("stock", "fake_worker:prepare", environ=own, stock=True)
    with Scheduler([contender("ours"), stock], 1) as scheduler:
        ours, theirs = (scheduler.ask(who, {})[0]["environ"] for who in scheduler.present)
    assert tuned.items() <= ours.items()
    assert not set(tuned) - {"HOROVOD_CYCLE_TIME"} & set(theirs)
    assert theirs["HOROVOD_CYCLE_TIME"] == "3"
    assert "HOROVOD_LOG_LEVEL" in ours and "HOROVOD_LOG_LEVEL" not in theirs


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"killed": 1}, ["rank 1 was ended by SIGKILL"]),
        ({"raising": 0}, ["rank 0 ended with exit code 1", "ValueError: a sentence of its own"]),
        ({"silent": 1}, ["rank 1 did not answer", "within 3 s"]),
    ],
)
def test_who_fails_is_left_out_by_name_and_the_others_go_on(marked, request_, words):
    bad, good = contender("bad"), contender("good")
    with Scheduler([bad, good], 2, limit=3) as scheduler:
        gone = pids(scheduler.ask(bad, {}))
        assert scheduler.ask(bad, request_) is None
        assert all(each in scheduler.left_out["bad"] for each in words), scheduler.left_out
        assert not set(gone) & set(marked.now())
        assert scheduler.present == [good]
        assert scheduler.ask(bad, {}) is None
        assert len(scheduler.ask(good, {})) == 2
        assert list(scheduler.measure({"it": lambda who: {}}, 0, (1, 1), 1)["it"]) == ["good"]
    assert not marked()


def test_who_cannot_get_ready_is_left_out(marked):
    with Scheduler(
        [contender("bad", unprepared=1), Contender("none", "no_such_module:prepare"), contender("good")], 2
    ) as scheduler:
        assert "RuntimeError: nothing is as it should be" in scheduler.left_out["bad"]
        assert "No module named 'no_such_module'" in scheduler.left_out["none"]
        assert [who.name for who in scheduler.present] == ["good"]


def test_what_is_not_installed_is_named_with_what_brings_it(marked):
    peer = Contender("peer", "fake_worker:prepare", needs=("no_such_peer",))
    with Scheduler([peer], 2) as scheduler:
        assert scheduler.present == []
    assert scheduler.left_out["peer"] == "no_such_peer not installed; type pip install 'hvdtrain[peers]'"


def test_nothing_is_left_after_the_end_nor_after_an_error(marked):
    with Scheduler([contender("a"), contender("b")], 2) as scheduler:
        assert set(pids(scheduler.ask(scheduler.present[0], {}))) <= set(marked.now())
    assert not marked()
    with pytest.raises(KeyboardInterrupt), Scheduler([contender("a"), contender("b")], 2):
        raise KeyboardInterrupt
    assert not marked()


def test_nothing_outlives_a_driver_that_is_killed(marked):
    script = """
from hvdtrain.bench.contender_job import Contender
from hvdtrain.bench.scheduler import Scheduler
with Scheduler([Contender("a", "fake_worker:prepare"), Contender("b", "fake_worker:prepare")], 2) as scheduler:
    scheduler.ask(scheduler.present[0], {})
    print("up", flush=True)
    scheduler.ask(scheduler.present[1], {"silent": 0})
"""
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
    assert driver.stdout.readline() == b"up\n"
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert not marked()


def test_hosts_that_are_not_there_are_refused_before_anything_starts(marked):
    with pytest.raises(LaunchError, match="cannot find"):
        Scheduler([contender("a")], 2, hosts="no-such-host.invalid:2")
    with pytest.raises(LaunchError, match="fewer than the 2 ranks"):
        Scheduler([contender("a")], 2, hosts="localhost:1")
    with Scheduler([contender("a")], 2, hosts="localhost:2") as scheduler:
        assert len(scheduler.ask(scheduler.present[0], {})) == 2


def test_more_ranks_than_files_may_be_open_are_refused_and_fewer_given_room(monkeypatch):
    limits = [100, 1000]
    monkeypatch.setattr("resource.getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr("resource.setrlimit", lambda _, both: limits.__setitem__(slice(None), both))
    Scheduler([contender("a"), contender("b")], 300)
    assert limits == [800, 1000]
    with pytest.raises(LaunchError, match="need 1201 open files, and this process may open 1000"):
        Scheduler([contender("a")], 1001)
    assert limits == [800, 1000]
