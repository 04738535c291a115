"""Laws of planning ahead: the same plans in the same order, errors in their place, no more ahead than asked, and no waiting."""

import threading
import time

import pytest

from tokenflex.errors import UserError
from tokenflex.plan.ahead import ahead


@pytest.mark.parametrize("number", [1, 2, 7, 100])
@pytest.mark.parametrize("length", [0, 1, 5, 50])
def test_the_same_items_in_the_same_order(number, length):
    assert list(ahead(iter(range(length)), number)) == list(range(length))


def test_an_error_comes_in_its_place():
    def items():
        yield from range(3)
        raise UserError("data.train: no sample is usable")

    found = []
    with pytest.raises(UserError, match="no sample is usable"):
        for item in ahead(items(), 2):
            found.append(item)
    assert found == [0, 1, 2]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "plan"]


def test_it_is_as_far_ahead_as_asked_and_ends_with_its_reader():
    made = []

    def items():
        for number in range(10**6):
            made.append(number)
            yield number

    plans = ahead(items(), 4)
    assert not made and not threads(), "nothing is made before the first is asked for"
    assert [next(plans), next(plans)] == [0, 1]
    time.sleep(0.3)
    assert 2 + 4 <= len(made) <= 2 + 4 + 1
    plans.close()
    deadline = time.monotonic() + 5
    while threads():
        assert time.monotonic() < deadline, "the thread outlives its reader"
        time.sleep(0.02)


def test_a_window_that_takes_long_is_not_waited_for():
    """Every eighth item takes 0.2 s, a step 0.1 s: without the thread every eighth step waits for it."""

    def items():
        for number in range(24):
            if number % 8 == 0:
                time.sleep(0.2)
            yield number

    def longest_wait(plans):
        next(plans)  # the first window is waited for in any case
        waits = []
        for _ in range(23):
            time.sleep(0.1)
            begin = time.monotonic()
            next(plans)
            waits.append(time.monotonic() - begin)
        return max(waits)

    assert longest_wait(ahead(items(), 8)) < 0.1 < longest_wait(items())
