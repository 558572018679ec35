"""Hypothesis strategies for plans, and one hand-made plan of a tiny graph."""

from __future__ import annotations

from hypothesis import strategies as st

from autopar.ir.graph import Block, Op, OpGraph, Ref, Value
from autopar.ir.mesh import stage_mesh
from autopar.ir.placement import INVARIANT, PARTIAL, REPLICATE, shard
from autopar.ir.plan import (
    SCHEMA_VERSION,
    Baseline,
    ClusterReference,
    ModelReference,
    Plan,
    Prediction,
    SolverReport,
    StageFigures,
)
from autopar.ir.quantity import LABELS, Quantity
from autopar.ir.solution import OBJECTIVES, RECOMPUTE, STATUSES, Alternative, Decisions, Limits, Objective, StageChoice
from autopar.ir.strategy import PARAMETER_LABELS, AxisStrategy, ParameterAxisStrategy
from autopar.ir.tensor import TensorMeta
from autopar.ir.verify import limited_figures

finite = st.floats(min_value=0, max_value=1e30, allow_nan=False)
counts = st.integers(1, 10**6)
names = st.text(max_size=12)
labels = st.sampled_from(["replicate", "partial", "batch", "columns", "dim2", "a-b.c*"])
placements = st.sampled_from([INVARIANT, REPLICATE, PARTIAL, shard(0), shard(1), shard(11)])


@st.composite
def quantities(draw: st.DrawFn, unit: str) -> Quantity:
    low, value, high = sorted(draw(st.tuples(finite, finite, finite)))
    return Quantity(value, unit, draw(st.sampled_from(LABELS)), low, high)


@st.composite
def axis_strategies(draw: st.DrawFn, num_inputs: int, num_outputs: int) -> AxisStrategy:
    inputs = draw(st.tuples(*[placements] * num_inputs))
    outputs = draw(st.tuples(*[placements] * num_outputs))
    return AxisStrategy(draw(labels), inputs, outputs, draw(st.booleans()))


@st.composite
def op_strategies(draw: st.DrawFn, num_axes: int) -> tuple[AxisStrategy, ...]:
    arity = draw(st.tuples(st.integers(0, 3), st.integers(0, 2)))
    return tuple(draw(axis_strategies(*arity)) for _ in range(num_axes))


@st.composite
def parameter_strategies(draw: st.DrawFn, num_axes: int) -> tuple[ParameterAxisStrategy, ...]:
    one = st.builds(ParameterAxisStrategy, st.sampled_from(PARAMETER_LABELS), placements, placements, placements)
    return tuple(draw(one) for _ in range(num_axes))


@st.composite
def decisions(draw: st.DrawFn) -> Decisions:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    starts = [sum(widths[:i]) for i in range(len(widths))]
    recompute = [draw(st.sampled_from(RECOMPUTE)) for _ in widths]
    hub = st.tuples(*[placements] * len(sizes))
    return Decisions(
        mesh=stage_mesh(*sizes),
        num_microbatches=draw(st.sampled_from([1, 2, 4])),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        stages=tuple(
            StageChoice(s, s + w, r, draw(st.sampled_from([0.0, 1.2e9])))
            for s, w, r in zip(starts, widths, recompute, strict=True)
        ),
        ops=draw(st.dictionaries(names, op_strategies(len(sizes)), max_size=4)),
        hubs=draw(st.dictionaries(names, hub, max_size=3)),
        parameters=draw(st.dictionaries(names, parameter_strategies(len(sizes)), max_size=3)),
        pace_s=draw(finite),
    )


@st.composite
def predictions(draw: st.DrawFn, num_stages: int) -> Prediction:
    seconds, size = quantities("s"), quantities("B")
    causes = st.dictionaries(names, finite, max_size=3)
    stages = st.builds(StageFigures, seconds, seconds, seconds, size, causes)
    return Prediction(
        step_time_s=draw(seconds),
        energy_j=draw(quantities("J")),
        average_power_w=draw(quantities("W")),
        peak_power_w=draw(quantities("W")),
        peak_memory_bytes=tuple(draw(size) for _ in range(num_stages)),
        stages=tuple(draw(stages) for _ in range(num_stages)),
        energy_by_cause=draw(causes),
        tdp_energy_j=draw(finite),
        sources=draw(st.dictionaries(names, counts, max_size=3)),
    )


