"""Relaxations: where no plan keeps all limits, the nearest limits that one can keep, each with the others as they are.

The least deadline and energy budget are the optima of those objectives under the other limits. The least power caps,
the least memory and the fewest devices are found by bisection: each step asks whether any plan exists, and the plan
that comes back tells how far down to go. A bisection ends `TOLERANCE` above what a search has proven to be too little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.errors import InputError
from autopar.ir.cost import Array, ClockFigures, CostTable, Device, TableSource
from autopar.ir.graph import OpGraph
from autopar.ir.mesh import StageMesh
from autopar.ir.solution import Limits, Objective, Pins
from autopar.search.shared import Plan, Space, peak_w
from autopar.search.space import Skeleton, Skeletons, list_skeletons
from autopar.search.stages import Question

TOLERANCE = 5e-4
ANY_PLAN = 0.999
"""Tolerance of a question whose only answer is whether there is a plan."""
MOST_GROWTH = 64
LIMIT_NAMES = ("deadline_s", "energy_j", "average_power_w", "peak_power_w")


@dataclass(frozen=True)
class Room:
    """What a plan must stay within; `memory_bytes` of one device."""

    memory_bytes: float
    num_gpus: int
    limits: Limits

    def without(self, name: str) -> Room:
        """The room with one limit dropped."""
        if name == "memory_bytes":
            return replace(self, memory_bytes=math.inf)
        return replace(self, limits=replace(self.limits, **{name: None}))

    def with_level(self, name: str, level: float) -> Room:
        """The room with one limit at `level`."""
        if name in ("memory_bytes", "num_gpus"):
            return replace(self, **{name: level})  # type: ignore[arg-type]
        return replace(self, limits=replace(self.limits, **{name: level}))


@dataclass(frozen=True)
class Reached:
    """A plan that stays within a room, with its figures as paced there.

    Attributes:
        least_average_w: average power when it waits as long as deadline and energy budget allow.
        bound: of the question's objective.
    """

    plan: Plan
    time_s: float
    energy_j: float
    least_average_w: float
    peak_w: float
    bound: float


@dataclass(frozen=True)
class Relaxation:
    """The least `value` of limit `name` (a field of Limits, `memory_bytes` or `num_gpus`) that a plan can keep.

    Below `proven` there is none; `value` is at most TOLERANCE above it unless time ran out.
    """

    name: str
    value: float
    proven: float
    reached: Reached


@dataclass(frozen=True)
class _OtherDevice:
    """A device with other memory, in another number."""

    memory_bytes: int
    num_gpus: int
    blocked_w: float
    host_w_per_node: float
    gpus_per_node: int


@dataclass(frozen=True)
class _OtherRoom:
    """A table source on other devices; tables depend on neither their memory nor their number."""

    source: TableSource
    device: Device

    @property
    def graph(self) -> OpGraph:
        return self.source.graph

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return self.source.clocks_hz

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        return self.source.table(mesh, num_microbatches)

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        return self.source.clock_figures(mesh, num_microbatches)


@dataclass
class Explorer:
    """Asks for plans in other rooms than that of `space`.

    Attributes:
        skeletons: of the space, whatever power they draw.
        least_growth: so many times the devices are needed at least.
        deadline_s: `time.monotonic` value at which to stop; `ran_out` says that it struck.
    """

    space: Space
    pins: Pins
    skeletons: Skeletons
    use_all: bool = False
    max_microbatches: int | None = None
    deadline_s: float | None = None
    ran_out: bool = False
    least_growth: float = 1.0
    floors_w: dict[tuple[tuple[int, ...], int], Array] = field(default_factory=dict)
    spaces: dict[tuple[float, int, float | None, int], Space] = field(default_factory=dict)

    def ask(self, room: Room, kind: str = "energy", tolerance: float = ANY_PLAN, more_than: int = 0) -> Reached | None:
        """The best plan within a room, or any at the default tolerance, on more than so many devices; None if none."""
        space = self._space(room, more_than)
        if space is None:
            return None
        space.tolerance = tolerance
        question = Question(space, Objective(kind), room.limits)
        answer = question.run()
        self.ran_out |= space.out_of_time
        plan = answer.plan
        return None if plan is None else _reached(question, plan, answer.bound)

    def _space(self, room: Room, more_than: int) -> Space | None:
        key = (room.memory_bytes, room.num_gpus, room.limits.peak_power_w, more_than)
        if key not in self.spaces:
            made = self._make(room, more_than)
            if made is None:
                return None
            self.spaces[key] = made
        return self.spaces[key]

    def _make(self, room: Room, more_than: int) -> Space | None:
        """None if the pins leave no skeleton on so many devices."""
        base, device = self.space, self.space.device
        cap_w = room.limits.peak_power_w
        memory = room.memory_bytes if math.isfinite(room.memory_bytes) else 2**62
        other = _OtherDevice(int(memory), room.num_gpus, device.blocked_w, device.host_w_per_node, device.gpus_per_node)
        source = _OtherRoom(base.source, other)
        skeletons = self.skeletons
        if room.num_gpus != device.num_gpus:
            try:
                skeletons = list_skeletons(
                    source,
                    self.pins,
                    use_all=self.use_all,
                    max_microbatches=self.max_microbatches,
                    clocks=self.skeletons.clocks,
                )
            except InputError:
                return None
        skeletons = skeletons.only(lambda s: s.num_gpus > more_than)
        if cap_w is not None:
            skeletons = skeletons.only(lambda s: self._floor_w(s, cap_w) <= cap_w)
        return Space(
            source,
            base.schedule,
            ANY_PLAN,
            skeletons,
            deadline_s=self.deadline_s,
            peak_power_w=room.limits.peak_power_w,
            problems=base.problems,
            stacks=base.stacks,
            leaves=base.leaves,
        )

    def _floor_w(self, skeleton: Skeleton, cap_w: float) -> float:
        """A bound on the peak power of all plans of a skeleton; its own fixed power where that is above the cap."""
        num_gpus, (first, last) = skeleton.num_gpus, skeleton.clocks
        fixed_w = self.space.fixed_w(num_gpus)
        if fixed_w > cap_w:
            return fixed_w
        key = (skeleton.sizes, skeleton.num_microbatches)
        if key not in self.floors_w:
            self.floors_w[key] = self._floors(*key)
        return fixed_w + num_gpus * float(np.min(self.floors_w[key][first : last + 1]))

    def _floors(self, sizes: tuple[int, ...], num_microbatches: int) -> Array:
        """[clock] highest, over ops, of the least dynamic power that any strategy of the op draws on one device."""
        stack = self.space.stack(sizes, num_microbatches)
        if stack is None:
            return np.full(len(self.space.source.clocks_hz), np.inf)
        figures, nodes = stack.figures, stack.problem.table.nodes
        seconds = figures.forward_s + figures.backward_s
        draws = np.isfinite(seconds) & (seconds > 0)
        watts = np.divide(figures.microbatch_j, seconds, out=np.zeros_like(seconds), where=draws)
        starts = np.cumsum([0, *(len(node.choices) for node in nodes[:-1])])
        floors: Array = np.max(np.minimum.reduceat(watts, starts, axis=1), axis=1)
        return floors

    def relax(self, room: Room, name: str) -> Relaxation | None:
        """The least value of one limit with the others kept; None if dropping it alone does not help."""
        if name == "num_gpus":
            return self._more_devices(room)
        if name in ("deadline_s", "energy_j"):
            return self._least(room, name)
        reached = self._coolest(room) if name == "peak_power_w" else self.ask(room.without(name))
        if reached is None:
            return None
        return self._bisect(room, name, reached)

    def _coolest(self, room: Room) -> Reached | None:
        """A plan within the room but for its peak power, on about as few devices as possible."""
        free, num_gpus = room.without("peak_power_w"), 1
        while num_gpus < room.num_gpus and not self.use_all:
            found = self.ask(free.with_level("num_gpus", num_gpus))
            if found is not None:
                return found
            num_gpus *= 2
        return self.ask(free)

    def _least(self, room: Room, name: str) -> Relaxation | None:
        is_time = name == "deadline_s"
        reached = self.ask(room.without(name), "time" if is_time else "energy", TOLERANCE)
        if reached is None:
            return None
        return Relaxation(name, reached.time_s if is_time else reached.energy_j, reached.bound, reached)

    def _bisect(self, room: Room, name: str, reached: Reached) -> Relaxation:
        low, level = self._present(room, name), _level_of(name)
        high = level(reached)
        while high > low * (1 + TOLERANCE) and not self.ran_out:
            middle = (low + high) / 2
            found = self.ask(room.with_level(name, middle))
            if found is not None and level(found) < high:
                high, reached = level(found), found
            elif not self.ran_out:
                low = middle
        return Relaxation(name, high, low, reached)

    def _present(self, room: Room, name: str) -> float:
        """What is known to be too little."""
        if name == "memory_bytes":
            return room.memory_bytes
        return float(getattr(room.limits, name))

    def _more_devices(self, room: Room) -> Relaxation | None:
        """The fewest devices, from `least_growth` times the present ones on."""
        low = room.num_gpus
        high, reached = max(low, int(room.num_gpus * self.least_growth) // 2), None
        while reached is None and high < room.num_gpus * MOST_GROWTH and not self.ran_out:
            low, high = high, min(2 * high, room.num_gpus * MOST_GROWTH)
            reached = self.ask(room.with_level("num_gpus", high), more_than=low)
        while reached is not None and high > low + 1 and not self.ran_out:
            middle = (low + high) // 2
            found = self.ask(room.with_level("num_gpus", middle), more_than=low)
            if found is not None:
                high, reached = middle, found
            elif not self.ran_out:
                low = middle
        return None if reached is None else Relaxation("num_gpus", high, low + 1, reached)


def _level_of(name: str) -> Callable[[Reached], float]:
    return {
        "average_power_w": lambda reached: reached.least_average_w,
        "peak_power_w": lambda reached: reached.peak_w,
        "memory_bytes": lambda reached: reached.plan.figures.peak_memory_bytes,
    }[name]


def _reached(question: Question, plan: Plan, bound: float) -> Reached:
    space, skeleton, limits = question.space, plan.skeleton, question.limits
    aim, dynamic_j = question.aim_of(skeleton), question.space.dynamic_j(plan)
    time_s = aim.paced_s(plan.figures.time_s, dynamic_j)
    problem = space.uncapped(skeleton.sizes, skeleton.num_microbatches, skeleton.clocks[0])
    highest_w = 0.0 if problem is None else peak_w(problem.table, plan.choice)
    return Reached(
        plan,
        time_s,
        dynamic_j + aim.fixed_w * time_s,
        _least_average_w(limits, time_s, dynamic_j, aim.fixed_w),
        aim.fixed_w + skeleton.num_gpus * highest_w,
        bound,
    )


def _least_average_w(limits: Limits, time_s: float, dynamic_j: float, fixed_w: float) -> float:
    """Average power after waiting until deadline or energy budget; without both, just above the fixed power."""
    longest_s = math.inf if limits.deadline_s is None else limits.deadline_s
    if limits.energy_j is not None and fixed_w > 0:
        longest_s = min(longest_s, (limits.energy_j - dynamic_j) / fixed_w)
    if math.isinf(longest_s):
        return fixed_w * (1 + TOLERANCE) if fixed_w > 0 else dynamic_j / time_s
    return fixed_w + dynamic_j / max(longest_s, time_s)
