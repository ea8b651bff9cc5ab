"""The command `python -m experiments doctor`."""
