"""Physics-informed networks, the second experiment of the paper."""
