"""Which machine this process is on."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine() -> str:
    """Returns host name and boot: containers of one machine may share the one, and cloned machines the other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (" " + boot.read_text().strip() if boot.exists() else "")


def namespace(kind: str) -> str:
    """Returns the Linux namespace of this process, as "pid" or "net"; containers of one machine differ in it."""
    path = f"/proc/self/ns/{kind}"
    return os.readlink(path) if os.path.lexists(path) else ""
