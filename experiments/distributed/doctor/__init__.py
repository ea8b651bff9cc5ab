"""What `python -m experiments doctor` examines."""
