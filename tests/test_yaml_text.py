"""Configurations of strangers: read in time that follows their length, or refused."""

import time

import pytest
import yaml

from fedkd_flwr.yaml_text import YAML_ERRORS, UniqueKeys, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_what_is_written_once_is_read() -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nlist: [*base, *base]\n"
    base = {"a": 1, "b": 2}
    assert read_yaml(text) == {"base": base, "other": {"a": 1, "b": 3}, "list": [base, base]}
    assert read_yaml("") is None


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a {x: 1}\n" + BOMB.replace("[", "{<<: [").replace("]", "]}").split("\n", 1)[1],
        "text: &t " + 10_000 * "long " + "\nlist: [" + ", ".join(["*t"] * 20) + "]",
    ],
    ids=["lists", "merged mappings", "long texts"],
)
def test_aliases_that_stand_for_very_many_values_are_refused(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match="aliases"):
        read_yaml(text)
    assert time.perf_counter() - started < 2


def test_what_holds_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="holds it"):
        read_yaml("a: &a [1, *a]")


class Counted(str):
    """A text that counts how often one is compared."""

    __slots__ = ()
    times = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.times += 1
        return str.__eq__(self, other)


def test_each_of_many_keys_is_compared_with_few() -> None:
    count = 2000
    tag = "tag:yaml.org,2002:str"
    keys = [yaml.ScalarNode(tag, Counted(f"key_{n}")) for n in range(count)]
    node = yaml.MappingNode("tag:yaml.org,2002:map", [(key, yaml.ScalarNode(tag, "")) for key in keys])
    Counted.times = 0
    assert len(UniqueKeys("").construct_mapping(node)) == count
    assert Counted.times < 20 * count


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "{b: {c: 1, c: 1}}", "[" * 1200, "? [1, 2]\n: 3", "? {a: 1}\n: 3", "9" * 401, "0x" + "f" * 10_000],
)
def test_what_is_no_configuration_is_an_error_of_a_known_kind(text: str) -> None:
    with pytest.raises(YAML_ERRORS):
        read_yaml(text)
