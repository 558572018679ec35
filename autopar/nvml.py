"""The one door to NVML: every call to the driver's management library goes through `Nvml` and its `Board`s.

NVML's errors become `NvmlError` with a kind; nothing else leaves this module. Units here are joules, watts and MHz
(NVML speaks of mJ and mW). Nothing is imported, opened or set before `open_nvml`.

What the same call means on different boards (NVML documentation):
    power    instantaneous where field 186 is served; `nvmlDeviceGetPowerUsage` is instantaneous up to GA100 (compute
             capability 8.0) and a 1 s average above. Boards with a processor on the module may serve the module alone.
    clocks   NVML sets and resets locked clocks but cannot read them back; a reset is the only way to restore them.
    MIG      energy, power, clocks and limits are those of the whole board, never of an instance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

KIND_BY_VALUE: Mapping[int, str] = MappingProxyType(
    {3: "unsupported", 4: "denied", 6: "absent", 9: "no driver", 12: "no driver", 13: "unsupported", 15: "lost"}
)
"""NVML return codes (nvml.h) that callers tell apart."""
LAST_INSTANT_CAPABILITY = (8, 0)
"""Volta to GA100: `nvmlDeviceGetPowerUsage` is instantaneous up to here."""
POWER_AVERAGE, POWER_INSTANT = 185, 186
SCOPE_GPU, SCOPE_MODULE = 0, 1
CLOCK_SM, CLOCK_MEMORY = 1, 2
APPLICATION_CLOCKS = 0
"""Of the restricted functions: setting application clocks."""
VIRTUAL = 2
"""Virtualisation mode of a vGPU."""


class NvmlError(Exception):
    """NVML did not do it.

    Attributes:
        kind: `missing` (the binding), `no driver`, `denied`, `unsupported`, `absent`, `lost` or `other`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Power:
    """Present power. `is_average`: over 1 s; None: the driver does not say. `scope`: `gpu` or `module`."""

    watts: float
    is_average: bool | None
    scope: str


