"""YAML as recipes have it: a tree of plain values, of bounded size, each key once.

What is none is a MarkedYAMLError that says where. PyYAML itself leaves other exceptions to its caller (a date that there is not,
a number of 5,000 digits), takes the last of two equal keys, and builds what a few aliases multiply to.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from sd3core.shown_text import shortened

LARGEST = 300_000  # characters; a recipe has some 3,000
MOST_VALUES = 50_000  # with those that aliases repeat
DEEPEST = 40  # levels; PyYAML's time grows with their square
SHOWN_LINE_CHARS = 60


def parse_yaml(text: str) -> Any:
    """The value. Raises yaml.YAMLError."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"{len(text):,} characters, at most {LARGEST:,} are read")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def yaml_text(text: str) -> str:
    """The text as a quoted YAML string: any characters of any plane, which JSON's escapes do not have alone."""
    return yaml.safe_dump(text, default_style='"', width=2**31).strip()


class _Loader(yaml.SafeLoader):
    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, levels: int) -> None:
        if levels > DEEPEST:
            raise ScannerError(None, None, f"nested deeper than {DEEPEST} levels", self.get_mark())

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _wrong(f"the key {_shown(key)} stands twice; keep one of them", key)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
            kind = node.tag.rpartition(":")[2]
            raise _wrong(f"{_shown(node)} is no {kind}; put it in quotes if it is text", node) from None
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise _wrong(f"{_shown(node)} is larger than a number of 64 bits", node)
        return value


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values there are once every alias is written out."""
    if id(node) not in known:
        known[id(node)] = None  # being counted
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts if isinstance(part, yaml.Node))
    count = known[id(node)]
    if count is None:
        raise _wrong("an alias stands within what it names", node)
    if count > MOST_VALUES:
        raise _wrong(f"more than {MOST_VALUES:,} values, with those that aliases repeat", node)
    return count


def _shown(node: yaml.Node) -> str:
    return repr(shortened(str(node.value), SHOWN_LINE_CHARS)) if isinstance(node, yaml.ScalarNode) else "this"


def _wrong(problem: str, node: yaml.Node) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)
