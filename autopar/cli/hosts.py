"""Options of a run over several hosts, named as torchrun's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from autopar.errors import InputError
from autopar.ir.hosts import DEFAULT_PORT, DEFAULT_TIMEOUT_S, Hosts

C = TypeVar("C", bound=Callable[..., Any])

OPTIONS = (
    click.option("--nodes", default=1, show_default=True, metavar="K", help="Hosts; run this command on each of them."),
    click.option("--node-rank", default=0, show_default=True, metavar="k", help="Number of this host, from 0."),
    click.option("--master-addr", metavar="ADDR", help="Address of host 0, at which all ranks meet."),
    click.option("--master-port", default=DEFAULT_PORT, show_default=True, metavar="PORT", help="Port of the meeting."),
    click.option(
        "--timeout",
        "timeout_s",
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        metavar="SECONDS",
        help="How long ranks wait for each other in a collective before the run fails.",
    ),
)


def host_options(command: C) -> C:
    """Add the options; `hosts_of` takes their values."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def hosts_of(*, nodes: int, node_rank: int, master_addr: str | None, master_port: int, timeout_s: float) -> Hosts:
    """The hosts that the options describe. Raises InputError."""
    if nodes == 1 and node_rank == 0:
        return Hosts(timeout_s=timeout_s)
    if master_addr is None:
        raise InputError(f"--nodes {nodes} needs --master-addr: the address of host 0 that the others reach")
    return Hosts(nodes, node_rank, master_addr, master_port, timeout_s)
