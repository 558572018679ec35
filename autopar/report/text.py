"""Text of a plan for the terminal: what was planned for, what was decided, what it should cost.

Every line fits into 80 columns. Figures come from the plan alone; with the graph, the report also says in words how
each class of blocks is sharded.
"""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from autopar.ir.graph import OpGraph
from autopar.ir.inference import MODE_OPTION, is_inference
from autopar.ir.passes import EACH_PASS, TURNS
from autopar.ir.pin_fields import pin_words
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.report.inference import rate_words
from autopar.report.sharding import describe_blocks
from autopar.units import format_bytes, format_joules, format_seconds, format_watts

WIDTH = 80
NAME_WIDTH = 12


def plan_report(plan: Plan, graph: OpGraph | None = None, path: str | None = None) -> str:
    """The whole report; `path` is where the plan was saved, for the closing hints."""
    parts = [_header(plan), _decision(plan), _figures(plan), _stage_table(plan)]
    if graph is not None:
        parts.append(describe_blocks(plan.decisions, graph))
    parts += [baseline_table(plan), _closing(plan), closing_hints(path) if path is not None else []]
    return "\n".join("\n".join(part) for part in parts if part)


def wrapped(name: str, text: str) -> list[str]:
    """`Name      text`, continued under the text when it is longer than the line."""
    lines = textwrap.wrap(text, WIDTH - NAME_WIDTH, break_on_hyphens=False) or [""]
    return [f"{name if i == 0 else '':<{NAME_WIDTH}}{line}".rstrip() for i, line in enumerate(lines)]


