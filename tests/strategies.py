"""Hypothesis strategies shared by the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from autopar.ir.cost import ClockFigures, CostEdge, CostNode, CostTable, Crossing, Link
from autopar.ir.graph import Block, Op, OpGraph, Value
from autopar.ir.mesh import StageMesh
from autopar.ir.mixed import EDGE_FIGURES, NODE_FIGURES, MixedSource
from autopar.ir.tensor import TensorMeta

MAX_COMBINATIONS = 24


@dataclass(frozen=True)
class FakeDevice:
    memory_bytes: int
    num_gpus: int
    gpus_per_node: int = 2
    blocked_w: float = 50.0
    host_w_per_node: float = 30.0


@dataclass(frozen=True)
class FakeSource:
    """Random tables over a random chain of tied blocks; everything follows from `seed`.

    Node kinds: per class one or two ops and perhaps a hub that crosses to the next block; perhaps a parameter of the
    first block read by the last, and a shared op.
    """

    seed: int
    classes: tuple[int, ...]
    batch_size: int
    device: FakeDevice
    with_parameter: bool = False
    with_shared: bool = False
    forbid: float = 0.15
    reverse_labels: bool = False
    num_clocks: int = 1
    made: dict[tuple[tuple[int, ...], int], CostTable | None] = field(default_factory=dict, compare=False)

    @property
    def graph(self) -> OpGraph:
        blocks = tuple(Block(b, f"block{b}", b, b + 1, str(c)) for b, c in enumerate(self.classes))
        ops = tuple(Op(f"op{b}", "aten.add.Tensor", (), (f"op{b}",), (), block=b) for b in range(len(blocks)))
        meta = TensorMeta((self.batch_size,), "float32")
        values = {op.name: Value(op.name, meta, "op", True, op.name) for op in ops}
        return OpGraph("fake", ops, values, blocks, ops[-1].name, self.batch_size)

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return tuple(1e9 - 1e8 * clock for clock in range(self.num_clocks))

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        if self.batch_size % num_microbatches:
            return None
        key = (mesh.sizes, num_microbatches)
        if key not in self.made:
            self.made[key] = self._make(mesh, num_microbatches)
        return self.made[key]

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        table = self.table(mesh, num_microbatches)
        if table is None:
            return None
        made = [self._slowed(table, clock) for clock in range(self.num_clocks)]
        fields = ("forward_s", "backward_s", "microbatch_j")
        flat = [[np.concatenate([getattr(node, name) for node in t.nodes]) for t in made] for name in fields]
        return ClockFigures(*map(np.array, flat))

    def _slowed(self, table: CostTable, clock: int) -> CostTable:
        """Ops slower and thriftier by random factors that grow with the clock's index, forward and backward alike."""
        nodes = []
        for index, node in enumerate(table.nodes):
            rng = np.random.default_rng([self.seed, index])
            slow, thrifty = rng.random((2, len(node.choices)))
            times, joules = 1 + 0.5 * clock * slow, 1 / (1 + 0.5 * clock * thrifty)
            changed = replace(
                node,
                forward_s=node.forward_s * times,
                backward_s=node.backward_s * times,
                microbatch_j=node.microbatch_j * joules,
            )
            nodes.append(changed if node.kind == "op" else node)
        return replace(table, nodes=tuple(nodes))

    def _make(self, mesh: StageMesh, num_microbatches: int) -> CostTable:
        rng = np.random.default_rng([self.seed, *mesh.sizes, len(mesh.sizes), num_microbatches])
        scale = 1.0 / (mesh.num_devices**0.7 * num_microbatches)
        builder = _Builder(rng, scale, self.forbid)
        for kind in dict.fromkeys(self.classes):
            builder.add_class(kind, tuple(b for b, c in enumerate(self.classes) if c == kind))
        builder.join(self.classes)
        if self.with_parameter and len(self.classes) > 1:
            builder.add_parameter(self.classes)
        if self.with_shared:
            builder.add_shared(self.classes)
        labels = {"modelled": 3, "assumed": 1}
        return CostTable(
            mesh, num_microbatches, len(self.classes), tuple(builder.nodes), tuple(builder.edges),
            tuple(builder.crossings), 0.01, 1e-5, 1e-4,
            dict(reversed(labels.items())) if self.reverse_labels else labels,
        )  # fmt: skip


