"""Cost networks with liveness rows at contest size: preprocessing, bounds, solutions. Entry: `solve`."""
