"""Contiguous partition of a branching graph over accelerators and CPUs with the smallest largest load.

`problem` (what is asked, and what an answer costs), `contract` (colour classes, cycles, free leaves), `ideals`
(down-sets and the load of the difference of two), `dynamic` (the exact dynamic program), `general` (CP-SAT for graphs
with too many down-sets), `solve` (the entry).
"""

from autopar.search.partition.problem import PartitionEdge, PartitionNode, PartitionProblem, PartitionResult, Share
from autopar.search.partition.solve import partition_graph

__all__ = ["PartitionEdge", "PartitionNode", "PartitionProblem", "PartitionResult", "Share", "partition_graph"]
