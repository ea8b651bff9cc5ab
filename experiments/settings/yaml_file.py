"""Reads YAML: the one loader of configurations, of `--set` and of site files. It imports neither torch nor numpy.

Scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), which reads them as a person
does: 008 is 8, 1e-3 is a number, and yes, 1:30, 1_000 and 2026-01-31 are texts. A repeated key is refused, and so is a
key with nothing after it, because nobody can tell whether a section without its settings is meant to count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe loader with the scalars of YAML 1.2, and `<<` for merging mappings."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses what stands in the text; later on, keys that were merged in would look repeated."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = f"line {key.start_mark.line + 1}"
            name = self.construct_object(key) if key.tag != "tag:yaml.org,2002:merge" else "<<"
            if name in seen:
                raise ValueError(f"key {key.value!r} stands twice in one mapping ({line})")
            seen.add(name)
            if isinstance(value, yaml.ScalarNode) and value.value == "" and value.style is None:
                raise ValueError(
                    f"nothing stands after the key {key.value!r} ({line}): write {{}} for a section with its default "
                    "settings, or null for no value, or leave the key out"
                )
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what the loader above reads: texts that it takes for numbers get quotes, and nothing is an alias."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
    return int(node.value, base)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(text.replace(".", "") if text.endswith(("inf", "nan")) else text)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping of settings in a YAML file.

    Raises:
        ValueError: the file is not valid YAML, holds no mapping, repeats a key, or has nothing after a key.
        OSError: the file cannot be read.
    """
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {raw!r}")
    return raw


def parse_yaml(text: str) -> Any:
    """Reads YAML; yaml.YAMLError if it is invalid, ValueError for a key that is repeated or has no value."""
    return yaml.load(text, _Loader)


def parse_setting(text: str) -> Any:
    """Reads one value from a text, as that of a `--set`; ValueError if it is empty or `parse_yaml` refuses it."""
    if not text.strip():
        raise ValueError("a value is missing: write null for no value, or {} for a section with its default settings")
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a YAML value") from None


def to_yaml(settings: Mapping[str, Any]) -> str:
    """The text of a mapping, which `parse_yaml` reads back; its order stays, and tuples become lists."""
    return yaml.dump(_as_lists(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_lists(entry) for key, entry in value.items()}
    return [_as_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value
