"""Command line: `autopar plan|run|verify|explain|gpus|profile`. `main` is the entry point."""

from autopar.cli.app import main

__all__ = ["main"]
