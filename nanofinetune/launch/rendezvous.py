"""Where the processes of a job meet: torch's key-value store, listening at one address instead of at all of them.

>>> server = listener("127.0.0.1")
>>> server.getsockname()[0]
'127.0.0.1'
>>> store = store_at(server)  # takes the socket over
>>> store.set("greeting", "hello")
>>> store.get("greeting")
b'hello'

Underneath: `torch.distributed.elastic.rendezvous.static_tcp_rendezvous.StaticTCPRendezvous` (torch 2.13), torchrun's.
  - Its `torch.distributed.TCPStore` listens at all addresses of the machine, whatever address it is given, and asks
    for no password. Whoever reaches the port can write what the ranks read there.
  - We bind the socket. On one node that is the loopback, which no other machine reaches.
  - On several nodes it is MASTER_ADDR's address, where there is one here.
  - Ranks connect as before: MASTER_ADDR, MASTER_PORT.

Proof: test_one_node_listens_on_the_loopback_only_where_torchrun_listens_everywhere,
test_node_0_listens_at_master_addr_only in tests/launch/test_rendezvous.py.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from nanofinetune.ground.errors import UsageError, shown

BACKEND = "one-address"  # torchrun's --rdzv-backend
LOOPBACK = {"linux": "lo", "darwin": "lo0"}.get(sys.platform, "")  # the interface's name
JOIN = timedelta(minutes=10)  # how long nodes wait for each other to start, as in torchrun


def listener(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at this address alone, a name or a number; port 0 takes a free one.

    Raises:
        UsageError: nobody knows the name, or the port is taken.
        OSError: with EADDRNOTAVAIL, where the address is not this machine's.
    """
    family, place = _look_up(address, port)
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that has just been left is free
        server.bind(place)
        server.listen(1024)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise
        raise UsageError(f"MASTER_PORT {port}: {error.strerror}; choose another port") from error
    return server


def store_at(server: socket.socket, clients: int = 1) -> TCPStore:
    """torch's store behind a listening socket, which it takes over. With `clients` nodes it waits for all of them."""
    host, port = server.getsockname()[:2]
    # underneath: without `master_listen_fd` the server binds every interface; the host name serves its client alone.
    return TCPStore(host, port, clients, True, JOIN, master_listen_fd=server.detach())


def variables(port: int) -> dict[str, str]:
    """What ranks of one node need to find a store at 127.0.0.1, and to talk to each other over the loopback."""
    # underneath: unless it is said that the store is there, rank 0 starts another one: torch's, at all addresses.
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return found | interfaces(os.environ)


def interfaces(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep the ranks of one node on the loopback; one that names an interface stays as it is."""
    # underneath: gloo listens at the address of this machine's name, and NCCL at any interface but the loopback.
    wanted = {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK and f"={LOOPBACK}"}
    return {name: value for name, value in wanted.items() if value and not environ.get(name)}


# ---- several nodes ---------------------------------------------------------------------------------------------------


class OneAddress(RendezvousHandler):
    """torchrun's static rendezvous: every node knows its number, and node 0 has the store. Restarts keep the store."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.rank, self.nodes, self.run_id = int(parameters.get("rank")), parameters.max_nodes, parameters.run_id
        self.address, _, port = parameters.endpoint.rpartition(":")
        self.port = int(port)
        self._store: TCPStore | None = None
        self._server: socket.socket | None = None
        if self.rank == 0:
            self._server = listener(self.address) if self.nodes == 1 else self._listen()
            self.port = self._server.getsockname()[1]

    def _listen(self) -> socket.socket:
        """Node 0's socket, and a line on stderr that says where it listens."""
        own = address_here(self.address, os.environ.get("GLOO_SOCKET_IFNAME", ""))
        try:
            server = listener(own or "0.0.0.0", self.port)
        except OSError:  # not this machine's: a network in between translates it
            server, own = listener("0.0.0.0", self.port), ""
        where = f"{own}, port {self.port}, only"
        if not own:
            where = f"port {self.port} of ALL its addresses: MASTER_ADDR {self.address} is none that it has"
        print(f"launch.sh: node 0 of {self.nodes} listens at {shown(where)}", file=sys.stderr, flush=True)
        return server

    def next_rendezvous(self) -> RendezvousInfo:
        if self._server is not None:
            self._store, self._server = store_at(self._server, self.nodes), None
        elif self._store is None:
            self._store = TCPStore(self.address, self.port, self.nodes, False, JOIN)
        place = RendezvousStoreInfo(self.address, self.port)
        return RendezvousInfo(PrefixStore(self.run_id, self._store), self.rank, self.nodes, place)

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self.run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def address_here(address: str, interface: str) -> str:
    """Where node 0 is to listen so that the others reach it at `address`; "" where only all addresses will do.

    A machine may have a loopback address for its own name (Debian: 127.0.1.1), which other nodes cannot mean.
    """
    found = str(_look_up(address, 0)[1][0])
    if ipaddress.ip_address(found.partition("%")[0]).is_loopback and found != address and address != "localhost":
        return address_of(interface)
    return found


def address_of(interface: str) -> str:
    """The IPv4 address of an interface, "" where it has none or the system does not tell (Linux does)."""
    if sys.platform != "linux" or not interface:
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer: Any = fcntl.ioctl(any_socket, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Raise UsageError where GLOO_SOCKET_IFNAME names an interface that this machine does not have."""
    known = [name for _, name in socket.if_nameindex()]
    for name in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in known:
            raise UsageError(f"GLOO_SOCKET_IFNAME {name}: there is no such interface; choose of {', '.join(known)}")


def _look_up(address: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """A name or a number -> the kind of address, and what a socket is bound to."""
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"MASTER_ADDR {address}: this machine cannot look it up; give a number") from error
    return family, place


rendezvous_handler_registry.register(BACKEND, OneAddress)
