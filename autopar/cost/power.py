"""Energy of kernels and the board's power limit.

Power has three levels: idle, blocked (live context, waiting) and blocked plus dynamic. Here only dynamic energy is
priced; blocked power is paid per device and second by whoever knows the step time.

    e = FLOPs * eps_flop + bytes * eps_byte ,     eps_flop = gemm_share * (limit - blocked) / reached FLOP rate
                                                  eps_byte = memory_share * (limit - blocked) / reached byte rate

so, under the board's own limit, a large GEMM draws `gemm_share` of what the limit leaves and a streaming kernel
`memory_share`. Where both together would pass the limit (the board's, or the lower one that an administrator set), the
clock drops to the highest that keeps it; where no clock does, or clocks are fixed, the kernel takes
e / (limit - blocked) seconds. Source: Choi, Vuduc et al., IPDPS 2013 (energy adds while time overlaps), with the limit
that a real board enforces.

At a share x of the highest clock, power is P0 + k x V(x)^2 (dynamic power of CMOS), of which blocked power is paid
apart: a GEMM draws in proportion to

    D(x) = (1 + d) x v^2 - d ,     v = V(x) / V(1) ,   d = `blocked_share`

Many boards reach their limit below the highest clock: large GEMMs then run at `sustained_share` s of it, where the
rates and shares of the device file were taken. eps_flop at x changes by (D(x) / x) / (D(s) / s), and above s not at
all; eps_byte never does. Form and parameters: fits of the Perseus artifact's stage profiles (device files).
"""

from __future__ import annotations

import numpy as np

from autopar.cost.device import ClockControl, DeviceSpec
from autopar.cost.roofline import flop_rate, memory_rate
from autopar.ir.cost import Array


def dynamic_limit_w(spec: DeviceSpec) -> float:
    """Power above blocked that the board may draw."""
    return (spec.power_limit_w or spec.limit_w) - spec.blocked_w


def rated_dynamic_w(spec: DeviceSpec) -> float:
    """The same under the board's own limit, whatever limit is set."""
    return spec.limit_w - spec.blocked_w


def flop_energy_j(spec: DeviceSpec, kind: str, dtype: str) -> float:
    """eps_flop: every FLOP costs what one of the fastest GEMM does, however slowly it runs."""
    rate = flop_rate(spec, kind, dtype)
    own = {"convolution": spec.convolution_efficiency, "attention": spec.attention_efficiency}.get(
        kind, spec.gemm_efficiency
    )
    as_gemm = rate / own * max(spec.gemm_efficiency, spec.gemm_backward_efficiency)
    return spec.gemm_share * rated_dynamic_w(spec) / as_gemm * clock_energy_factor(spec)


def clock_energy_factor(spec: DeviceSpec) -> float:
    """eps_flop at the device's clock over that at the sustained one; see the module docstring."""
    return clock_power_factor(spec, spec.speed) / spec.speed


def clock_power_factor(spec: DeviceSpec, speed: float) -> float:
    """Dynamic power of large GEMMs over that at the sustained clock; `speed` is the clock over the sustained one."""
    if spec.clock_control is None or speed == 1:
        return 1.0
    return _curve(spec.clock_control, speed * spec.sustained_share) / _curve(spec.clock_control, spec.sustained_share)


def _curve(control: ClockControl, share: float) -> float:
    """D at a share of the highest clock."""
    above = max(0.0, share - control.ridge_share) / (1 - control.ridge_share)
    voltage = (1 + control.voltage_rise * above) / (1 + control.voltage_rise)
    return (1 + control.blocked_share) * share * voltage**2 - control.blocked_share


def byte_energy_j(spec: DeviceSpec) -> float:
    """eps_byte of a byte read from or written to device memory."""
    return spec.memory_share * rated_dynamic_w(spec) / memory_rate(spec)


def kernel_energy_j(spec: DeviceSpec, kind: str, dtype: str, flops: Array, num_bytes: Array) -> Array:
    """Dynamic joules."""
    return flops * flop_energy_j(spec, kind, dtype) + num_bytes * byte_energy_j(spec)


def within_limit_s(spec: DeviceSpec, time_s: Array, energy_j: Array) -> Array:
    """Seconds that the energy needs at the power limit, at least."""
    return np.maximum(time_s, energy_j / dynamic_limit_w(spec))