@st.composite
def limits(draw: st.DrawFn, predicted: Prediction) -> Limits:
    """Limits that the predicted figures keep."""
    figures = limited_figures(predicted)
    return Limits(**{name: draw(st.none() | st.just(2 * figure or 1.0)) for name, figure in figures.items()})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that are consistent in themselves, of any content."""
    chosen = draw(decisions())
    texts = st.dictionaries(names, names, max_size=3)
    maybe = st.none() | finite
    predicted = draw(predictions(len(chosen.stages)))
    figure = st.none() | quantities("s")
    baseline = st.builds(Baseline, names, names, st.integers(0, 9), figure, figure, figure, names)
    alternative = st.builds(Alternative, names, maybe, maybe, maybe, maybe, names)
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=ModelReference(draw(names), draw(texts), draw(names), chosen.num_microbatches * draw(counts)),
        cluster=ClusterReference(
            draw(names), chosen.num_gpus + draw(st.integers(0, 9)), draw(counts), draw(counts), draw(names), "flag"
        ),
        objective=Objective(draw(st.sampled_from(OBJECTIVES)), draw(finite), draw(finite), draw(finite)),
        limits=draw(limits(predicted)),
        decisions=chosen,
        predicted=predicted,
        solver=SolverReport(draw(st.sampled_from(STATUSES)), *draw(st.tuples(*[finite] * 4)), draw(names)),
        rule_free_ops=draw(st.dictionaries(names, counts, max_size=2)),
        baselines=tuple(draw(st.lists(baseline, max_size=2))),
        alternatives=tuple(draw(st.lists(alternative, max_size=3))),
        notes=tuple(draw(st.lists(names, max_size=3))),
        created=draw(texts),
    )


def tiny_graph(batch_size: int = 8) -> OpGraph:
    """x[b 4] -> linear(4 -> 6) -> sum: two blocks of one op each."""
    x, w = TensorMeta((batch_size, 4), "float32"), TensorMeta((6, 4), "float32")
    y, scalar = TensorMeta((batch_size, 6), "float32"), TensorMeta((), "float32")
    values = (
        Value("x", x, "input", False, "x", "x", 0),
        Value("w", w, "parameter", True, "w", "fc.weight"),
        Value("linear", y, "op", True, "linear"),
        Value("sum_1", scalar, "op", True, "sum_1"),
    )
    linear = Op(
        name="linear",
        target="aten.linear.default",
        inputs=("x", "w"),
        outputs=("linear",),
        args=(Ref(0), Ref(1)),
        module_path="fc",
        source="tiny.py:3",
        flops_forward=2 * batch_size * 24,
        saved=("x",),
        block=0,
    )
    total = Op("sum_1", "aten.sum.default", ("linear",), ("sum_1",), (Ref(0),), block=1)
    blocks = (Block(0, "fc", 0, 1, "a"), Block(1, "loss", 1, 2, "b"))
    return OpGraph("tiny", (linear, total), {v.name: v for v in values}, blocks, "sum_1", batch_size)


def tiny_plan() -> Plan:
    """A plan of `tiny_graph` on two stages of (dp=2, tp=1)."""
    batch = AxisStrategy("batch", (shard(0), REPLICATE), (shard(0),), True)
    whole = AxisStrategy("replicate", (INVARIANT, INVARIANT), (INVARIANT,), False)
    summed = AxisStrategy("batch", (shard(0),), (PARTIAL,), True)
    idle = AxisStrategy("replicate", (INVARIANT,), (INVARIANT,), False)
    replicated = ParameterAxisStrategy("replicated", INVARIANT, REPLICATE, INVARIANT)
    invariant = ParameterAxisStrategy("invariant", INVARIANT, INVARIANT, INVARIANT)

    def figure(value: float, unit: str) -> Quantity:
        return Quantity(value, unit, "modelled", 0.8 * value, 1.25 * value)

    stage = StageFigures(
        figure(0.001, "s"), figure(0.002, "s"), figure(0.0005, "s"), figure(2.0**30, "B"), {"parameters": 2.0**29}
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=ModelReference("tiny.py", {"layers": "1"}, "0" * 64, 8),
        cluster=ClusterReference("h100-sxm-80gb", 4, 8, 80 * 2**30, "1" * 64, "flag"),
        objective=Objective("energy"),
        limits=Limits(deadline_s=0.02),
        decisions=Decisions(
            mesh=stage_mesh(2, 1),
            num_microbatches=2,
            schedule="1f1b",
            stages=(StageChoice(0, 1, "none"), StageChoice(1, 2, "full")),
            ops={"linear": (batch, whole), "sum_1": (summed, idle)},
            hubs={},
            parameters={"w": (replicated, invariant)},
        ),
        predicted=Prediction(
            step_time_s=figure(0.01, "s"),
            energy_j=figure(12.5, "J"),
            average_power_w=figure(1250, "W"),
            peak_power_w=figure(1500, "W"),
            peak_memory_bytes=(figure(2.0**30, "B"), figure(2.0**30, "B")),
            stages=(stage, stage),
            energy_by_cause={"blocked": 4.0, "dynamic": 8.0, "host": 0.5},
            tdp_energy_j=28.0,
            sources={"modelled": 9, "measured": 1},
        ),
        solver=SolverReport("optimal", 12.4, 12.39, 0.0008, 1.25, "highs"),
        rule_free_ops={"aten.sort.default": 2},
        baselines=(
            Baseline("data parallel", "dp=4", 4, figure(0.012, "s"), figure(13.5, "J"), figure(2.0**30, "B"), ""),
            Baseline("fsdp", "", 0, None, None, None, "does not fit: needs 90 GiB of 80 GiB"),
        ),
        alternatives=(
            Alternative("pp=1 dp=4 tp=1 m=1", 0.011, 13.0, 13.0, 12.9, "4.8 % worse"),
            Alternative("pp=1 dp=1 tp=4 m=1", None, None, None, None, "memory"),
        ),
        notes=("priced with the optimizer adamw",),
        created={"date": "2026-01-01T00:00:00+00:00", "autopar": "0.1.0"},
    )
