from agents.turns import Turns


def serve(turns: Turns, lane: str, calls: int, now: float) -> int:
    return sum(turns.started(lane, now) for _ in range(calls))


def test_the_work_is_done_in_as_many_turns_as_there_are_models() -> None:
    turns, now, left = Turns(["a", "b"]), 0.0, 600
    order = []
    while left:
        turns.refresh(now, 0, left, call_s=0.05, able=["a", "b"])
        order += [turns.current] if order[-1:] != [turns.current] else []
        turns.started(turns.current, now)
        left, now = left - 1, now + 0.05
    assert order == ["a", "b"] and turns.swaps == 2


def test_the_next_turn_waits_until_the_server_is_idle() -> None:
    turns = Turns(["a", "b"])
    turns.refresh(0.0, 0, 10, 1.0, ["a", "b"])
    turns.starved()
    turns.refresh(1.0, 3, 10, 1.0, ["a", "b"])
    assert not turns.allows("a") and not turns.allows("b")
    turns.refresh(2.0, 0, 10, 1.0, ["a", "b"])
    assert turns.allows("b") and not turns.allows("a")


def test_a_long_turn_ends_only_where_somebody_waits() -> None:
    turns = Turns(["a", "b"])
    turns.refresh(0.0, 0, 10**6, 1.0, ["a", "b"])
    serve(turns, "a", 100, 1.0)
    turns.refresh(10_000.0, 2, 10**6, 1.0, ["a"])
    assert turns.allows("a")
    turns.refresh(10_000.0, 2, 10**6, 1.0, ["a", "b"])
    assert not turns.allows("a")


def test_the_rotation_goes_back_and_forth() -> None:
    turns, order = Turns(["a", "b", "c"]), []
    for _ in range(9):
        turns.refresh(0.0, 0, 10, 1.0, ["a", "b", "c"])
        order.append(turns.current)
        turns.starved()
    assert "".join(order) == "abccbaabc"


def test_a_closed_lane_loses_its_turn() -> None:
    turns = Turns(["a", "b"])
    turns.refresh(0.0, 0, 10, 1.0, ["a", "b"])
    turns.refresh(1.0, 0, 10, 1.0, ["b"])
    assert turns.allows("b")


def test_what_a_swap_costs_is_measured_and_makes_turns_longer() -> None:
    def served_in_a_turn(swap_s: float) -> int:
        turns = Turns(["a", "b"])
        turns.refresh(0.0, 0, 4, 1.0, ["a", "b"])
        turns.started("a", 0.0)
        turns.answered(swap_s, 0.0)
        served = 0
        while turns.allows("a"):
            served += 1
            turns.started("a", swap_s)
            turns.refresh(swap_s, 1, 4, 1.0, ["a", "b"])
        return served

    assert served_in_a_turn(1.0) < served_in_a_turn(10.0)
