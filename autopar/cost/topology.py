"""Topology of the links inside a node: which share of a GPU's bandwidth a group can use.

A switch gives every group all of it. Without a switch the rings of a collective must follow the links between its
members, so that small or scattered groups use few of them:

- `nvlink-mesh`: the hybrid cube mesh of eight V100 (DGX-1 and servers like it): six links per GPU, one or two between
  neighbours. A collective runs on as many rings as the members' links hold without sharing one; where there is no ring
  it runs on a chain. `nvlink-mesh-paired` is the same mesh with GPUs numbered so that 2k and 2k + 1 share two links.
- `xgmi-mesh`: one link between any two GPUs: n members have n - 1 of a GPU's links.

Groups of an axis run at once; the slowest of them is the one that counts. Checked against all_reduce sweeps of 2 to 8
V100 (VIA-Research/vTrain), whose bus bandwidths are 1, 2, 4, 2 and 6 links for 2, 3, 4, 6 and 8 GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise, permutations

MESH_GPUS = 8
LINKS_PER_GPU = 6
INDIRECT_LINKS = 0.33
"""Two GPUs without a link reach each other through the host: PCIe 3.0 as a share of an NVLink of the second kind."""

Edge = tuple[int, int]
_QUAD: Mapping[Edge, int] = {(0, 1): 1, (0, 2): 1, (0, 3): 2, (1, 2): 2, (1, 3): 1, (2, 3): 2}
_OTHER_QUAD: Mapping[Edge, int] = {(4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2}
_BETWEEN: Mapping[Edge, int] = {(0, 4): 2, (1, 5): 2, (2, 6): 1, (3, 7): 1}
CUBE_MESH: Mapping[Edge, int] = {**_QUAD, **_OTHER_QUAD, **_BETWEEN}
"""Links between two GPUs of a DGX-1 with V100, as its driver numbers them."""
NUMBERING: Mapping[str, tuple[int, ...]] = {
    "nvlink-mesh": (0, 1, 2, 3, 4, 5, 6, 7),
    "nvlink-mesh-paired": (0, 3, 1, 2, 4, 7, 5, 6),
}


def ring_share(topology: str, size: int, stride: int, gpus_per_node: int) -> float:
    """Share of a GPU's bandwidth that rings of `size` >= 2 members of a node, `stride` apart, can use."""
    if topology == "xgmi-mesh":
        return min(1.0, (size - 1) / max(1, gpus_per_node - 1))
    if not _is_cube_mesh(topology, gpus_per_node):
        return 1.0
    numbering = NUMBERING[topology]
    placed = [tuple(sorted(numbering[m] for m in members)) for members in _groups(size, stride, gpus_per_node)]
    return min(_ring_links(members) for members in placed) / LINKS_PER_GPU


def pair_share(topology: str, size: int, stride: int, gpus_per_node: int) -> float:
    """The same where every member sends an equal part to every other: the pair with the fewest links is the last."""
    if not _is_cube_mesh(topology, gpus_per_node):
        return ring_share(topology, size, stride, gpus_per_node)
    numbering = NUMBERING[topology]
    fewest = min(
        _links(numbering[a], numbering[b])
        for members in _groups(size, stride, gpus_per_node)
        for a in members
        for b in members
        if a < b
    )
    return min(1.0, (size - 1) * (fewest or INDIRECT_LINKS) / LINKS_PER_GPU)


def send_share(topology: str, gpus_per_node: int) -> float:
    """The same for one GPU sending to one other: a single link without a switch."""
    if topology == "xgmi-mesh":
        return 1 / max(1, gpus_per_node - 1)
    return 1 / LINKS_PER_GPU if _is_cube_mesh(topology, gpus_per_node) else 1.0


def _is_cube_mesh(topology: str, gpus_per_node: int) -> bool:
    return topology in NUMBERING and gpus_per_node <= MESH_GPUS


def _groups(size: int, stride: int, gpus_per_node: int) -> Iterator[tuple[int, ...]]:
    """Members of every group of a node; of the first block alone where blocks do not fill the node."""
    block = size * stride
    last = gpus_per_node if gpus_per_node % block == 0 else 1
    for base in range(0, last, block):
        for offset in range(stride):
            yield tuple(base + offset + i * stride for i in range(size))


def _links(one: int, other: int) -> int:
    return CUBE_MESH.get((min(one, other), max(one, other)), 0)


@lru_cache(maxsize=256)
def _ring_links(members: tuple[int, ...]) -> float:
    """Links of one GPU that carry a collective: one per ring and direction; without a ring, what a chain is worth."""
    if len(members) == 2:
        return _links(*members) or INDIRECT_LINKS
    rings = [ring for ring in _rings(members) if all(_links(*edge) for edge in ring)]
    packed = _most_disjoint(rings, dict(CUBE_MESH))
    # A chain moves 2 bytes per byte of an all_reduce over its busiest link and direction: one up, one down.
    return 2 * packed if packed else 2 * (len(members) - 1) / len(members)


def _rings(members: tuple[int, ...]) -> Iterator[tuple[Edge, ...]]:
    """Every ring through all members once, as sorted pairs."""
    first, *rest = members
    for order in permutations(rest):
        if order[0] < order[-1]:
            stops = (first, *order, first)
            yield tuple((min(a, b), max(a, b)) for a, b in pairwise(stops))


def _most_disjoint(rings: list[tuple[Edge, ...]], free: dict[Edge, int]) -> int:
    """Most rings that fit into the free links, by trying all; few rings of a mesh exist."""
    best = 0
    for i, ring in enumerate(rings):
        if all(free[edge] for edge in ring):
            left = {edge: count - (edge in ring) for edge, count in free.items()}
            best = max(best, 1 + _most_disjoint(rings[i:], left))
    return best
