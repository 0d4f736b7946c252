"""Where a process listens, from the kernel's own tables: for tests, and for the scripts that they start."""

import os


def listening(pid: int | str = "self") -> list[str]:
    """The addresses of a process's listening TCP sockets, v4 and v6, as /proc/net has them (Linux): 0100007F:7536."""
    sockets = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}").removeprefix("socket:[").removesuffix("]"))
        except OSError:  # it has just been closed
            continue
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            rows = [line.split() for line in file][1:]
        found += [row[1] for row in rows if row[3] == "0A" and row[9] in sockets]  # 0A: LISTEN
    return found


def is_loopback(address: str) -> bool:
    """Whether an address of /proc/net is 127.0.0.0/8 or ::1. (The bytes of each 32-bit word are in reverse order.)"""
    host = address.partition(":")[0]
    return (host.endswith("7F") and len(host) == 8) or host == "0" * 24 + "01000000"
