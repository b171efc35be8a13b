from agents.figures import AnswerRate


def test_the_second_that_has_begun_is_left_out() -> None:
    rate = AnswerRate()
    assert rate.per_second(5.0) == 0
    for tenth in range(35):
        rate.count(100 + tenth / 10)
    assert rate.per_second(100.9) == 0
    assert rate.per_second(103.4) == 10


def test_only_the_last_ten_seconds_count() -> None:
    rate = AnswerRate()
    for second in range(60):
        rate.count(second)
    assert rate.per_second(60) == 1.0
    assert rate.per_second(65) == 0.5
    assert rate.per_second(80) == 0
