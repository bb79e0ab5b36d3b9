"""The traffic tools: what a flow tells of its datagrams, and that they and the downloads work in a lab."""

import contextlib
import os
import time
from collections.abc import Iterator

import pytest

from mptunnel.lab import TARGET6, Lab, Unavailable, two_uplinks
from mptunnel.traffic import BLOCK, Datagrams, Download, Flow, Progress, content, content_sha256, serve_web

MS = 1_000_000


def flow(arrived_ms: list[float], duplicated: int = 0) -> Flow:
    """Return a flow of a datagram a millisecond from 1 ms on, each with its time of arrival; 0 is never."""
    return Flow([(n + 1) * MS for n in range(len(arrived_ms))], [int(ms * MS) for ms in arrived_ms], duplicated)


def test_a_flow_counts_what_is_missing() -> None:
    some = flow([2, 0, 4, 0], duplicated=3)
    assert (some.sent, some.lost, some.duplicated, some.reordered) == (4, 2, 3, 0)
    assert some.missing == [(1, 0.002), (3, 0.004)]


def test_the_longest_gap_is_between_arrivals_in_their_order() -> None:
    assert flow([2, 9, 4, 5]).longest_gap() == pytest.approx(0.004)
    assert flow([2, 9, 4, 5]).reordered == 2


def test_a_gap_counts_where_it_ends_after_and_begins_before() -> None:
    some = flow([2, 6, 7, 17, 18])
    assert some.longest_gap() == pytest.approx(0.010)
    assert some.longest_gap(before=0.007) == pytest.approx(0.004)
    assert some.longest_gap(after=0.017) == pytest.approx(0.001)


def test_silence_at_the_end_is_a_gap_up_to_the_last_sending() -> None:
    assert flow([1.5, 0, 0, 0, 0, 0, 0, 0]).longest_gap() == pytest.approx(0.0065)


def test_a_flow_of_which_nothing_arrived_has_no_end_of_its_gap() -> None:
    assert flow([0, 0]).longest_gap() == float("inf")


def test_a_stall_is_a_gap_that_the_sender_did_not_make() -> None:
    paused = Flow([1 * MS, 2 * MS, 9 * MS, 10 * MS], [3 * MS, 4 * MS, 11 * MS, 12 * MS], 0)
    assert paused.longest_gap() == pytest.approx(0.007)
    assert paused.longest_send_gap() == pytest.approx(0.007)
    assert paused.longest_stall() == 0.0
    assert flow([2, 3, 0, 0, 0, 7]).longest_stall() == pytest.approx(0.003)


def test_delays_are_sorted_and_leave_out_the_lost() -> None:
    assert flow([4, 0, 4]).delays() == pytest.approx([0.001, 0.003])


def test_no_two_blocks_of_the_content_are_alike() -> None:
    blocks = list(content(3 * BLOCK + 7, seed=2))
    assert [len(each) for each in blocks] == [BLOCK, BLOCK, BLOCK, 7]
    assert len(set(blocks)) == 4
    assert content_sha256(BLOCK, 2) != content_sha256(BLOCK, 3)


def test_the_longest_stall_of_a_download_is_found_by_time() -> None:
    some = Progress(stalls=((10.0, 2.0), (20.0, 5.0)))
    assert some.longest_stall() == 5.0
    assert some.longest_stall(before=12.0) == 2.0
    assert some.longest_stall(after=20.0) == 0.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(Lab(two_uplinks(ipv6=True, seed=11)))
        except Unavailable as error:
            if "CI" in os.environ:
                raise
            pytest.skip(str(error))


@pytest.mark.netns
def test_datagrams_on_a_good_wire_all_arrive_in_order_with_its_delay(lab: Lab) -> None:
    lab.wire("p1").set(delay=0.030)
    begun = time.monotonic()
    datagrams = Datagrams(lab, 0.5)
    assert begun < datagrams.begun < time.monotonic()
    for each in datagrams.finish():
        assert (each.sent, each.lost, each.duplicated, each.reordered) == (500, 0, 0, 0)
        assert 0.030 <= each.delays()[250] < 0.032


@pytest.mark.netns
def test_datagrams_lost_on_the_wire_are_the_ones_that_are_missing(lab: Lab) -> None:
    lab.wire("p1").up.set(loss=0.1)
    up, down = Datagrams(lab, 0.5, address=TARGET6).finish()
    assert up.lost == len(up.missing) > 20
    assert up.lost <= lab.wire("p1").counts().up.lost <= up.lost + 5, "besides those, only calls"
    assert down.lost == 0


@pytest.mark.netns
def test_duplicates_are_counted(lab: Lab) -> None:
    lab.wire("p1").down.set(duplicate=1.0)
    up, down = Datagrams(lab, 0.3).finish()
    assert up.duplicated == 0
    assert (down.lost, down.duplicated) == (0, 300)


@pytest.mark.netns
def test_an_outage_is_a_gap_of_its_length_at_its_time(lab: Lab) -> None:
    datagrams = Datagrams(lab, 1.2)
    time.sleep(0.3)
    cut_at = time.monotonic()
    lab.wire("p1").cut()
    time.sleep(0.4)
    lab.wire("p1").mend()
    mended_at = time.monotonic()
    for each in datagrams.finish():
        assert 0.39 < each.longest_gap(cut_at) <= mended_at - cut_at + 0.05
        assert each.longest_gap(before=cut_at - 0.01) < 0.2
        assert all(cut_at - 0.01 < at < mended_at for _, at in each.missing)


@pytest.mark.netns
def test_a_download_arrives_whole_and_says_so(lab: Lab) -> None:
    serve_web(lab)
    done = Download(lab, 1_000_000, seed=4).finish()
    assert (done.error, done.received, done.sha256) == ("", 1_000_000, content_sha256(1_000_000, 4))


@pytest.mark.netns
def test_a_download_over_a_cut_wire_stalls(lab: Lab) -> None:
    serve_web(lab)
    lab.wire("p2").set(rate=1e6, delay=0.005)
    download = Download(lab, 700_000, device="p2")
    time.sleep(0.4)
    lab.wire("p2").cut()
    cut_at = time.monotonic()
    time.sleep(0.5)
    assert 0 < download.poll().received < 700_000
    lab.wire("p2").mend()
    done = download.finish()
    assert done.sha256 == content_sha256(700_000)
    assert done.longest_stall(after=cut_at) > 0.45


@pytest.mark.netns
def test_a_download_without_a_server_says_why(lab: Lab) -> None:
    assert Download(lab, 1000).finish().error == "Connection refused"
