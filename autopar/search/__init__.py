"""Search: which strategies, stages, microbatches and devices minimise the objective over given cost tables.

Read in this order: `evaluate` (what a choice costs), `brute` (the oracle), `problem` and `reduce` (pairwise networks
and their exact elimination), `cuts` (stages of given shardings), `bounds` (multipliers), `ilp` and `solver` (HiGHS),
`space` and `stages` (skeletons: mesh, stages, microbatches), `solve` (the entry).
"""
