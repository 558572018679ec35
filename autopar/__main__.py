"""`python -m autopar`, and so `torchrun --nproc-per-node 2 -m autopar run plan.json`."""

from autopar.cli import main

main()
