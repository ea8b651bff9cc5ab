"""What a setting may be: YAML in, frozen objects out."""
