"""Where the processes of a job listen: read from /proc/net, and compared with torchrun (torch 2.13).

Run: python -m pytest tests/launch/test_rendezvous.py
"""

import errno
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from helpers import ROOT, free_port, run_torchrun
from launching import launch_sh
from listening import is_loopback, listening

from nanofinetune.ground.errors import UsageError
from nanofinetune.launch import rendezvous
from nanofinetune.launch.notebook import notebook_launcher

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where a process listens")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="launch.sh needs bash")

SCRIPT = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT / "tests" / "launch")!r})
from listening import listening
from nanofinetune.ranks.world import init_world, shutdown
import torch
world = init_world("cpu")
torch.distributed.all_reduce(torch.ones(1))  # gloo has connected its pairs
if os.environ["TORCHELASTIC_RESTART_COUNT"] != os.environ["TORCHELASTIC_MAX_RESTARTS"] and world.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
torch.distributed.barrier()
print(json.dumps({{"rank": listening(), "launcher": listening(os.getppid())}}) + "\\n", end="")
torch.distributed.barrier()
shutdown(world)
"""


@pytest.mark.slow
@linux
@needs_bash
@pytest.mark.parametrize(
    "options", [[], pytest.param(["--max-restarts", "1"], marks=pytest.mark.slow)], ids=["", "restarted"]
)
def test_one_node_listens_on_the_loopback_only_where_torchrun_listens_everywhere(options, tmp_path: Path) -> None:
    """The launcher's store, and gloo's pairs of both ranks; also after a restart."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ours = launch_sh("-n", "2", *options, env={"NANOFINETUNE_SCRIPT": str(script)})
    assert ours.returncode == 0, ours.stderr
    found = [json.loads(line) for line in ours.stdout.splitlines()]
    assert len(found) == 2 and all(each["rank"] and each["launcher"] for each in found), found
    listened = [address for each in found for addresses in each.values() for address in addresses]
    assert all(map(is_loopback, listened)), listened
    if options:
        return
    theirs = run_torchrun(["--standalone", script], 2, env={"GLOO_SOCKET_IFNAME": None})
    assert theirs.returncode == 0, theirs.stderr
    stores = json.loads(theirs.stdout.splitlines()[0])["launcher"]
    assert any(set(address.partition(":")[0]) == {"0"} for address in stores), stores


def _listen(folder: Path) -> None:
    import torch

    torch.distributed.init_process_group("gloo")  # a user's own: what our world does is not needed for this
    torch.distributed.all_reduce(torch.ones(1))
    (folder / os.environ["RANK"]).write_text(json.dumps([listening(), listening(os.getppid())]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@linux
def test_a_notebook_and_its_ranks_listen_on_the_loopback_only(tmp_path: Path) -> None:
    before = listening()
    notebook_launcher(_listen, (tmp_path,), num_processes=2)
    for rank in "01":
        own, parents = json.loads((tmp_path / rank).read_text())
        assert own and set(parents) - set(before), "the store is the parent's"
        assert all(map(is_loopback, {*own, *parents} - set(before))), (own, parents)
    assert listening() == before, "nothing is left behind"


def test_a_store_at_all_addresses_would_be_seen() -> None:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        if sys.platform == "linux":
            assert not all(map(is_loopback, listening()))
    assert is_loopback("0100007F:0016") and is_loopback("0101007F:0016")
    assert is_loopback("00000000000000000000000001000000:0016")
    for everywhere_or_elsewhere in ("00000000:0016", "00000000000000000000000000000000:0016", "0100A8C0:0016"):
        assert not is_loopback(everywhere_or_elsewhere)


# ---- several nodes ---------------------------------------------------------------------------------------------------


def node_0(address: str, port: int) -> rendezvous.OneAddress:
    parameters = rendezvous.RendezvousParameters(rendezvous.BACKEND, f"{address}:{port}", "none", 2, 2, rank="0")
    return rendezvous.OneAddress(parameters)


def place(node: rendezvous.OneAddress) -> tuple[str, int]:
    assert node._server is not None
    with node._server as server:
        return server.getsockname()[:2]


def test_node_0_listens_at_master_addr_only(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert place(node_0("127.0.0.1", port)) == ("127.0.0.1", port)
    assert capsys.readouterr().err == f"launch.sh: node 0 of 2 listens at 127.0.0.1, port {port}, only\n"


def test_a_name_that_means_the_loopback_here_means_the_named_interface(monkeypatch, capsys) -> None:
    """Debian has 127.0.1.1 for a machine's own name; the other nodes look it up somewhere else."""
    look_up = socket.getaddrinfo

    def debian(host, *args, **kwargs):
        return look_up("127.0.1.1" if host == "node0" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", debian)
    monkeypatch.setattr(rendezvous, "address_of", lambda interface: {"eth7": "127.0.0.7"}.get(interface, ""))
    port = free_port()
    if sys.platform == "linux":  # where all of 127.0.0.0/8 is the loopback
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
        assert place(node_0("node0", port)) == ("127.0.0.7", port)
        assert f"listens at 127.0.0.7, port {port}, only" in capsys.readouterr().err
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert place(node_0("node0", port)) == ("0.0.0.0", port)
    assert f"listens at port {port} of ALL its addresses: MASTER_ADDR node0 is none" in capsys.readouterr().err


def test_an_address_that_a_network_translates_means_all_addresses(capsys) -> None:
    assert place(node_0("192.0.2.1", port := free_port())) == ("0.0.0.0", port)  # TEST-NET-1: no machine's own
    assert "listens at port" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_loopback_interface_has_its_address() -> None:
    assert rendezvous.address_of("lo") == "127.0.0.1"
    assert rendezvous.address_of("nosuch") == rendezvous.address_of("") == ""


def test_a_taken_port_and_an_unknown_name_are_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"^MASTER_PORT {port}: Address already in use; choose another port$"):
            rendezvous.listener("127.0.0.1", port)
    for name in ("no.such.name.invalid", "a" * 300, "\ud800"):
        with pytest.raises(UsageError, match="this machine cannot look it up"):
            rendezvous.listener(name)
    with pytest.raises(OSError) as caught:
        rendezvous.listener("192.0.2.1")
    assert caught.value.errno == errno.EADDRNOTAVAIL


@needs_bash
def test_an_unknown_interface_is_one_line_and_exit_2() -> None:
    result = launch_sh("-n", "2", env={"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("launch.sh: GLOO_SOCKET_IFNAME nosuch0: there is no such interface; choose of ")
    assert result.stderr.count("\n") == 1
