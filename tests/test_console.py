"""Numbers with units and nouns, as a person reads them."""

import pytest

from shards.console import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [(41200000, "", "41,200,000"), (1, "class", "1 class"), (0, "class", "0 classes"), (3400, "query", "3,400 queries"),
     (2, "process", "2 processes"), (1000, "shard", "1,000 shards")],
)  # fmt: skip
def test_counts_bear_their_noun_in_the_right_number(count: int, noun: str, words: str) -> None:
    assert format_count(count, noun) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.5, "1 min 0 s"), (3599.4, "59 min 59 s"),
     (3599.6, "1 h 0 min"), (26000, "7 h 13 min")],
)  # fmt: skip
def test_durations_are_rounded_once(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (66.6e6, "66.6 MB"), (2.5e15, "2500.0 TB")]
)
def test_bytes_have_decimal_units(count: float, words: str) -> None:
    assert format_bytes(count) == words