class Nvml:
    """An open NVML. Close it, or use it as a context."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the library back; a failure to do so harms nobody."""
        try:
            self.call("nvmlShutdown")
        except NvmlError:
            return

    def call(self, name: str, *arguments: Any) -> Any:
        """One NVML function. Raises NvmlError."""
        function: Callable[..., Any] | None = getattr(self._binding, name, None)
        if function is None:
            raise NvmlError("unsupported", f"{name} is not in this NVML binding")
        try:
            return function(*arguments)
        except self._binding.NVMLError as error:
            kind = KIND_BY_VALUE.get(int(getattr(error, "value", -1)), "other")
            raise NvmlError(kind, str(error)) from error

    def boards(self) -> list[Board]:
        """All GPUs, in NVML order (that of the PCI bus)."""
        return [self.board(index) for index in range(int(self.call("nvmlDeviceGetCount")))]

    def board(self, index: int) -> Board:
        """The GPU with this NVML index."""
        return self._make(self.call("nvmlDeviceGetHandleByIndex", index))

    def board_by_uuid(self, uuid: str) -> Board:
        """The GPU of a `GPU-...` identifier, or the one that holds the instance of a `MIG-...` one."""
        handle = self.call("nvmlDeviceGetHandleByUUID", uuid)
        if uuid.startswith("MIG-"):
            handle = self.call("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)
        return self._make(handle)

    def _make(self, handle: Any) -> Board:
        uuid, name = (_text(self.call(f"nvmlDeviceGet{what}", handle)) for what in ("UUID", "Name"))
        return Board(self, handle, int(self.call("nvmlDeviceGetIndex", handle)), uuid, name)


class Board:
    """One GPU. Every method raises NvmlError if NVML refuses.

    Attributes:
        index: in NVML's order, as `nvidia-smi -i` takes it.
        uuid, name: as NVML has them.
    """

    def __init__(self, nvml: Nvml, handle: Any, index: int, uuid: str, name: str) -> None:
        self._nvml, self._handle = nvml, handle
        self.index, self.uuid, self.name = index, uuid, name
        self._power_way: Callable[[], Power] | None = None

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._nvml.call(f"nvmlDevice{name}", self._handle, *arguments)

    def energy_j(self) -> float:
        """Joules of the whole board since the driver was loaded."""
        return float(self._call("GetTotalEnergyConsumption")) / 1e3

    def power(self) -> Power:
        """Present power, by the best way that the board answered to first."""
        if self._power_way is not None:
            return self._power_way()
        refusal: NvmlError | None = None
        for way in (self._instant, self._module, self._average, self._usage):
            try:
                found = way()
            except NvmlError as error:
                refusal = error
                continue
            self._power_way = way
            return found
        raise refusal or NvmlError("unsupported", "no power reading")

    def _instant(self) -> Power:
        return Power(self._field(POWER_INSTANT, SCOPE_GPU), False, "gpu")

    def _module(self) -> Power:
        return Power(self._field(POWER_INSTANT, SCOPE_MODULE), False, "module")

    def _average(self) -> Power:
        return Power(self._field(POWER_AVERAGE, SCOPE_GPU), True, "gpu")

    def _usage(self) -> Power:
        watts = float(self._call("GetPowerUsage")) / 1e3
        try:
            is_average: bool | None = tuple(self._call("GetCudaComputeCapability")) > LAST_INSTANT_CAPABILITY
        except NvmlError:
            is_average = None
        return Power(watts, is_average, "gpu")

    def _field(self, field: int, scope: int) -> float:
        found = self._call("GetFieldValues", [(field, scope)])[0]
        if found.nvmlReturn != 0:
            kind = KIND_BY_VALUE.get(found.nvmlReturn, "other")
            raise NvmlError(kind, f"field {field} is refused with code {found.nvmlReturn}")
        return float(found.value.uiVal) / 1e3

    def is_divided(self) -> bool:
        """Whether MIG divides the board. False where the driver does not know MIG."""
        try:
            return bool(self._call("GetMigMode")[0])
        except NvmlError:
            return False

    def is_virtual(self) -> bool:
        """Whether this is a vGPU, whose counters are those of a board that others use too, if any."""
        try:
            return int(self._call("GetVirtualizationMode")) == VIRTUAL
        except NvmlError:
            return False

    def clock_mhz(self) -> float:
        """Present SM clock."""
        return float(self._call("GetClockInfo", CLOCK_SM))

    def max_clock_mhz(self) -> float:
        """Highest SM clock."""
        return float(self._call("GetMaxClockInfo", CLOCK_SM))

    def supported_clocks_mhz(self) -> tuple[float, ...]:
        """SM clocks that can be locked at the highest memory clock, highest first."""
        memory = max(self._call("GetSupportedMemoryClocks"))
        return tuple(sorted(map(float, self._call("GetSupportedGraphicsClocks", memory)), reverse=True))

    def lock_clock(self, mhz: float) -> None:
        """Pins the SM clock. Needs administrator rights."""
        self._call("SetGpuLockedClocks", round(mhz), round(mhz))

    def unlock_clock(self) -> None:
        """Takes the pin out, whoever set it."""
        self._call("ResetGpuLockedClocks")

    def may_set_application_clock(self) -> bool:
        """Whether an administrator has opened application clocks to everybody."""
        try:
            return not bool(self._call("GetAPIRestriction", APPLICATION_CLOCKS))
        except NvmlError:
            return False

    def application_clocks_mhz(self) -> tuple[float, float]:
        """(memory, SM) application clocks: upper limits under load."""
        memory, sm = (float(self._call("GetApplicationsClock", clock)) for clock in (CLOCK_MEMORY, CLOCK_SM))
        return memory, sm

    def set_application_clocks(self, memory_mhz: float, sm_mhz: float) -> None:
        """Sets both application clocks."""
        self._call("SetApplicationsClocks", round(memory_mhz), round(sm_mhz))

    def power_limit_w(self) -> float:
        """Limit that is set."""
        return float(self._call("GetPowerManagementLimit")) / 1e3

    def power_range_w(self) -> tuple[float, float]:
        """Least and highest limit that can be set."""
        least, highest = self._call("GetPowerManagementLimitConstraints")
        return float(least) / 1e3, float(highest) / 1e3

    def set_power_limit(self, watts: float) -> None:
        """Needs administrator rights."""
        self._call("SetPowerManagementLimit", round(watts * 1e3))


def open_nvml(binding: Any = None) -> Nvml:
    """NVML, opened. `binding` stands for the `pynvml` module, which is imported here and nowhere else.

    Raises:
        NvmlError: there is no binding, no driver or no permission.
    """
    if binding is None:
        try:
            import pynvml
        except ImportError as error:
            raise NvmlError("missing", "NVML binding is missing: pip install nvidia-ml-py") from error
        binding = pynvml
    nvml = Nvml(binding)
    nvml.call("nvmlInit")
    return nvml


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
