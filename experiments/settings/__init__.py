"""What a setting may be: YAML in, frozen objects out."""

from pydantic import VERSION

if tuple(map(int, VERSION.split(".")[:2])) < (2, 12):  # older ones ignore `exclude_if`: records would get other keys
    raise ValueError(f"pydantic must be at least 2.12, got {VERSION}: pip install --upgrade pydantic")
