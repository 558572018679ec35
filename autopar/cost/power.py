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
all; of the power of memory traffic, `memory_clock_share` (caches and multiprocessors, not the memory itself) changes
by D(x) / D(s). Form and parameters: fits of the Perseus artifact's stage profiles (device files).

`stage_w` and `program_under_limit` are the same model without kernels: for stages whose times are known, and for
programs of which only time and power under another limit are.
"""

from __future__ import annotations

import numpy as np

from autopar.cost.device import ClockControl, DeviceSpec
from autopar.cost.roofline import flop_rate, memory_rate, on_tf32
from autopar.ir.cost import Array

REST_SHARE = 0.25
"""Of what the limit leaves: power of a training program on one GPU between its large products (memory traffic, short
kernels, waiting for input). Fitted jointly to watts under power limits of three boards, ml-energy/zeus (NSDI 2023); the
least error of each board lies between 0.2 and 0.25 (benchmarks/energy.py)."""
LEAST_SPEED = 0.3
"""Of computing: a power limit lowers clocks no further."""
BISECTIONS = 40


def dynamic_limit_w(spec: DeviceSpec) -> float:
    """Power above blocked that the board may draw."""
    return (spec.power_limit_w or spec.limit_w) - spec.blocked_w


def rated_dynamic_w(spec: DeviceSpec) -> float:
    """The same under the board's own limit, whatever limit is set."""
    return spec.limit_w - spec.blocked_w


def flop_energy_j(spec: DeviceSpec, kind: str, dtype: str) -> float:
    """eps_flop: every FLOP costs what one of the fastest kernel on the same units does, however slowly it runs."""
    rate = flop_rate(spec, kind, dtype)
    own = {"convolution": spec.convolution_efficiency, "attention": spec.attention_efficiency}.get(
        kind, spec.gemm_efficiency
    )
    fastest = max(spec.gemm_efficiency, spec.gemm_backward_efficiency)
    if spec.tf32_efficiency and on_tf32(spec, kind, dtype):
        own = own if kind == "convolution" else spec.tf32_efficiency
        fastest = max(own, spec.tf32_efficiency)
    return spec.gemm_share * rated_dynamic_w(spec) / (rate / own * fastest) * clock_energy_factor(spec)


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
    return memory_w(spec) / memory_rate(spec)


def memory_w(spec: DeviceSpec) -> float:
    """Dynamic power of a streaming kernel at the device's clock."""
    share = spec.memory_clock_share
    return spec.memory_share * rated_dynamic_w(spec) * (1 - share + share * clock_power_factor(spec, spec.speed))


def kernel_energy_j(spec: DeviceSpec, kind: str, dtype: str, flops: Array, num_bytes: Array) -> Array:
    """Dynamic joules."""
    return flops * flop_energy_j(spec, kind, dtype) + num_bytes * byte_energy_j(spec)


def within_limit_s(spec: DeviceSpec, time_s: Array, energy_j: Array) -> Array:
    """Seconds that the energy needs at the power limit, at least."""
    return np.maximum(time_s, energy_j / dynamic_limit_w(spec))


def stage_w(spec: DeviceSpec) -> float:
    """Power of one device while it computes a training stage, large products mostly, at its clock and power limit."""
    natural_w = spec.gemm_share * rated_dynamic_w(spec) * clock_power_factor(spec, spec.speed)
    return spec.blocked_w + min(natural_w, dynamic_limit_w(spec))


def speed_within(spec: DeviceSpec, natural_w: float) -> float:
    """Speed of computing under the power limit, of a load that draws `natural_w` above blocked power at full speed."""
    limit_w = dynamic_limit_w(spec)
    if natural_w <= limit_w:
        return 1.0
    low, high = LEAST_SPEED if spec.clock_control else 1.0, 1.0
    least_w = natural_w * clock_power_factor(spec, low)
    if least_w > limit_w:
        return low * limit_w / least_w
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if natural_w * clock_power_factor(spec, middle) > limit_w else (middle, high)
    return low


def program_under_limit(spec: DeviceSpec, average_w: float) -> tuple[float, float]:
    """Time over that under the board's own limit, and average power, of a program that drew `average_w` there.

    It is taken for phases of large products and phases of everything else that together draw this average; a limit
    slows products down as it does such kernels, and the rest only if it is lower than what that draws.
    """
    product_w, rest_w = spec.gemm_share * rated_dynamic_w(spec), REST_SHARE * rated_dynamic_w(spec)
    rest_w = min(rest_w, max(0.0, average_w - spec.blocked_w))
    share = min(1.0, max(0.0, average_w - spec.blocked_w - rest_w) / (product_w - rest_w))
    limit_w = dynamic_limit_w(spec)
    products_s = share / speed_within(spec, product_w)
    others_s = (1.0 - share) * max(1.0, rest_w / limit_w)
    total_s = products_s + others_s
    dynamic_j = products_s * min(product_w, limit_w) + others_s * min(rest_w, limit_w)
    idle_w = min(average_w, spec.blocked_w) if not share and not rest_w else spec.blocked_w
    return total_s, idle_w + dynamic_j / total_s
