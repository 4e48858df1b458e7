"""YAML as configuration: read in time and memory that follow its length, every key once."""

from collections import Counter
from typing import Any

import yaml

from fedkd_flwr.core.quoting import quoted

# A date or a number may be no date and no number; brackets may be nested deeper than Python calls.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
_MOST_REPEATED = 10_000
_CHARACTERS_OF_A_VALUE = 64
_LONGEST_NUMBER = 400


class UniqueKeys(yaml.SafeLoader):
    """The safe loader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, if no key stands twice in it."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := min((key for key, count in counts.items() if count > 1), default=""):
            raise ValueError(f"key {quoted(twice)} stands twice in one mapping")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, if Python can write it too: an error that quotes it, or a library that does, could not."""
        if (length := len(node.value)) > _LONGEST_NUMBER:
            raise ValueError(f"a whole number may have {_LONGEST_NUMBER} digits, got {length}")
        return int(super().construct_yaml_int(node))


UniqueKeys.add_constructor("tag:yaml.org,2002:int", UniqueKeys.construct_yaml_int)


def read_yaml(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: from anybody.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: if it is no YAML, if a key stands twice, or if aliases stand for
            more than 10,000 values, as they may where one holds others.
    """
    loader = UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        sizes: dict[int, int] = {}
        expanded = _expanded(node, sizes)
        if expanded - sum(_own_size(found) for found in _distinct(node)) > _MOST_REPEATED:
            raise ValueError(f"aliases (*name) stand for more than {_MOST_REPEATED} values; write fewer of them")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values that a node stands for, each alias counting as what it names.

    Raises:
        ValueError: if a node holds itself.
    """
    known = sizes.get(id(node))
    if known == 0:
        raise ValueError("an alias (*name) stands for something that holds it")
    if known is None:
        sizes[id(node)] = 0  # being counted
        sizes[id(node)] = known = _own_size(node) + sum(_expanded(part, sizes) for part in _parts(node))
    return known


def _distinct(node: yaml.Node) -> list[yaml.Node]:
    """Every node once."""
    found, waiting = {id(node): node}, [node]
    while waiting:
        for part in _parts(waiting.pop()):
            if id(part) not in found:
                found[id(part)] = part
                waiting.append(part)
    return list(found.values())


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _own_size(node: yaml.Node) -> int:
    """1, and more for a long text."""
    return 1 + (len(node.value) // _CHARACTERS_OF_A_VALUE if isinstance(node, yaml.ScalarNode) else 0)
