"""Two hosts that have IPv6 addresses alone, as network namespaces of this one, and a link between them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import launched
import pytest
from paths import ROOT

IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def ip(*arguments):
    return subprocess.run([IP, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def hosts():
    """Names of two network namespaces, fd00::1 and fd00::2."""
    if IP is None or os.geteuid() != 0:
        pytest.skip("needs ip (of iproute2) and root")
    names = [f"aadl{os.getpid()}{letter}" for letter in "ab"]
    links = [f"v{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            if ip("netns", "add", name).returncode != 0:
                pytest.skip("needs the permission to add network namespaces")
        steps = [["link", "add", links[0], "type", "veth", "peer", "name", links[1]]]
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            steps += [
                ["link", "set", link, "netns", name],
                ["-n", name, "link", "set", "lo", "up"],
                ["-n", name, "link", "set", link, "up"],
                ["-n", name, "-6", "addr", "add", f"fd00::{number}/64", "dev", link, "nodad"],
            ]
        for step in steps:
            done = ip(*step)
            assert done.returncode == 0, done.stderr
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_hosts_that_have_ipv6_alone_meet(hosts, tmp_path):
    job = [sys.executable, str(Path(launched.__file__)), str(tmp_path / "results")]
    env = launched.clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [IP, "netns", "exec", host, *job],
            env=env | launched.srun_variables(rank, 2, layout=[1, 1]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    printed = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert [out for out, _ in printed] == [f"rank {rank} of 2 by srun summed\n" for rank in range(2)]
