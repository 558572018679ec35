"""autopar: plans, prices and runs the parallelisation of a PyTorch model."""

__all__: list[str] = []
