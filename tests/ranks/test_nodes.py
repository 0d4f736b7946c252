"""Two nodes on one machine: launch.sh once for each, a static rendezvous (torch 2.13), one model trained by both.

Where root and `ip netns` allow it, each node is a network namespace of its own with a cable between them, so that
nothing works by accident through the loopback; also, or else, both are on the loopback. They are compared with one
process that trains on the rows of both.

Run: python -m pytest tests/ranks/test_nodes.py
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import ROOT, free_port

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="launch.sh needs bash")

TRAIN = """
import json, os, sys
import torch
from nanofinetune.ranks.ddp import DistributedDataParallel
from nanofinetune.ranks.collectives import gather_object
from nanofinetune.ranks.world import init_world, shutdown

world = init_world("cpu")
torch.manual_seed(world.rank)  # DistributedDataParallel makes them equal
model = torch.nn.Linear(4, 2)
if world.rank == 0:
    torch.nn.init.constant_(model.weight, 0.1)
    torch.nn.init.zeros_(model.bias)
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rows = torch.arange(32.0).reshape(8, 4) / 32
for _ in range(5):
    loss = model(rows[world.rank :: world.size]).square().mean()  # equal shares: the mean of means is the mean
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")
weights = [parameter.tolist() for parameter in model.parameters()]
everyone = gather_object([{name: os.environ[name] for name in names} | {"weights": weights}], world)
if world.rank == 0:
    print(json.dumps(everyone))
del model, optimizer, loss  # a model that outlives its process group may abort the interpreter at its end
shutdown(world)
"""


@dataclass
class Node:
    """One of the two: what goes before its command, its address, and its network interface."""

    prefix: list[str]
    address: str
    interface: str


@pytest.fixture(params=["loopback", pytest.param("namespaces", marks=pytest.mark.slow)])
def nodes(request: pytest.FixtureRequest) -> Iterator[list[Node]]:
    if request.param == "loopback":
        if sys.platform != "linux":
            pytest.skip("the loopback's name is Linux's")
        yield [Node([], "127.0.0.1", "lo")] * 2
        return
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the `ip` program")
    names = [f"nano{os.getpid()}{side}" for side in "ab"]  # of this process alone; an interface's name has 15 letters
    found = [Node(["ip", "netns", "exec", name], f"10.77.0.{i}", f"{name}0"[-15:]) for i, name in enumerate(names, 1)]
    cable = ["ip", "link", "add", found[0].interface, "netns", names[0], "type", "veth"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
                pytest.skip("this machine does not let us make network namespaces")
        cable += ["peer", "name", found[1].interface, "netns", names[1]]
        if subprocess.run(cable, capture_output=True).returncode != 0:
            pytest.skip("this machine does not let us lay a cable between two namespaces")
        for name, node in zip(names, found, strict=True):
            for command in (f"addr add {node.address}/24 dev {node.interface}", f"link set {node.interface} up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _launch(
    nodes: list[Node], script: Path, n: int, *options: str, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """launch.sh on both nodes at once -> how each ended; none is left after `timeout` seconds."""
    port, running = str(free_port()), []
    for rank, node in enumerate(nodes):
        variables = {
            **os.environ, "PYTHON": sys.executable, "NANOFINETUNE_SCRIPT": str(script), "OMP_NUM_THREADS": "1",
            "NANOFINETUNE_LAUNCH_ENV": "/nonexistent", "NNODES": "2", "NODE_RANK": str(rank),
            "MASTER_ADDR": nodes[0].address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": node.interface,
        }  # fmt: skip
        command = [*node.prefix, "bash", str(ROOT / "launch.sh"), "-n", str(n), *options]
        running.append(
            subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    ended, deadline, late = [], time.monotonic() + timeout, False
    for process in running:
        try:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            process.kill()  # the ranks end with it
            out, err = process.communicate()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    assert not late, "\n".join(
        f"node {i} ({node.returncode}): {node.stdout}{node.stderr}" for i, node in enumerate(ended)
    )
    return ended


@pytest.mark.slow
def test_two_nodes_train_together(nodes: list[Node], tmp_path: Path) -> None:
    """Four ranks on two nodes have, after five steps, the weights of one process that saw all rows."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    first, second = _launch(nodes, script, 2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    ranks = json.loads(first.stdout)
    assert second.stdout == ""
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert [rank["GROUP_RANK"] for rank in ranks] == ["0", "0", "1", "1"]
    assert {rank["MASTER_ADDR"] for rank in ranks} == {nodes[0].address}

    model = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(model.weight, 0.1)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.arange(32.0).reshape(8, 4) / 32
    for _ in range(5):
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in ranks:
        assert rank["weights"] == ranks[0]["weights"]  # bit for bit: all ranks took the same steps
        for got, expected in zip(rank["weights"], model.parameters(), strict=True):
            # another order of summing the same eight rows in float32
            torch.testing.assert_close(torch.tensor(got), expected.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_failure_on_one_node_ends_both(tmp_path: Path) -> None:
    """Each node ends with what its own ranks saw, and says which node it speaks of."""
    if sys.platform != "linux":
        pytest.skip("the loopback's name is Linux's")
    script = tmp_path / "fail.py"
    script.write_text(TRAIN.replace("loss.backward()", "assert world.rank == 0, 'the cause'; loss.backward()"))
    first, second = _launch([Node([], "127.0.0.1", "lo")] * 2, script, 1)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "launch.sh: rank 1 failed first on node 1 of 2:\n" in second.stderr
    assert second.stderr.endswith("AssertionError: the cause\n")
    assert "launch.sh: rank 0 failed first on node 0 of 2:\n" in first.stderr


@pytest.mark.slow
def test_two_nodes_restart_together(tmp_path: Path) -> None:
    """A rank is killed: each node starts its own again, at its own time, and all four meet each other."""
    if sys.platform != "linux":
        pytest.skip("the loopback's name is Linux's")
    script, mark = tmp_path / "train.py", tmp_path / "mark"
    kill = f"\nimport pathlib, signal\nmark = pathlib.Path({str(mark)!r})\nif world.rank == 3 and not mark.exists():\n"
    kill += "    mark.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    script.write_text(TRAIN.replace("\nnames =", kill + "names ="))
    first, second = _launch([Node([], "127.0.0.1", "lo")] * 2, script, 2, "--max-restarts", "3")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert mark.exists()
    assert [rank["RANK"] for rank in json.loads(first.stdout)] == ["0", "1", "2", "3"]
