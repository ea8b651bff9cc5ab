"""A labeled set of fractals for machines without ImageNet."""
