"""The field: one at work while all others stand still, and nothing left behind, however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from hvdtrain.bench.contender import Contender
from hvdtrain.bench.scheduler import Field
from hvdtrain.launch.hosts import LaunchError
from hvdtrain.launch.launchers import binding


def player(name, **settings):
    return Contender(name, "players", settings)


def pids(answers):
    return [each["pid"] for each in answers]


def test_contenders_take_turns_and_another_is_first_in_each_round(marked):
    with Field([player("a"), player("b"), player("c")], 2) as field:
        turns = [(number, who.name) for number, who, _ in field.rounds(lambda who, number: {}, 4)]
    assert turns == [
        (number, name) for number, names in enumerate(("abc", "bca", "cab", "abc")) for name in names
    ]


def test_a_contender_may_sit_out_a_round(marked):
    with Field([player("a"), player("b")], 1) as field:
        asked = field.rounds(lambda who, number: {} if who.name == "a" or number else None, 2)
        assert [(number, who.name) for number, who, _ in asked] == [(0, "a"), (1, "b"), (1, "a")]


def test_whoever_is_not_at_work_is_stopped(marked):
    first, second = player("first"), player("second")
    with Field([first, second], 2) as field:
        idle = pids(field.ask(first, {}))
        assert [each["others"] for each in field.ask(second, {"look": idle})] == [["T", "T"]] * 2
        busy = pids(field.ask(second, {}))
        answers = field.ask(first, {"look": busy})
        assert pids(answers) == idle
        assert [each["others"] for each in answers] == [["T", "T"]] * 2


def test_every_rank_gets_the_request_and_answers_in_its_place(marked):
    who = player("it", model="cnn")
    with Field([who], 3) as field:
        answers = field.ask(who, {"number": 7})
    assert [each["settings"]["rank"] for each in answers] == [0, 1, 2]
    assert {each["settings"]["size"] for each in answers} == {3}
    assert {each["settings"]["model"] for each in answers} == {"cnn"}
    assert all(each["request"] == {"number": 7} for each in answers)
    assert len(set(answers[0]["settings"]["addresses"])) == 3


def test_ranks_have_a_core_each_where_there_are_enough(marked):
    cores = len(binding.cores())
    with Field([player("it")], cores) as field:
        assert field.pinned
        taken = [set(each["cpus"]) for each in field.ask(field.present[0], {})]
    assert len(set.union(*taken)) == sum(map(len, taken))
    with Field([player("it")], cores + 1) as field:
        assert not field.pinned
        assert field.ask(field.present[0], {}) is not None


def test_a_contender_may_have_ranks_of_its_own_number(marked):
    one = Contender("one", "players", ranks=1)
    with Field([player("two"), one], 2) as field:
        assert [len(field.ask(who, {})) for who in field.present] == [2, 1]


def test_peers_find_each_other_by_the_usual_variables(marked):
    with Field([player("it")], 2) as field:
        environs = [each["environ"] for each in field.ask(field.present[0], {})]
    assert [each["RANK"] for each in environs] == [each["LOCAL_RANK"] for each in environs] == ["0", "1"]
    assert {(each["WORLD_SIZE"], each["MASTER_ADDR"]) for each in environs} == {("2", "127.0.0.1")}
    assert len({each["MASTER_PORT"] for each in environs}) == 1


def test_what_is_alone_sees_no_launcher(marked):
    from hvdtrain import topology

    alone = Contender("alone", "players", alone=True)
    with Field([player("together"), alone], 2) as field:
        together, single = (field.ask(who, {})[1]["environ"] for who in field.present)
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
    stock = Contender("stock", "players", environ=own, stock=True)
    with Field([player("ours"), stock], 1) as field:
        ours, theirs = (field.ask(who, {})[0]["environ"] for who in field.present)
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
    bad, good = player("bad"), player("good")
    with Field([bad, good], 2, limit=3) as field:
        gone = pids(field.ask(bad, {}))
        assert field.ask(bad, request_) is None
        assert all(each in field.left_out["bad"] for each in words), field.left_out
        assert not set(gone) & set(marked.now())
        assert field.present == [good]
        assert field.ask(bad, {}) is None
        assert len(field.ask(good, {})) == 2
        assert [who for _, who, _ in field.rounds(lambda who, number: {}, 1)] == [good]
    assert not marked()


def test_who_cannot_get_ready_is_left_out(marked):
    with Field(
        [player("bad", unprepared=1), Contender("none", "no_such_module"), player("good")], 2
    ) as field:
        assert "RuntimeError: nothing is as it should be" in field.left_out["bad"]
        assert "No module named 'no_such_module'" in field.left_out["none"]
        assert [who.name for who in field.present] == ["good"]


def test_what_is_not_installed_is_named_with_what_brings_it(marked):
    peer = Contender("peer", "players", needs=("no_such_peer",))
    with Field([peer], 2) as field:
        assert field.present == []
    assert field.left_out["peer"] == "no_such_peer not installed; type pip install 'hvdtrain[peers]'"


def test_nothing_is_left_after_the_end_nor_after_an_error(marked):
    with Field([player("a"), player("b")], 2) as field:
        assert set(pids(field.ask(field.present[0], {}))) <= set(marked.now())
    assert not marked()
    with pytest.raises(KeyboardInterrupt), Field([player("a"), player("b")], 2):
        raise KeyboardInterrupt
    assert not marked()


def test_nothing_outlives_a_driver_that_is_killed(marked):
    script = """
from hvdtrain.bench.contender import Contender
from hvdtrain.bench.scheduler import Field
with Field([Contender("a", "players"), Contender("b", "players")], 2) as field:
    field.ask(field.present[0], {})
    print("up", flush=True)
    field.ask(field.present[1], {"silent": 0})
"""
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
    assert driver.stdout.readline() == b"up\n"
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert not marked()


def test_hosts_that_are_not_there_are_refused_before_anything_starts(marked):
    with pytest.raises(LaunchError, match="cannot find"):
        Field([player("a")], 2, hosts="no-such-host.invalid:2")
    with pytest.raises(LaunchError, match="fewer than the 2 ranks"):
        Field([player("a")], 2, hosts="localhost:1")
    with Field([player("a")], 2, hosts="localhost:2") as field:
        assert len(field.ask(field.present[0], {})) == 2


def test_more_ranks_than_files_may_be_open_are_refused_and_fewer_given_room(monkeypatch):
    limits = [100, 1000]
    monkeypatch.setattr("resource.getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr("resource.setrlimit", lambda _, both: limits.__setitem__(slice(None), both))
    Field([player("a"), player("b")], 300)
    assert limits == [800, 1000]
    with pytest.raises(LaunchError, match="need 1201 open files, and this process may open 1000"):
        Field([player("a")], 1001)
    assert limits == [800, 1000]
