"""Addresses of this host, IPv4 and IPv6, and the network interfaces that have them."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import re
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

SIOCGIFADDR = 0x8915  # asks Linux for the IPv4 address of an interface
LOOPBACK = "127.0.0.1"
# Interfaces that lead to no other node.
NOT_FOR_RANKS = re.compile(r"(lo\d*|docker|br-|virbr|veth|cni|flannel|tun|tap)")


def interface_addresses() -> dict[str, tuple[str, ...]]:
    """Returns the addresses of each interface that has one, IPv4 before IPv6; link-local addresses are left out."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.setdefault(name, []).append(socket.inet_ntoa(packed[20:24]))
    with contextlib.suppress(OSError):  # a kernel without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            address = ipaddress.IPv6Address(int(digits, 16))
            if not address.is_link_local:
                found.setdefault(name, []).append(str(address))
    return {name: tuple(addresses) for name, addresses in found.items()}


def check_interfaces(names: Sequence[str]) -> None:
    """Raises ValueError, with the interfaces of this host, if it has none of these."""
    present = interface_addresses()
    if not any(name in present for name in names):
        raise ValueError(
            f"launch.interface {','.join(names)} has no address on {socket.gethostname()}; there are {as_text(present)}"
        )


def as_text(addresses: dict[str, tuple[str, ...]]) -> str:
    """Returns "lo (127.0.0.1, ::1), eth0 (10.0.0.1)"."""
    return ", ".join(f"{name} ({', '.join(entries)})" for name, entries in addresses.items())


def own_addresses(interfaces: Sequence[str], *, one_host: bool) -> tuple[str, ...]:
    """Returns addresses under which other ranks reach this host, those of the named interfaces first.

    Where all ranks are on `one_host` and no interface is named, the loopback address is enough and needs no network.
    """
    present = interface_addresses()
    if one_host and not interfaces:
        return (LOOPBACK,)
    found = [address for name in interfaces for address in present.get(name, ())]
    with contextlib.suppress(OSError):
        found += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)]
    found += [entry for name, entries in present.items() if not NOT_FOR_RANKS.match(name) for entry in entries]
    # A scope ("fe80::1%eth0") means a link-local address, which says nothing on another host.
    outside = [entry for entry in dict.fromkeys(found) if "%" not in entry and not _leads_nowhere(entry)]
    return tuple(outside) or (LOOPBACK,)


def _leads_nowhere(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local


def interface_towards(host: str) -> str | None:
    """Returns the interface through which this host reaches another one, given by name or address, or None."""
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
                probe.connect(address)  # this sends nothing
                own = probe.getsockname()[0]
                for name, entries in interface_addresses().items():
                    if own in entries:
                        return name
    return None
