"""Which paths carry a batch, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from mptunnel.scheduler import Redundant


@dataclass
class Carrier:
    room: int | None


CARRIERS = st.lists(st.builds(Carrier, st.none() | st.integers(0, 30_000)), max_size=8)


def test_every_path_without_a_limit_gets_everything() -> None:
    carriers = [Carrier(None), Carrier(None), Carrier(None)]
    assert Redundant().choose(64, 1452, carriers) == [(carrier, 64) for carrier in carriers]


def test_a_path_with_little_room_gets_the_head_of_the_batch() -> None:
    fast, slow, full = Carrier(None), Carrier(3 * 1452 + 1451), Carrier(1451)
    assert Redundant().choose(10, 1452, [slow, fast, full]) == [(slow, 3), (fast, 10)]


def test_where_no_path_has_room_for_all_the_first_gets_all() -> None:
    first, second = Carrier(0), Carrier(2 * 1452)
    assert Redundant().choose(5, 1452, [first, second]) == [(first, 5), (second, 2)]
    assert Redundant().choose(5, 1452, [second, first]) == [(second, 5)]


def test_without_paths_nothing_is_chosen() -> None:
    assert Redundant().choose(5, 1452, []) == []


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(32, 1500), CARRIERS)
def test_everything_goes_whole_to_one_path_at_least_and_nobody_is_asked_twice(
    count: int, size: int, carriers: list[Carrier]
) -> None:
    chosen = Redundant().choose(count, size, carriers)
    assert bool(chosen) == bool(carriers)
    assert all(0 < given <= count for _, given in chosen)
    assert len({id(carrier) for carrier, _ in chosen}) == len(chosen)
    if carriers:
        assert max(given for _, given in chosen) == count
    over = [carrier for carrier, given in chosen if carrier.room is not None and given * size > carrier.room]
    assert all(carrier is carriers[0] for carrier in over)
