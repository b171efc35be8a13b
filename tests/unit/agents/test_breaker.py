from agents.breaker import FAILURES_TO_OPEN, Breaker


def opened(longest_s: float = 60.0) -> Breaker:
    breaker = Breaker(longest_s)
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(0.0, 0.0)
    return breaker


def test_five_failures_in_a_row_open_it_and_each_wait_is_longer() -> None:
    breaker = Breaker(60.0)
    assert [breaker.failed(0.0, 0.0) for _ in range(FAILURES_TO_OPEN)] == [False] * 4 + [True]
    waits, now = [breaker.opens_at], breaker.opens_at
    for _ in range(7):
        assert breaker.wants_probe(now) and not breaker.admits
        breaker.failed(now, now)
        waits.append(breaker.opens_at - now)
        now = breaker.opens_at
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_an_answer_between_failures_keeps_it_closed() -> None:
    breaker = Breaker(60.0)
    for _ in range(3):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.failed(0.0, 0.0)
        breaker.answered()
    assert not breaker.down


def test_calls_that_were_in_flight_when_it_opened_change_nothing() -> None:
    breaker = opened()
    assert not breaker.failed(30.0, -5.0)
    assert breaker.opens_at == 1.0


def test_a_found_server_gets_one_call_and_its_answer_closes_it() -> None:
    breaker = opened()
    breaker.found()
    assert breaker.admits
    breaker.started()
    assert not breaker.admits and not breaker.wants_probe(100.0)
    breaker.answered()
    assert breaker.admits and not breaker.down


def test_a_trial_that_fails_opens_it_for_longer() -> None:
    breaker = opened()
    breaker.found()
    breaker.started()
    breaker.failed(10.0, 5.0)
    assert not breaker.admits and breaker.opens_at == 12.0 and breaker.wants_probe(12.0)


def test_a_trial_that_is_cancelled_leaves_the_way_to_another() -> None:
    breaker = opened()
    breaker.found()
    breaker.started()
    breaker.left(-5.0)  # it was in flight when the breaker opened: not the one that tries
    assert not breaker.admits
    breaker.left(5.0)
    assert breaker.admits
