"""YAML that holds what JSON could: words, numbers, lists and mappings, of a size that its text shows."""

from typing import Any, Final

import yaml

_MOST_VALUES: Final = 10_000
"""Keys, values, lists and mappings; what an alias stands for counts wherever the alias stands."""
_DEEPEST: Final = 32
_LONGEST_NUMBER: Final = 40
_TAG: Final = "tag:yaml.org,2002:"
_KINDS: Final = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


def parse_yaml(text: str) -> Any:
    """Parse a document of words, numbers (finite or not), truth values, nulls, lists and mappings.

    Raises:
        ValueError: it is not YAML, or nested too deep; it holds itself or too many values; a mapping names a key twice
            or has one that is no word; a value is a date or has a tag.

    """
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


class _PlainLoader(yaml.SafeLoader):
    """Refuses while it composes, before anything is built: aliases are a way to say much with little text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("it is nested too deep")
        before = self._values
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not is_alias:
            _check(node)
            self._sizes[node] = self._values + 1 - before
        elif node not in self._sizes:
            raise _refused(node, "it holds itself")
        self._values = before + self._sizes[node]
        if self._values > _MOST_VALUES:
            raise _refused(node, f"it holds more than {_MOST_VALUES} values")
        return node


def _check(node: yaml.Node) -> None:
    kind = node.tag.removeprefix(_TAG)
    if node.tag not in _KINDS:
        raise _refused(node, "a date is not taken; put it in quotes" if kind == "timestamp" else f"no {kind} is taken")
    if kind in ("int", "float") and len(node.value) > _LONGEST_NUMBER:
        raise _refused(node, f"a number has more than {_LONGEST_NUMBER} characters")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                raise _refused(key, "a key is no word; put it in quotes")
            if key.value in seen:
                raise _refused(key, f"it names {key.value!r} twice")
            seen.add(key.value)


def _refused(node: yaml.Node, why: str) -> ValueError:
    return ValueError(f"line {node.start_mark.line + 1}: {why}")
