import os
import signal

import pytest

from nasfast.utils.interrupt import Interrupt, StopRequested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_stops_at_once(number):
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(StopRequested):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_handlers_are_restored_after_an_error():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(n) for n in numbers]

    def fail():
        with Interrupt():
            assert not set(before) & {signal.getsignal(n) for n in numbers}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [signal.getsignal(n) for n in numbers] == before


def test_a_stop_is_no_exception_of_the_program():
    assert not issubclass(StopRequested, Exception)