class _Builder:
    def __init__(self, rng: np.random.Generator, scale: float, forbid: float) -> None:
        self.rng, self.scale, self.forbid = rng, scale, forbid
        self.nodes: list[CostNode] = []
        self.edges: list[CostEdge] = []
        self.crossings: list[Crossing] = []
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.combinations = 1

    def node(self, kind: str, blocks: tuple[int, ...]) -> int:
        size = int(self.rng.integers(1, 4))
        size = size if self.combinations * size <= MAX_COMBINATIONS else 1
        self.combinations *= size
        index = len(self.nodes)
        prefix = "" if kind == "op" else f"{kind}:"
        draw, rng = lambda unit: self.scale * unit * self.rng.random(size), self.rng
        state = 1000.0 * rng.integers(0, 4, size)
        self.nodes.append(
            CostNode(
                f"{prefix}n{index}", kind, tuple(f"choice{p}" for p in range(size)), blocks,
                tuple(f"{prefix}n{index}.{b}" for b in blocks),
                draw(1.0), draw(2.0), 0.3 * rng.random(size), draw(40.0), 20 * rng.random(size),
                state, draw(3000.0), draw(800.0), draw(1000.0),
            )
        )  # fmt: skip
        return index

    def edge(self, source: int, target: int, pairs: tuple[tuple[int, int], ...]) -> None:
        shape = (len(self.nodes[source].choices), len(self.nodes[target].choices))
        tables = [self.scale * unit * self.rng.random(shape) * (self.rng.random(shape) < 0.7) for unit in (0.5, 0.5, 9)]
        forbidden = self.rng.random(shape) < self.forbid
        tables[0][forbidden] = tables[1][forbidden] = math.inf
        self.edges.append(CostEdge(source, target, tuple(b for _, b in pairs), pairs, *tables))

    def add_class(self, kind: int, blocks: tuple[int, ...]) -> None:
        chain = [self.node("op", blocks)]
        for _ in range(int(self.rng.integers(0, 2))):
            chain.append(self.node("op" if self.rng.random() < 0.5 else "hub", blocks))
            self.edge(chain[-2], chain[-1], tuple((b, b) for b in blocks))
        self.first[kind], self.last[kind] = chain[0], chain[-1]

    def join(self, classes: tuple[int, ...]) -> None:
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for b in range(1, len(classes)):
            pairs.setdefault((classes[b - 1], classes[b]), []).append((b - 1, b))
        for (a, c), found in pairs.items():
            self.edge(self.last[a], self.first[c], tuple(found))
        for b in range(len(classes) - 1):
            node = self.last[classes[b]]
            size = 2000 * self.scale * self.rng.random(len(self.nodes[node].choices))
            last = min(len(classes) - 1, b + int(self.rng.integers(1, 3)))
            self.crossings.append(Crossing(f"v{b}", node, b, last, size))

    def add_parameter(self, classes: tuple[int, ...]) -> None:
        param = self.node("param", (0,))
        self.edge(param, self.first[classes[0]], ((0, 0),))
        self.edge(param, self.last[classes[-1]], ((0, len(classes) - 1),))

    def add_shared(self, classes: tuple[int, ...]) -> None:
        shared = self.node("op", (-1,))
        other = self.node("op", (-1,))
        self.edge(shared, other, ((-1, -1),))
        kind = classes[-1]
        self.edge(other, self.first[kind], tuple((-1, b) for b, c in enumerate(classes) if c == kind))


