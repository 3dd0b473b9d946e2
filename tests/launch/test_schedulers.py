"""Hosts and slots from what each scheduler leaves in a job, in the forms in which they write it."""

import os
import socket

import pytest

from hvdtrain.launch.hosts import Host, LaunchError
from hvdtrain.launch.launchers import schedulers
from hvdtrain.launch.run_options import RunOptions
from hvdtrain.launch.start_plan import find_hosts, slots_of_job, with_ranks

TWO = (Host("node1", 2), Host("node2", 2))

FILES = {
    # PBS Pro with mpiprocs=2, Torque with ppn=2: a line for each rank.
    "PBS": ("PBS_NODEFILE", "node1\nnode1\nnode2\nnode2\n", TWO),
    # Chunks of one host need not follow each other.
    "PBS, two chunks": ("PBS_NODEFILE", "node1\nnode2\nnode1\nnode2\n", TWO),
    "PBS, full names": ("PBS_NODEFILE", "n1.hpc.example.org\n", (Host("n1.hpc.example.org", 1),)),
    "LSF": ("LSB_DJOB_HOSTFILE", "node1\nnode1\nnode2\nnode2\n", TWO),
    "Grid Engine": (
        "PE_HOSTFILE",
        "node1 1 all.q@node1 UNDEFINED\nnode2 2 all.q@node2 <NULL>\nnode1 1 short.q@node1 0,0\n",
        TWO,
    ),
    "OAR": ("OAR_NODEFILE", "node1\nnode1\nnode2\nnode2\n", TWO),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_hosts(tmp_path, case):
    variable, text, hosts = FILES[case]
    (tmp_path / "hosts").write_text(text)
    job = schedulers.find_job({variable: str(tmp_path / "hosts")})
    assert job.hosts == hosts
    assert job.scheduler == case.partition(",")[0]


def test_lsf_without_a_file_has_a_variable():
    assert schedulers.find_job({"LSB_MCPU_HOSTS": "node1 2 node2 2 "}).hosts == TWO


ONE_GROUP = '{"rank": "0-1", "children": {"core": "0-3", "gpu": "0"}}'
TWO_GROUPS = '{"rank": "1", "children": {"core": "4-5"}}, {"rank": "0,2", "children": {"core": "0-1,7"}}'


@pytest.mark.parametrize(
    "groups, nodelist, hosts",
    [
        (ONE_GROUP, '"fluke[7-8]"', (Host("fluke7", 4), Host("fluke8", 4))),
        (ONE_GROUP, '"sample-[09-10]"', (Host("sample-09", 4), Host("sample-10", 4))),
        (ONE_GROUP, '"a,b"', (Host("a", 4), Host("b", 4))),
        (TWO_GROUPS, '"n[1-2]", "gpu[3]"', (Host("n1", 3), Host("n2", 2), Host("gpu3", 3))),
    ],
)
def test_the_resource_set_of_flux(tmp_path, groups, nodelist, hosts):
    answer = (
        f'{{"version": 1, "execution": {{"R_lite": [{groups}], "starttime": 0, "nodelist": [{nodelist}]}}}}'
    )
    program = tmp_path / "flux"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = 'resource R' ] && echo '{answer}'\n")
    program.chmod(0o755)
    environ = {"FLUX_URI": "local:///run/flux/local", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # subprocess looks for a program in this process's own PATH.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environ["PATH"])
        assert schedulers.find_job(environ).hosts == hosts


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"PBS_NODEFILE": "/no/such/file"}, ["PBS_NODEFILE=/no/such/file", "cannot be read", "-H a:4,b:4"]),
        ({"PBS_NODEFILE": "/dev/null"}, ["names no host", "unset PBS_NODEFILE"]),
        ({"LSB_MCPU_HOSTS": "node1 two"}, ["as expected", "LSB_MCPU_HOSTS"]),
        ({"LSB_MCPU_HOSTS": "node1"}, ["as expected"]),
        ({"FLUX_URI": "local:///x", "PATH": "/nowhere"}, ["this Flux job", "cannot be read"]),
    ],
)
def test_what_cannot_be_read_is_one_sentence(environ, words):
    with pytest.raises(LaunchError) as caught:
        schedulers.find_job(environ)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.fixture
def far(monkeypatch):
    """node1 and node2 are found but are other machines: their addresses are kept for documentation."""
    found = socket.getaddrinfo
    addresses = {"node1": "192.0.2.201", "node2": "192.0.2.202"}

    def getaddrinfo(host, *rest, **more):
        return found(addresses.get(host, host), *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


LSF = {"LSB_MCPU_HOSTS": "node1 2 node2 2"}


def test_ranks_start_on_the_hosts_of_the_job_one_a_slot(far):
    options = with_ranks(RunOptions(None, "train.py"), LSF)
    assert options.num_proc == 4
    assert find_hosts(options, LSF) == TWO
    assert slots_of_job(LSF) == 4
    with pytest.raises(LaunchError, match=r"4 slot\(s\) on 2 host\(s\), fewer than the 6 ranks"):
        find_hosts(RunOptions(6, "train.py"), LSF)


def test_hosts_that_were_named_win_over_those_of_the_job(far):
    options = with_ranks(RunOptions(None, "train.py", hosts="node2:3"), LSF)
    assert options.num_proc == 3
    assert find_hosts(options, LSF) == (Host("node2", 3),)


def test_a_job_on_this_host_alone_takes_as_many_ranks_as_are_asked_for():
    one = {"LSB_MCPU_HOSTS": "localhost 1"}
    assert find_hosts(RunOptions(8, "train.py"), one) == ()
    assert with_ranks(RunOptions(None, "train.py"), one).num_proc == 1


def test_slurm_starts_the_ranks_itself(tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    environ = {**LSF, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "PATH": str(tmp_path)}
    options = with_ranks(RunOptions(None, "train.py"), environ)
    assert options.num_proc == 3
    assert find_hosts(options, environ) == ()


def test_without_a_job_the_number_of_ranks_is_asked_for():
    with pytest.raises(LaunchError, match="Type -np 4"):
        with_ranks(RunOptions(None, "train.py"), {})
