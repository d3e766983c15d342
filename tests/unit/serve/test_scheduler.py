from __future__ import annotations

from types import SimpleNamespace

from lorakit.serve.scheduler import FairQueue, Outcome


def row(label: str, prompt: int = 10, name: str = "") -> SimpleNamespace:
    return SimpleNamespace(label=label, prompt=(1,) * prompt, state="waiting", id=name or label)


def run(queue: FairQueue, count: int, *, generated: int = 10) -> list[str]:
    """Start and finish `count` rows one after the other; their labels in order."""
    order: list[str] = []

    def attempt(one: SimpleNamespace) -> Outcome:
        if taken:
            return "full"
        taken.append(one)
        one.state = "running"
        return "taken"

    for _ in range(count):
        taken: list[SimpleNamespace] = []
        queue.take(attempt)  # type: ignore[arg-type]
        if not taken:
            break
        queue.charge(taken[0], generated=generated)  # type: ignore[arg-type]
        queue.leave(taken[0])  # type: ignore[arg-type]
        order.append(taken[0].label)
    return order


def test_one_adapter_is_first_come_first_served() -> None:
    queue = FairQueue()
    for i in range(4):
        queue.add(row("a", prompt=40 - 10 * i, name=str(i)))  # type: ignore[arg-type]
    taken: list[str] = []

    def attempt(one: SimpleNamespace) -> Outcome:
        taken.append(one.id)
        one.state = "running"
        return "taken"

    queue.take(attempt)  # type: ignore[arg-type]
    assert taken == ["0", "1", "2", "3"]
    assert len(queue) == 0


def test_a_flood_of_one_adapter_does_not_starve_another() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.add(row("flood"))  # type: ignore[arg-type]
    assert run(queue, 5) == ["flood"] * 5
    queue.add(row("late"))  # type: ignore[arg-type]
    queue.add(row(""))  # type: ignore[arg-type]
    # They come with the floor's account, not with none: at most one round later they run.
    assert set(run(queue, 3)) == {"late", "", "flood"}


def test_shares_of_work_are_equal_although_requests_are_not() -> None:
    queue = FairQueue()
    for _ in range(40):
        queue.add(row("long", prompt=100))  # type: ignore[arg-type]
        for _ in range(5):
            queue.add(row("short", prompt=10))  # type: ignore[arg-type]
    order = run(queue, 60, generated=0)
    work = {"long": 100 * order.count("long"), "short": 10 * order.count("short")}
    assert abs(work["long"] - work["short"]) <= 100


def test_a_pause_saves_up_no_claim() -> None:
    queue = FairQueue()
    queue.add(row("idle"))  # type: ignore[arg-type]
    run(queue, 1)
    for _ in range(100):
        queue.add(row("busy"))  # type: ignore[arg-type]
    run(queue, 50)
    for _ in range(20):
        queue.add(row("idle"))  # type: ignore[arg-type]
    order = run(queue, 10)
    assert 4 <= order.count("idle") <= 6


def test_an_adapter_that_is_on_its_way_holds_nobody_up() -> None:
    queue = FairQueue()
    for label in ("away", "here", "here"):
        queue.add(row(label))  # type: ignore[arg-type]
    taken: list[str] = []

    def attempt(one: SimpleNamespace) -> Outcome:
        if one.label == "away":
            return "later"
        one.state = "running"
        taken.append(one.label)
        return "taken"

    queue.take(attempt)  # type: ignore[arg-type]
    assert taken == ["here", "here"]
    assert len(queue) == 1


def test_nobody_goes_past_a_row_that_waits_for_room() -> None:
    queue = FairQueue()
    queue.add(row("large", prompt=1000))  # type: ignore[arg-type]
    queue.add(row("small", prompt=1))  # type: ignore[arg-type]
    asked: list[str] = []

    def attempt(one: SimpleNamespace) -> Outcome:
        asked.append(one.label)
        return "full"

    queue.take(attempt)  # type: ignore[arg-type]
    assert asked == ["large"]


def test_a_row_that_fails_at_its_start_leaves_no_trace() -> None:
    queue = FairQueue()
    queue.add(row("bad"))  # type: ignore[arg-type]
    queue.take(lambda _: "taken")
    assert len(queue) == 0
    gone = row("gone")
    queue.add(gone)  # type: ignore[arg-type]
    queue.remove(gone)  # type: ignore[arg-type]
    assert len(queue) == 0
    assert list(queue.rows()) == []
