"""Plain YAML: mappings with text as keys, lists, text, numbers, true, false and null. What else YAML has is refused.

An alias can make a few bytes millions of values, a tag names a type that is not one of these, the second of two equal
keys would silently win, and deep nesting exhausts the stack. Dates, times of day and numbers that begin with 0 are
text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1
_OLD_NUMBER = re.compile(r"[-+]?(?:[0-9_]+:[0-9_:.]+|0[0-7_]+)")
"""What YAML 1.1 reads as a number of base 60 or 8, and hardly anybody means: `1:30`, `010`."""


class Unsupported(yaml.MarkedYAMLError):
    """YAML that is not plain. `problem` says what was found, `note` how to fix it."""


class _Loader(yaml.SafeLoader):
    depth = 0

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> Any:
        is_text = kind is yaml.ScalarNode and value is not None and _OLD_NUMBER.fullmatch(value)
        return "tag:yaml.org,2002:str" if is_text else super().resolve(kind, value, implicit)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:  # an alias refers to one
            _refuse("an alias or anchor", event.start_mark, "write the value out")
        if getattr(event, "tag", None) is not None:
            _refuse("a tag", event.start_mark, "remove the tag, or quote the value")
        if self.depth == MAX_DEPTH:
            _refuse(f"more than {MAX_DEPTH} levels", event.start_mark, "nest less deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                _refuse("a key that is not text", key.start_mark, "quote the key")
            if name in seen:
                _refuse(f"the key {name[:60]!r} twice", key.start_mark, "remove one")
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        try:
            value = self.construct_yaml_int(node)
        except ValueError:  # such as 0x_, or more digits than Python reads
            value = None
        if value is None or abs(value) > MAX_INTEGER:
            _refuse("a number that is not one or is too large", node.start_mark, "correct it, or quote it as text")
        return value

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            _refuse("an escape that is no letter", node.start_mark, "correct it")
        return self.construct_yaml_str(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] in ("bool", "float", "int", "null")  # neither dates nor merge keys
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _refuse(what: str, mark: yaml.Mark, fix: str) -> None:
    raise Unsupported(problem=what, problem_mark=mark, note=fix)


def read(text: str) -> Any:
    """The value that `text` holds; None for an empty text.

    Raises:
        yaml.YAMLError: for what is not YAML, with its place as `problem_mark` where there is one. `Unsupported` for
            what is not plain.
    """
    return yaml.load(text, _Loader)
