"""Which boards the local ranks use, as NVML names them: CUDA counts what `CUDA_VISIBLE_DEVICES` leaves, NVML all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from autopar.nvml import Board, Nvml, NvmlError

IDENTIFIER = re.compile(r"(GPU|MIG)-[0-9a-zA-Z/-]+")


def visible_gpus(environment: Mapping[str, str], count: int) -> list[int | str]:
    """NVML indices or identifiers of the first `count` CUDA devices.

    CUDA reads the list up to the first entry that it does not understand, and so do we. Indices are those of the PCI
    bus, as in NVML, where all boards are alike or CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(range(count))
    found: list[int | str] = []
    for part in (entry.strip() for entry in listed.split(",")):
        if part.isdecimal():
            found.append(int(part))
        elif IDENTIFIER.fullmatch(part):
            found.append(part)
        else:
            break
    return found[:count]


def find_boards(nvml: Nvml, wanted: Sequence[int | str]) -> list[Board]:
    """Boards by index or identifier; an identifier may be shortened, as CUDA allows. Raises NvmlError."""
    return [nvml.board(one) if isinstance(one, int) else _by_identifier(nvml, one) for one in wanted]


def _by_identifier(nvml: Nvml, identifier: str) -> Board:
    try:
        return nvml.board_by_uuid(identifier)
    except NvmlError:
        matching = [board for board in nvml.boards() if board.uuid.startswith(identifier)]
        if len(matching) != 1:
            raise
        return matching[0]
