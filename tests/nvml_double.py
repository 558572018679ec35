"""A pretended NVML: boards with counters that step every 100 ms, clocks that can be locked, limits, and refusals.

`FakeNvml` stands for the `pynvml` module inside one process. `doubles/pynvml.py` shares one between processes through a
file, so that the guardian of a run meets the same boards as the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, NO_DRIVER, FUNCTION_NOT_FOUND = 3, 4, 6, 9, 13
TEXT = {
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    9: "Driver Not Loaded",
    13: "Function Not Found",
}
STEP_S = 0.1
MEMORY_MHZ = 1593


class NVMLError(Exception):
    """As the binding's."""

    def __init__(self, value: int) -> None:
        super().__init__(TEXT.get(value, f"error {value}"))
        self.value = value


@dataclass
class FakeBoard:
    """One GPU.

    Attributes:
        watts: constant power.
        refused: NVML function (without prefix) -> error code that it raises.
        frozen: the counter stands still; `sensor_frozen`: so does the power reading.
        scopes: power scopes that field 186 answers to (0 GPU, 1 module).
        factor: what the counter says over the truth.
        locked_mhz, limit_w, application_mhz: settings.
        log: calls that set something.
    """

    index: int = 0
    name: str = "NVIDIA A100-SXM4-80GB"
    watts: float = 300.0
    refused: dict[str, int] = field(default_factory=dict)
    frozen: bool = False
    sensor_frozen: bool = False
    scopes: list[int] = field(default_factory=lambda: [0])
    factor: float = 1.0
    offset_j: float = 0.0
    capability: tuple[int, int] = (8, 0)
    is_divided: bool = False
    is_virtual: bool = False
    locked_mhz: float | None = None
    application_mhz: tuple[int, int] = (MEMORY_MHZ, 1410)
    is_open_to_all: bool = False
    limit_w: float = 400.0
    default_limit_w: float = 400.0
    log: list[str] = field(default_factory=list)

    @property
    def uuid(self) -> str:
        return f"GPU-{self.index:08d}-aaaa"


class FakeNvml:
    """See the module docstring.

    Attributes:
        init_error: code that opening raises, 0: none.
        opened: times opened less times closed.
    """

    NVMLError = NVMLError

    def __init__(self, *boards: FakeBoard, clock: Callable[[], float] = time.perf_counter) -> None:
        for index, board in enumerate(boards):
            board.index = index
        self.boards = list(boards)
        self.clock = clock
        self.init_error = 0
        self.opened = 0

    def nvmlInit(self) -> None:  # noqa: N802 - the binding's names
        if self.init_error:
            raise NVMLError(self.init_error)
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not 0 <= index < len(self.boards):
            raise NVMLError(NOT_FOUND)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        if uuid.startswith("MIG-"):
            return ("MIG", int(uuid[-1]))
        for board in self.boards:
            if board.uuid == uuid:
                return board.index
        raise NVMLError(NOT_FOUND)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: tuple[str, int]) -> int:  # noqa: N802
        return handle[1]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Functions of a board: `nvmlDeviceX` is `x_of` below."""
        short = name.removeprefix("nvmlDevice")
        if short == name or not hasattr(BoardFunctions, short):
            raise AttributeError(name)

        def call(handle: int, *arguments: Any) -> Any:
            board = self.boards[handle]
            if short in board.refused:
                raise NVMLError(board.refused[short])
            return getattr(BoardFunctions, short)(board, self.clock(), *arguments)

        return call


class BoardFunctions:
    """What NVML does with a board; every function takes the board and the time."""

    @staticmethod
    def GetUUID(board: FakeBoard, now: float) -> str:  # noqa: N802
        return board.uuid

    @staticmethod
    def GetName(board: FakeBoard, now: float) -> bytes:  # noqa: N802
        return board.name.encode()

    @staticmethod
    def GetIndex(board: FakeBoard, now: float) -> int:  # noqa: N802
        return board.index

    @staticmethod
    def GetTotalEnergyConsumption(board: FakeBoard, now: float) -> int:  # noqa: N802
        steps = 0 if board.frozen else int((now + 1e-9) / STEP_S)
        return int(1e3 * (board.factor * steps * STEP_S * board.watts + board.offset_j))

    @staticmethod
    def GetPowerUsage(board: FakeBoard, now: float) -> int:  # noqa: N802
        jitter = 0 if board.sensor_frozen else int(1e3 * now) % 7
        return int(1e3 * board.watts) + jitter

    @staticmethod
    def GetFieldValues(board: FakeBoard, now: float, fields: list[tuple[int, int]]) -> list[Any]:  # noqa: N802
        return [
            SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=BoardFunctions.GetPowerUsage(board, now)))
            if field == 186 and scope in board.scopes
            else SimpleNamespace(nvmlReturn=NOT_SUPPORTED, value=SimpleNamespace(uiVal=0))
            for field, scope in fields
        ]

    @staticmethod
    def GetCudaComputeCapability(board: FakeBoard, now: float) -> tuple[int, int]:  # noqa: N802
        return tuple(board.capability)

    @staticmethod
    def GetMigMode(board: FakeBoard, now: float) -> list[int]:  # noqa: N802
        return [int(board.is_divided)] * 2

    @staticmethod
    def GetVirtualizationMode(board: FakeBoard, now: float) -> int:  # noqa: N802
        return 2 if board.is_virtual else 0

    @staticmethod
    def GetClockInfo(board: FakeBoard, now: float, kind: int) -> int:  # noqa: N802
        return int(board.locked_mhz or board.application_mhz[1])

    @staticmethod
    def GetMaxClockInfo(board: FakeBoard, now: float, kind: int) -> int:  # noqa: N802
        return 1410

    @staticmethod
    def GetSupportedMemoryClocks(board: FakeBoard, now: float) -> list[int]:  # noqa: N802
        return [MEMORY_MHZ]

    @staticmethod
    def GetSupportedGraphicsClocks(board: FakeBoard, now: float, memory: int) -> list[int]:  # noqa: N802
        return list(range(1410, 209, -15))

    @staticmethod
    def SetGpuLockedClocks(board: FakeBoard, now: float, least: int, most: int) -> None:  # noqa: N802
        board.locked_mhz = float(most)
        board.log.append(f"lock {least}-{most}")

    @staticmethod
    def ResetGpuLockedClocks(board: FakeBoard, now: float) -> None:  # noqa: N802
        board.locked_mhz = None
        board.log.append("unlock")

    @staticmethod
    def GetAPIRestriction(board: FakeBoard, now: float, kind: int) -> int:  # noqa: N802
        return int(not board.is_open_to_all)

    @staticmethod
    def GetApplicationsClock(board: FakeBoard, now: float, kind: int) -> int:  # noqa: N802
        return board.application_mhz[0 if kind == 2 else 1]

    @staticmethod
    def SetApplicationsClocks(board: FakeBoard, now: float, memory: int, sm: int) -> None:  # noqa: N802
        board.application_mhz = (memory, sm)
        board.log.append(f"application {memory},{sm}")

    @staticmethod
    def GetPowerManagementLimit(board: FakeBoard, now: float) -> int:  # noqa: N802
        return int(1e3 * board.limit_w)

    @staticmethod
    def GetPowerManagementLimitConstraints(board: FakeBoard, now: float) -> tuple[int, int]:  # noqa: N802
        return 100_000, int(1e3 * board.default_limit_w)

    @staticmethod
    def SetPowerManagementLimit(board: FakeBoard, now: float, milliwatts: int) -> None:  # noqa: N802
        board.limit_w = milliwatts / 1e3
        board.log.append(f"limit {milliwatts / 1e3:g}")
