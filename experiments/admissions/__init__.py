"""Graduate admissions, the first experiment of the paper."""
