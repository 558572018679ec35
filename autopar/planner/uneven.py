"""Plans whose stages have meshes of their own, as pinned: `--pin meshes=2x1/1x2`.

The search knows pipelines of equal stages alone. It is asked once per mesh for the best such pipeline; every stage then
takes what the answer for its mesh chose for its ops (`rules.stage_meshes`), and the cuts are moved, block by block,
while simulation finds the plan better. Nothing is proved of plans of other strategies, so there is no bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autopar.cost.hardware import Cluster
from autopar.cost.mixed import MixedTables
from autopar.cost.table import CostTables
from autopar.errors import InfeasibleError, InputError, PlanMismatchError
from autopar.ir.graph import OpGraph
from autopar.ir.solution import Decisions, Limits, Pins, StageChoice
from autopar.ir.verify import UNEVEN_SCHEDULES
from autopar.planner.choose import Candidate, Choice, Chooser, overdrawn_error
from autopar.planner.cuts import even_starts
from autopar.rules.stage_meshes import joined
from autopar.units import format_bytes

Cuts = tuple[int, ...]
"""First block of every stage."""
NOTE = (
    "stages have meshes of their own: each takes what the search chose for a pipeline on its mesh alone, and the cuts "
    "are the best that simulation found around that; no bound is known"
)


@dataclass(frozen=True)
class UnevenChooser:
    """Chooses for the meshes that a request pins."""

    chooser: Chooser

    @property
    def _pins(self) -> Pins:
        return self.chooser.request.pins

    def choose(self, tables: CostTables | MixedTables) -> Choice:
        """The best candidate; `tables` are those of the request's pins.

        Raises:
            InputError: the pins contradict one another, the cluster or the model.
            InfeasibleError: no plan fits, or none keeps the limits.
        """
        if isinstance(tables, MixedTables):
            raise InputError("--pin meshes=...: for clusters of one type of GPU")
        self._check(tables.graph)
        baselines = self.chooser.baselines()[0] if self.chooser.request.with_baselines else ()
        first = self._on_each_mesh(None)
        counts = {choice.candidate.decisions.num_microbatches for choice in first.values()}
        found: list[Candidate] = []
        for count in sorted(counts):
            self.chooser.progress(f"moving the cuts of {words(self._pins)} at {count} microbatches")
            found += self._best_cuts(tables, self._on_each_mesh(count) if len(counts) > 1 else first)
        best = self._best(found)
        searched = next(iter(first.values())).solution
        solution = replace(
            searched,
            decisions=best.decisions,
            time_s=best.prediction.step_time_s.value,
            energy_j=best.prediction.energy_j.value,
            objective_value=best.value,
            bound=0.0,
            status="feasible",
            wall_s=sum(choice.solution.wall_s for choice in first.values()),
            contenders=(),
            gap_parts={},
            is_interrupted=any(choice.solution.is_interrupted for choice in first.values()),
        )
        return Choice(replace(best, formula=best.value), solution, baselines)

    def _check(self, graph: OpGraph) -> None:
        meshes, num_gpus, num_blocks = self._pins.meshes, self.chooser.request.num_gpus, len(graph.blocks)
        needed = sum(dp * tp for dp, tp in meshes)
        if graph.is_inference:
            raise InputError("--pin meshes=...: for training; the stages of an inference plan have one mesh")
        if self._pins.schedule not in (None, *UNEVEN_SCHEDULES):
            known = " and ".join(UNEVEN_SCHEDULES)
            raise InputError(f"--pin meshes=...,schedule={self._pins.schedule}: such stages run {known} alone")
        if needed > num_gpus:
            raise InputError(f"--pin meshes={words(self._pins)}: needs {needed} GPUs, there are {num_gpus}")
        if len(meshes) > num_blocks:
            raise InputError(
                f"--pin meshes={words(self._pins)}: the model has only {num_blocks} blocks to put on stages"
            )

    def _on_each_mesh(self, count: int | None) -> dict[tuple[int, int], Choice]:
        """The best pipeline of as many equal stages on each of the meshes."""
        found: dict[tuple[int, int], Choice] = {}
        request, stages = self.chooser.request, len(self._pins.meshes)
        for dp, tp in dict.fromkeys(self._pins.meshes):
            pins = replace(
                self._pins,
                meshes=(),
                dp=dp,
                tp=tp,
                pp=stages,
                interleave=1,
                schedule=self._pins.schedule or "1f1b",
                num_microbatches=count or self._pins.num_microbatches,
            )
            asked = replace(
                request, num_gpus=dp * tp * stages, pins=pins, limits=Limits(), with_baselines=False, use_all=False
            )
            cluster = self.chooser.target.cluster
            assert isinstance(cluster, Cluster)
            target = replace(self.chooser.target, cluster=replace(cluster, num_gpus=asked.num_gpus))
            own = replace(self.chooser, request=asked, target=target)
            found[dp, tp] = own.choose(own.tables(pins))
        return found

    def _best_cuts(self, tables: CostTables, on_mesh: dict[tuple[int, int], Choice]) -> Iterator[Candidate]:
        """The best of the plans around several beginnings."""
        plans = [on_mesh[mesh].candidate.decisions for mesh in self._pins.meshes]
        seen: dict[Cuts, Candidate | None] = {}

        def figure(cuts: Cuts) -> tuple[bool, float]:
            if cuts not in seen:
                seen[cuts] = self._candidate(tables, plans, cuts)
            found = seen[cuts]
            return (True, float("inf")) if found is None else self._rank(found)

        num_blocks = len(tables.graph.blocks)
        starts = {tuple(stage.start for stage in plan.stages) for plan in plans} | {_by_devices(plans, num_blocks)}
        if self._pins.even_cuts:
            starts = {even_starts(tables.graph, len(plans))}
        best = min(sorted(starts), key=figure)
        while not self._pins.even_cuts:
            nearer = min(_neighbours(best, num_blocks), key=figure, default=best)
            if figure(nearer) >= figure(best):
                break
            best = nearer
        yield from (candidate for candidate in seen.values() if candidate is not None)

    def _candidate(self, tables: CostTables, plans: Sequence[Decisions], cuts: Cuts) -> Candidate | None:
        """The plan with those cuts, simulated; None where the stages' choices do not go together."""
        stops = (*cuts[1:], len(tables.graph.blocks))
        stages = [
            StageChoice(start, stop, plan.stages[k].recompute, plan.stages[k].clock_hz)
            for k, (plan, start, stop) in enumerate(zip(plans, cuts, stops, strict=True))
        ]
        try:
            own = joined(tables.graph, plans, stages)
            schedule = own.schedule if own.schedule in UNEVEN_SCHEDULES else UNEVEN_SCHEDULES[0]
            return self.chooser.candidate(tables, replace(own, schedule=schedule))
        except PlanMismatchError:
            return None

    def _rank(self, candidate: Candidate) -> tuple[bool, float]:
        """Plans that keep memory and limits first; of the others the one that needs least memory."""
        if self.chooser.is_kept(candidate):
            return False, candidate.value
        return True, max(peak.value for peak in candidate.prediction.peak_memory_bytes)

    def _best(self, found: Sequence[Candidate]) -> Candidate:
        """Raises InputError or InfeasibleError where there is none."""
        if not found:
            raise InputError(
                f"--pin meshes={words(self._pins)}: what the stages chose does not go together at the cuts; try other "
                "meshes, or pin recompute, zero or sp"
            )
        best = min(found, key=self._rank)
        if self.chooser.is_kept(best):
            return best
        need, have = max(p.value for p in best.prediction.peak_memory_bytes), self.chooser.target.cluster.memory_bytes
        if need > have:
            raise InfeasibleError("memory", f"{format_bytes(need)} on one GPU", format_bytes(have))
        raise overdrawn_error(best, self.chooser.request.limits)


def words(pins: Pins) -> str:
    """The meshes as typed."""
    return "/".join(f"{dp}x{tp}" for dp, tp in pins.meshes)


def _by_devices(plans: Sequence[Decisions], num_blocks: int) -> Cuts:
    """Cuts that give every stage blocks in proportion to its devices, and at least one."""
    total, before = sum(plan.mesh.num_devices for plan in plans), 0
    found: list[int] = []
    for k, plan in enumerate(plans):
        least, most = (found[-1] + 1 if found else 0), num_blocks - (len(plans) - k)
        found.append(min(most, max(least, round(num_blocks * before / total))))
        before += plan.mesh.num_devices
    return tuple(found)


def _neighbours(cuts: Cuts, num_blocks: int) -> list[Cuts]:
    """One cut moved by one block."""
    found = []
    for k in range(1, len(cuts)):
        for moved in (cuts[k] - 1, cuts[k] + 1):
            new = (*cuts[:k], moved, *cuts[k + 1 :])
            if all(a < b for a, b in zip(new, (*new[1:], num_blocks), strict=True)):
                found.append(new)
    return found
