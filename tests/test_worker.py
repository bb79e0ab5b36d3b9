"""The helper thread: jobs in order, results in order, and no failure that ends it."""

from __future__ import annotations

import select

from mptunnel.worker import Worker


def gather(worker: Worker[int], count: int) -> list[tuple[int, object]]:
    results: list[tuple[int, object]] = []
    while len(results) < count:
        assert select.select([worker.fileno()], [], [], 10.0)[0], "no result came"
        results += worker.results()
    return results


def test_results_come_back_in_the_order_of_the_jobs() -> None:
    worker: Worker[int] = Worker(lambda job: job * job)
    for job in range(100):
        worker.submit(job)
    assert gather(worker, 100) == [(job, job * job) for job in range(100)]
    assert worker.close() == []


def test_a_job_that_fails_gives_its_error_and_the_next_one_is_done() -> None:
    worker: Worker[int] = Worker(lambda job: 1 // job)
    worker.submit(0)
    worker.submit(1)
    (first, error), (second, result) = gather(worker, 2)
    assert (first, second, result) == (0, 1, 1)
    assert isinstance(error, ZeroDivisionError)
    worker.close()


def test_closing_waits_for_what_was_submitted() -> None:
    worker: Worker[int] = Worker(lambda job: job + 1)
    for job in range(1, 11):
        worker.submit(job)
    assert worker.close() == [(job, job + 1) for job in range(1, 11)]


def test_without_a_result_nothing_is_taken_and_nothing_blocks() -> None:
    worker: Worker[int] = Worker(lambda job: job)
    assert worker.results() == []
    worker.close()
