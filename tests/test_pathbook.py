"""What is kept of paths: settings, and what metered ones have carried, whatever the clock says."""

from __future__ import annotations

import pytest

from mptunnel.errors import ConfigError
from mptunnel.messages import Use
from mptunnel.pathbook import BELIEF, SAVE_BYTES, SAVE_LATEST, SAVE_SPACING, PathBook, parse_limit, parse_priority


def metered(reset_day: int = 10, today: tuple[int, int, int] = (2027, 3, 15)) -> PathBook:
    book = PathBook()
    book.today_is(*today, 0.0)
    book.meter("wwan0", "wwan0", 1000, reset_day)
    book.carried("wwan0", "wwan0", 400)
    return book


def later(book: PathBook, *today: int, since: float = 1000.0) -> int:
    """Let the clock show a date for long enough, and return what has been used."""
    year, month, day = today
    for after in (0.0, BELIEF - 1.0, BELIEF):
        book.today_is(year, month, day, since + after)
    return book.used("wwan0")


def test_a_month_is_spent_when_its_limit_is_reached() -> None:
    book = metered()
    assert not book.is_spent("wwan0", "wwan0")
    book.carried("wwan0", "wwan0", 600)
    assert book.is_spent("wwan0", "wwan0")
    assert not book.is_spent("wan1", "wan1")
    book.carried("wan1", "wan1", 10**12)
    assert book.used("wan1") == 0


@pytest.mark.parametrize(
    ("today", "used"),
    [
        ((2027, 3, 31), 400),
        ((2027, 4, 9), 400),
        ((2027, 4, 10), 0),
        ((2027, 5, 1), 0),
        ((2028, 1, 1), 0),
        ((2027, 3, 9), 400),
        ((2026, 12, 31), 400),
        ((1970, 1, 1), 400),
    ],
)
def test_a_month_begins_on_its_day_and_never_goes_back(today: tuple[int, int, int], used: int) -> None:
    assert later(metered(), *today) == used


def test_a_new_month_counts_only_after_the_clock_has_shown_it_for_ten_minutes() -> None:
    book = metered()
    book.today_is(2040, 1, 1, 100.0)
    book.today_is(2040, 1, 1, 100.0 + BELIEF - 1.0)
    book.today_is(2027, 3, 15, 100.0 + BELIEF)
    book.today_is(2040, 1, 1, 101.0 + BELIEF)
    book.today_is(2040, 1, 1, 99.0 + 2 * BELIEF)
    assert book.used("wwan0") == 400
    book.today_is(2040, 1, 1, 101.0 + 2 * BELIEF)
    assert book.used("wwan0") == 0


def test_a_clock_that_was_ahead_does_not_keep_a_month_for_years() -> None:
    book = metered(today=(2040, 1, 15))
    book.carried("wwan0", "wwan0", 600)
    assert later(book, 2027, 3, 15) == 1000, "nothing is forgotten"
    assert book.is_spent("wwan0", "wwan0")
    assert later(book, 2027, 4, 15, since=5000.0) == 0


def test_a_month_is_believed_by_runs_that_are_shorter_than_that() -> None:
    book = metered()
    for used in (400, 0):
        book = PathBook.from_document(book.to_document())
        book.today_is(2027, 4, 15, 0.0)
        assert book.used("wwan0") == used
        assert book.wants_saving(SAVE_SPACING)
    book, saved = PathBook.from_document(metered().to_document()), metered().to_document()
    for after, day in enumerate(((2040, 1, 1), (2027, 3, 20))):  # a clock that is wrong at each boot, until it is set
        book.today_is(*day, SAVE_SPACING * after)
        if book.wants_saving(SAVE_SPACING * after):
            saved = book.to_document()
            book.saved(SAVE_SPACING * after)
    book = PathBook.from_document(saved)
    book.today_is(2040, 1, 1, 0.0)
    assert book.used("wwan0") == 400


def test_what_was_carried_before_the_clock_was_set_belongs_to_the_month_that_it_then_shows() -> None:
    book = metered(today=(1970, 1, 1))
    book.today_is(2027, 3, 15, 30.0)
    assert book.used("wwan0") == 400
    assert later(book, 2027, 4, 12) == 0


def test_another_reset_day_keeps_what_was_carried_and_holds_from_then_on() -> None:
    book = metered(reset_day=1)
    book.meter("wwan0", "wwan0", 1000, 20)
    assert later(book, 2027, 3, 19) == 400
    assert later(book, 2027, 3, 20, since=9000.0) == 0


def test_all_of_it_comes_back_from_the_disk() -> None:
    book = metered()
    book.change("wwan0").label = "van"
    book.change("wan1").use = Use.STANDBY
    book.change("usb0").is_added = True
    book.taken_off.add("eth7")
    again = PathBook.from_document(book.to_document())
    assert (again.settings, again.taken_off) == (book.settings, book.taken_off)
    assert again.added() == ["usb0"]
    assert again.used("wwan0") == 400
    assert later(again, 2027, 4, 10) == 0


def test_it_is_saved_often_enough_and_gently_to_the_disk() -> None:
    book = metered()
    book.saved(0.0)
    assert not book.wants_saving(SAVE_LATEST)  # nothing has been carried
    book.carried("wwan0", "wwan0", 1)
    assert not book.wants_saving(SAVE_LATEST - 1.0)
    assert book.wants_saving(SAVE_LATEST)
    book.carried("wwan0", "wwan0", SAVE_BYTES)
    assert not book.wants_saving(SAVE_SPACING - 1.0)
    assert book.wants_saving(SAVE_SPACING)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("750 MB", 75 * 10**7), ("1.5g", 15 * 10**8), ("2000", 2000), ("1tb", 10**12), ("off", None)],
)
def test_a_limit_is_read_as_people_write_it(text: str, size: int | None) -> None:
    assert parse_limit(text) == size


@pytest.mark.parametrize("text", ["", "much", "5XB", "-1GB", "0", "nan", "inf", "1e99", "5GBB!"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_limit(text)


@pytest.mark.parametrize(
    "damage",
    [
        {"limit": "much"}, {"reset_day": 29}, {"reset_day": 0}, {"label": "7"}, {"label": "x" * 33}, {"standby": 1},
    ],
)  # fmt: skip
def test_a_damaged_book_is_refused(damage: dict[str, object]) -> None:
    document = metered().to_document()
    document["paths"][0] |= damage
    with pytest.raises(ConfigError):
        PathBook.from_document(document)


def test_there_are_two_priorities() -> None:
    assert (parse_priority("data"), parse_priority("Standby")) == (Use.DATA, Use.STANDBY)
    with pytest.raises(ConfigError, match="data or standby is expected"):
        parse_priority("high")