@dataclass(frozen=True)
class ScaledSource:
    """A fake source on another type of device: every figure of time and energy times a random factor of its own."""

    base: FakeSource
    device: FakeDevice
    seed: int
    slow: float
    thrifty: float

    @property
    def graph(self) -> OpGraph:
        return self.base.graph

    @property
    def clocks_hz(self) -> tuple[float, ...]:
        return (1e9,)

    def clock_figures(self, mesh: StageMesh, num_microbatches: int) -> ClockFigures | None:
        raise AssertionError("a mixed cluster asks its parts for no other clocks")

    def table(self, mesh: StageMesh, num_microbatches: int) -> CostTable | None:
        table = self.base.table(mesh, num_microbatches)
        if table is None:
            return None
        rng = np.random.default_rng(self.seed)

        def scaled(entry: CostNode | CostEdge, names: tuple[str, ...]) -> Any:
            spread = {name: 0.7 + 0.6 * rng.random() for name in names}
            factors = {name: spread[name] * (self.thrifty if name.endswith("_j") else self.slow) for name in names}
            return replace(entry, **{name: getattr(entry, name) * factor for name, factor in factors.items()})

        return replace(
            table,
            nodes=tuple(scaled(node, NODE_FIGURES) for node in table.nodes),
            edges=tuple(scaled(edge, EDGE_FIGURES) for edge in table.edges),
            p2p_latency_s=table.p2p_latency_s * self.slow,
        )


@st.composite
def mixed_sources(draw: st.DrawFn, *, most_types: int = 2, memory: tuple[int, int] = (3_000, 40_000)) -> MixedSource:
    """Mixed clusters of one to three types of 1 to 3 devices each."""
    num_blocks = draw(st.integers(1, 3))
    classes = tuple(min(b, draw(st.integers(0, num_blocks - 1))) for b in range(num_blocks))
    base = FakeSource(
        seed=draw(st.integers(0, 10**6)),
        classes=classes,
        batch_size=draw(st.sampled_from([1, 2, 4])),
        device=FakeDevice(1, 1),
        with_parameter=draw(st.booleans()),
        with_shared=draw(st.booleans()),
        forbid=draw(st.sampled_from([0.0, 0.15])),
    )
    parts = tuple(
        ScaledSource(
            base,
            FakeDevice(
                draw(st.integers(*memory)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2])), 50.0 - 20 * i
            ),
            seed=i,
            slow=draw(st.sampled_from([1.0, 1.5, 4.0])),
            thrifty=draw(st.sampled_from([0.5, 1.0, 2.0])),
        )
        for i in range(draw(st.integers(1, most_types)))
    )
    link = Link(draw(st.sampled_from([0.01, 0.2])), 2e-5, 3e-4)
    links = {(a, b): link for a in range(len(parts)) for b in range(len(parts)) if a != b}
    return MixedSource(tuple(f"gpu{i}" for i in range(len(parts))), parts, links)


@st.composite
def fake_sources(draw: st.DrawFn, *, memory: tuple[int, int] = (3_000, 40_000)) -> FakeSource:
    """Random tied chains of 1 to 4 blocks on 1 to 4 devices, with memory from tight to loose."""
    num_blocks = draw(st.integers(1, 4))
    num_classes = draw(st.integers(1, num_blocks))
    classes = tuple(min(b, num_classes - 1) for b in range(num_blocks))
    if draw(st.booleans()):
        classes = tuple(reversed([num_classes - 1 - c for c in classes]))
    device = FakeDevice(draw(st.integers(*memory)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4])))
    return FakeSource(
        seed=draw(st.integers(0, 10**6)),
        classes=classes,
        batch_size=draw(st.sampled_from([1, 2, 3, 4])),
        device=device,
        with_parameter=draw(st.booleans()),
        with_shared=draw(st.booleans()),
        forbid=draw(st.sampled_from([0.0, 0.15, 0.4])),
        num_clocks=draw(st.sampled_from([1, 1, 3])),
    )
