"""planner: the only package that composes the stages: capture, cost, search, rewrite, runtime."""
