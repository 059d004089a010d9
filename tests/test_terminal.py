from __future__ import annotations

import signal
import threading

import pytest

from nova_train.terminal import progress, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_request_is_a_flag_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_raises_and_a_second_sigterm_does_not() -> None:
    with stop_requests() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_requests() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


def test_the_bar_counts_steps_and_can_be_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 2, 5, shown=True) as advance:
        advance(100)
    assert "sft" in (shown := capsys.readouterr().out)
    assert "3/5" in shown
    with progress("sft", 2, 5, shown=False) as advance:
        advance(100)
    assert capsys.readouterr().out.strip() == ""