def table(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Columns as wide as their widest cell; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [gap.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def with_range(quantity: Quantity, show: Callable[[float], str]) -> str:
    """`12.3 ms (10.1 ms to 15.0 ms, modelled)`."""
    if quantity.low == quantity.high:
        return f"{show(quantity.value)} ({quantity.label})"
    return f"{show(quantity.value)} ({show(quantity.low)} to {show(quantity.high)}, {quantity.label})"


def mesh_words(plan: Plan) -> str:
    """`pp=2, dp=4, tp=1`; `pp=2, dp=2 tp=1 / dp=1 tp=2` where stages have meshes of their own."""
    decisions = plan.decisions
    each = [[f"{a.name}={a.size}" for a in m.axes if a.size > 1 or a.name in ("dp", "tp")] for m in decisions.meshes]
    axes = [" / ".join(map(" ".join, each))] if decisions.stage_meshes else each[0]
    return ", ".join([f"pp={decisions.num_ranks}{chunk_words(plan)}", *axes])


def rank_words(plan: Plan, stage: int) -> str:
    """Ranks of a stage, or of a chunk: `4-7`."""
    decisions, rank = plan.decisions, stage % plan.decisions.num_ranks
    first = decisions.first_gpu(rank)
    return span_words(first, first + decisions.meshes[rank].num_devices - 1)


def header_words(plan: Plan) -> list[tuple[str, str]]:
    """(name, words): model, devices, objective, limits; a name of "" continues the one before."""
    origin = {"flag": "as named", "detected": "found here", "default": "the default"}.get(plan.cluster.origin, "")
    options = sorted(option for option in plan.model.options.items() if option[0] != MODE_OPTION)
    model = plan.model.source + "".join(f" {key}={value}" for key, value in options)
    memory = format_bytes(plan.cluster.memory_bytes)
    gpus = f"up to {plan.cluster.num_gpus} x {plan.cluster.gpu} ({origin}), {plan.cluster.gpus_per_node} per node"
    if plan.cluster.description is not None:
        groups = plan.cluster.description.groups
        types = [f"{sum(g.nodes)} x {g.gpu} in {len(g.nodes)} node{'s' * (len(g.nodes) > 1)}" for g in groups]
        gpus, memory = f"up to {' + '.join(types)}", f"at most {memory}"
    found = [("Model", f"{model}, global batch {plan.model.batch_size}{', inference' if is_inference(plan) else ''}")]
    found.append(("Planned for", f"{gpus}, {memory} usable each"))
    if plan.cluster.origin != "flag" and plan.notes:
        found.append(("", plan.notes[0]))
    found.append(("Objective", objective_words(plan)))
    found += [] if plan.pinned is None else [("Pinned", pin_words(plan.pinned))]
    limits = limits_words(plan)
    return [*found, ("Limits", limits)] if limits else found


def _header(plan: Plan) -> list[str]:
    return [*(line for name, words in header_words(plan) for line in wrapped(name, words)), ""]


def limits_words(plan: Plan) -> str:
    """`deadline 2 s, average power 40 kW`; "" without limits."""
    shown: tuple[tuple[str, float | None, Callable[[float], str]], ...] = (
        ("deadline", plan.limits.deadline_s, format_seconds),
        ("energy", plan.limits.energy_j, format_joules),
        ("average power", plan.limits.average_power_w, format_watts),
        ("peak power", plan.limits.peak_power_w, format_watts),
    )
    return ", ".join(f"{name} {show(most)}" for name, most, show in shown if most is not None)


def objective_words(plan: Plan) -> str:
    """`energy: least energy per step`."""
    objective = plan.objective
    words = {"time": "least step time", "energy": "least energy per step", "edp": "least energy x time"}
    words |= {"time": "least latency of a batch", "energy": "least energy per batch"} if is_inference(plan) else {}
    if objective.kind in words:
        return f"{objective.kind}: {words[objective.kind]}"
    if objective.kind in ("cost", "carbon"):
        hour, kwh = objective.gpu_second_weight * 3600, objective.energy_weight * 3.6e6 / objective.pue
        unit = " g" if objective.kind == "carbon" else ""
        facility = f" x PUE {objective.pue:g}" if objective.pue != 1 else ""
        return f"{objective.kind}: {hour:g}{unit} x GPU-hours + {kwh:g}{unit} x kWh{facility}"
    return f"weighted: {objective.time_weight:g} x seconds + {objective.energy_weight:g} x joules"


def decision_words(plan: Plan) -> list[str]:
    """Phrases: devices and mesh, microbatches, recompute, types of GPU, clocks and waiting, parameters."""
    decisions = plan.decisions
    size = plan.model.batch_size // decisions.num_microbatches
    many = "" if decisions.num_microbatches == 1 else "es"
    recompute = Counter(stage.recompute for stage in decisions.stages)
    policies = ", ".join(f"{name} on {count} stage{'s' * (count > 1)}" for name, count in sorted(recompute.items()))
    return [
        f"{decisions.num_gpus} of {plan.cluster.num_gpus} GPUs: {mesh_words(plan)}",
        f"{decisions.num_microbatches} microbatch{many} of {size}, schedule {decisions.schedule}",
        *([] if is_inference(plan) else [f"recompute: {policies}"]),
        *passes_words(plan),
        *([f"offloaded: {decisions.offload.words}"] if decisions.offload else []),
        *_types(plan),
        *_clocks(plan),
        *(words for i in range(len(decisions.mesh.axes)) for words in _parameters_on_axis(plan, i)),
    ]


def passes_words(plan: Plan) -> list[str]:
    """What runs in passes (`ir.passes`), in a sentence; [] without any."""
    passes = plan.decisions.passes
    if passes is None:
        return []
    samples = plan.model.batch_size // plan.decisions.num_microbatches // passes.count
    whose = f"those of one rank of {passes.axis} in turn" if passes.order == TURNS else "a share of each rank's"
    how = "updated after each (approximate)" if passes.update == EACH_PASS else "gradients added up (exact)"
    where = f"blocks from {passes.block} on, behind the switch from data to tensor parallelism"
    return [f"{where}: {passes.count} passes of {samples} samples, {whose}; {how}"]


def _decision(plan: Plan) -> list[str]:
    lines = [wrapped("" if i else "Decision", words) for i, words in enumerate(decision_words(plan))]
    return [*(line for own in lines for line in own), ""]


def _types(plan: Plan) -> list[str]:
    """On a mixed cluster, which stages lie on which type."""
    width, first, found = plan.decisions.mesh.num_devices, 0, []
    for gpu, same in itertools.groupby(stage.gpu for stage in plan.decisions.stages):
        last = first + len(list(same)) - 1
        ranks = span_words(first * width, (last + 1) * width - 1)
        found += [f"stage {span_words(first, last)} (ranks {ranks}) on {gpu}"] if gpu else []
        first = last + 1
    return found


def _clocks(plan: Plan) -> list[str]:
    """Locked clocks and waiting, where there are any."""
    found = []
    clocks = Counter(stage.clock_hz for stage in plan.decisions.stages)
    if set(clocks) != {0.0}:
        words = ", ".join(
            f"{f'{hz / 1e6:.0f} MHz' if hz else 'the highest'} on {count} stage{'s' * (count > 1)}"
            for hz, count in sorted(clocks.items())
        )
        found.append(f"clocks locked at {words}")
    if plan.decisions.pace_s:
        found.append(f"steps begin {format_seconds(plan.decisions.pace_s)} apart, to keep the average power")
    return found


def _parameters_on_axis(plan: Plan, axis: int) -> list[str]:
    mesh_axis = plan.decisions.extent.axes[axis]
    if mesh_axis.size == 1:
        return []
    counts = Counter(strategy[axis].label for strategy in plan.decisions.parameters.values())
    words = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    return [f"parameters on {mesh_axis.name}: {words}"]


def _figures(plan: Plan) -> list[str]:
    predicted = plan.predicted
    naive = predicted.tdp_energy_j
    causes = ", ".join(f"{name} {format_joules(j)}" for name, j in sorted(predicted.energy_by_cause.items()))
    alone = is_inference(plan)
    name, per = ("Latency", "batch") if alone else ("Step time", "step")
    lines = wrapped(name, with_range(predicted.step_time_s, format_seconds) + (" of one batch" if alone else ""))
    lines += [line for words in rate_words(plan) for line in wrapped(*words)] if alone else []
    lines += wrapped("Energy", with_range(predicted.energy_j, format_joules) + f" per {per}")
    lines += wrapped("", causes)
    lines += wrapped("", f"the naive figure, TDP x time, would be {format_joules(naive)}")
    lines += wrapped("Power", "average " + with_range(predicted.average_power_w, format_watts))
    lines += wrapped("", "peak " + with_range(predicted.peak_power_w, format_watts))
    return [*lines, ""]


def chunk_words(plan: Plan) -> str:
    """` x 3 chunks` where the pipeline is interleaved."""
    return f" x {plan.decisions.interleave} chunks" if plan.decisions.interleave > 1 else ""


def _stage_table(plan: Plan) -> list[str]:
    name = "chunk" if plan.decisions.interleave > 1 else "stage"
    rows = [(name, "blocks", "ranks", "recompute", "forward", "backward", "per step", "peak memory")]
    for i, (stage, figures) in enumerate(zip(plan.decisions.stages, plan.predicted.stages, strict=True)):
        rows.append(
            (
                str(i),
                span_words(stage.start, stage.stop - 1),
                rank_words(plan, i),
                stage.recompute,
                format_seconds(figures.forward_s.value),
                format_seconds(figures.backward_s.value),
                format_seconds(figures.step_s.value),
                format_bytes(figures.peak_memory_bytes.value),
            )
        )
    shown = (0, 1, 2, 4, 7) if is_inference(plan) else range(len(rows[0]))
    worst = max(range(len(plan.predicted.stages)), key=lambda i: plan.predicted.stages[i].peak_memory_bytes.value)
    return [*table([[row[column] for column in shown] for row in rows]), *_memory_causes(plan, worst), ""]


def _memory_causes(plan: Plan, stage: int) -> list[str]:
    causes = plan.predicted.stages[stage].memory_by_cause
    words = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(causes.items()) if size > 0)
    lines = wrapped("Memory", f"of stage {stage}: {words}") if words else []
    outside = offloaded_words(plan, stage)
    return [*lines, *(wrapped("Offloaded", f"per GPU of stage {stage}: {outside}") if outside else [])]


def offloaded_words(plan: Plan, stage: int) -> str:
    """`activations 8 MiB to host, optimizer 48.05 MiB to disk (modelled)`; "" where nothing is offloaded."""
    offload, figures = plan.decisions.offload, plan.predicted.stages[stage]
    places = {"optimizer": offload.optimizer, "activations": offload.activations}
    parts = [
        f"{name} {format_bytes(size)} to {places[name]}" for name, size in sorted((figures.offloaded or {}).items())
    ]
    return f"{', '.join(parts)} ({figures.peak_memory_bytes.label})" if parts else ""


def baseline_table(plan: Plan) -> list[str]:
    """What well-known ways to split the model would cost on the same GPUs, beside the plan."""
    if not plan.baselines:
        return []
    time_s, energy_j = plan.predicted.step_time_s.value, plan.predicted.energy_j.value
    rows, remarks = [("", "GPUs", "step time", "energy", "memory", "time", "energy")], []
    for b in plan.baselines:
        if b.step_time_s is not None and b.energy_j is not None and b.peak_memory_bytes is not None:
            ratios = (f"x{b.step_time_s.value / time_s:.2f}", f"x{b.energy_j.value / energy_j:.2f}")
            shown = (format_seconds(b.step_time_s.value), format_joules(b.energy_j.value))
            rows.append((b.name, str(b.num_gpus), *shown, format_bytes(b.peak_memory_bytes.value), *ratios))
        if b.reason:
            remarks.append(f"  {b.name}: {b.reason}"[:WIDTH])
    heading = "Best of well-known ways to split, on the same GPUs (x: against the plan)"
    return [heading, *(table(rows) if len(rows) > 1 else []), *remarks, ""]


def _closing(plan: Plan) -> list[str]:
    lines = []
    if plan.rule_free_ops:
        words = ", ".join(f"{count} {target}" for target, count in plan.rule_free_ops.items())
        lines += wrapped("No rule", f"these ops have no sharding rule and are replicated: {words}")
    solver = plan.solver
    lines += wrapped("Search", f"{solver.status}, gap {solver.gap:.2%}: objective {solver.objective:.6g},")
    lines += wrapped("", f"bound {solver.bound:.6g}; {solver.name}, {solver.wall_s:.1f} s")
    total = sum(plan.predicted.sources.values())
    if total:
        shares = ", ".join(f"{n / total:.0%} {label}" for label, n in sorted(plan.predicted.sources.items()) if n)
        software = plan.software.name
        lines += wrapped("Prices", shares if software == "autopar" else f"{shares}; as {software} runs it")
    shown_first = plan.cluster.origin != "flag"
    lines += list(_notes(plan.notes[1:] if shown_first else plan.notes))
    return lines


def _notes(notes: Sequence[str]) -> Iterator[str]:
    for note in notes:
        yield from wrapped("Note", note)


def closing_hints(path: str) -> list[str]:
    """What to do next with the plan file."""
    commands = [f"autopar {verb} {path}" for verb in ("run", "verify", "explain")]
    return [
        "",
        *wrapped("Saved", path),
        *wrapped("Next", commands[0]),
        *(f"{'':<{NAME_WIDTH}}{c}" for c in commands[1:]),
    ]


def span_words(first: int, last: int) -> str:
    """`3` or `3-5`."""
    return str(first) if first == last else f"{first}-{last}"
