"""Every stop policy, one file each. Importing this package registers them."""

from engine.speculation.policies import confidence, heuristic, static

__all__ = ["confidence", "heuristic", "static"]
