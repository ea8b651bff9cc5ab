"""Inputs of the experiments: files found and checked, or generated."""
