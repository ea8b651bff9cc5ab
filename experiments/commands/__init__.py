"""The commands of `python -m experiments`, a file each: a command's module is imported when the command runs."""
