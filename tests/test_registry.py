"""Names to values: order, wildcards, duplicates, and errors that list close names."""

from __future__ import annotations

import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.registry import Registry


@pytest.fixture
def fruit() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    for number, name in enumerate(("pear", "apple", "pineapple", "quince")):
        registry.register(name)(number)
    return registry


def test_entries_keep_the_order_of_registration(fruit: Registry[int]) -> None:
    assert list(fruit) == fruit.list() == ["pear", "apple", "pineapple", "quince"]
    assert len(fruit) == 4
    assert [fruit.get(name) for name in fruit] == [0, 1, 2, 3]


def test_listing_takes_wildcards(fruit: Registry[int]) -> None:
    assert fruit.list("*apple") == ["apple", "pineapple"]
    assert fruit.list("nothing*") == []
    assert fruit.list("APPLE") == []


def test_membership_is_by_name(fruit: Registry[int]) -> None:
    assert "pear" in fruit
    assert 0 not in fruit
    assert "plum" not in fruit


def test_register_returns_what_it_decorates() -> None:
    registry: Registry[type] = Registry("class")

    @registry.register("thing")
    class Thing:
        pass

    assert registry.get("thing") is Thing


def test_a_name_is_registered_once(fruit: Registry[int]) -> None:
    with pytest.raises(KeyError, match="fruit 'pear' is registered twice"):
        fruit.register("pear")(9)
    assert fruit.get("pear") == 0


def test_unknown_name_lists_the_close_ones_first_and_of_many_only_these(fruit: Registry[int]) -> None:
    with pytest.raises(UsageError, match=r"unknown fruit: expected one of apple, .*quince, got 'aple'"):
        fruit.get("aple")
    for number in range(20):
        fruit.register(f"melon {number}")(number)
    with pytest.raises(UsageError, match=r"expected a registered fruit, closest apple, pineapple, pear, got 'aple'"):
        fruit.get("aple")


def test_name_like_no_other_lists_them_all(fruit: Registry[int]) -> None:
    with pytest.raises(UsageError, match="expected one of pear, apple, pineapple, quince, got 'xyz'"):
        fruit.get("xyz")


def test_empty_registry_still_gives_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected a registered fruit, got 'pear'"):
        Registry("fruit").get("pear")


@pytest.mark.parametrize("kind", ["model", "attack", "dataset"])
def test_error_names_the_command_that_lists_public_kinds(kind: str) -> None:
    with pytest.raises(UsageError, match=f"robustbench-deq {kind}s"):
        Registry(kind).get("x")


def test_a_prefix_resolves_what_no_listing_holds() -> None:
    registry: Registry[str] = Registry("thing")
    registry.register("plain")("plain")

    def get(name: str) -> str:
        if name not in ("a", "b"):
            raise UsageError(f"no {name}")
        return name.upper()

    registry.register_prefix("far", get, lambda: ["a", "b"])
    assert registry.get("far:a") == "A" and registry.prefixed() == {"far": ["a", "b"]}
    assert list(registry) == registry.list() == ["plain"] and "far:a" not in registry
    with pytest.raises(UsageError, match="no c"):
        registry.get("far:c")
    for name in ("far:", "far", "near:a"):
        with pytest.raises(UsageError, match="unknown thing: expected one of plain"):
            registry.get(name)
