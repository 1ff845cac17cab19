import threading

import pytest

from nasfast.training.ahead import ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order_and_errors_in_their_place(threads):
    assert list(ahead(str, range(9), threads)) == [str(i) for i in range(9)]
    quotients = ahead(lambda i: 6 // (3 - i), range(9), threads)
    assert [next(quotients) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(quotients)


def test_nothing_goes_on_behind_a_loop_that_ended():
    results = ahead(str, iter(range(10**9)), 2)
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
