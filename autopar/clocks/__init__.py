"""Clocks and power limits of boards: holding them while a run lasts, and restoring them whatever happens.

`hold` is the context that a run enters, `state` the file that outlives it, `guardian` the process that does, `restore`
what all of them call at the end. Imported by module, since the guardian is one that is run.
"""
