from __future__ import annotations

import torch

from lorakit.serve.bank import AdapterRows, Bank
from lorakit.serve.served import ServedAdapter, ServedSite, weighted_sum


def adapter(key: str, r: int, *, affine: bool = False, names: tuple[str, ...] = ("l",)):
    generator = torch.Generator().manual_seed(sum(map(ord, key)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sites = {
        name: ServedSite(
            normal(r, 6), normal(r, 9), normal(9) if affine else None, normal(9) if affine else None
        )
        for name in names
    }
    return ServedAdapter(key, sites)


def by_hand(one: ServedAdapter | None, name: str, x: torch.Tensor, y: torch.Tensor):
    site = one.sites.get(name) if one else None
    if site is None:
        return y
    gain = 0.0 if site.gain is None else site.gain
    shift = 0.0 if site.shift is None else site.shift
    return y + gain * y + shift + x @ site.A.T @ site.B


def check(bank: Bank, rows: dict[str, ServedAdapter | None], *, positions: int = 1) -> None:
    routing = bank.arrange(list(rows.items()))
    assert sorted(routing.order) == sorted(rows)
    for name in ("l", "m"):
        x, y = torch.randn(len(rows), positions, 6), torch.randn(len(rows), positions, 9)
        expected = torch.stack(
            [by_hand(rows[row], name, x[i], y[i]) for i, row in enumerate(routing.order)]
        )
        found = routing.add(name, x, y.clone(), ids=False)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mixed_ranks_base_rows_and_affine_changes_side_by_side() -> None:
    a, b = adapter("a", 3), adapter("b", 8, names=("l", "m"))
    big, dora = adapter("big", 40), adapter("dora", 2, affine=True)
    bank = Bank()
    rows = {
        "1": a,
        "2": None,
        "3": b,
        "4": big,
        "5": dora,
        "6": a,
        "7": adapter("d", 5, affine=True),
    }
    check(bank, rows)
    check(bank, rows, positions=4)


def test_the_bank_follows_joins_and_leaves() -> None:
    adapters = [None, *(adapter(f"k{i}", r) for i, r in enumerate([3, 16, 9, 17, 1, 30]))]
    adapters.append(adapter("affine", 4, affine=True))
    bank = Bank()
    rows: dict[str, ServedAdapter | None] = {}
    generator = torch.Generator().manual_seed(1)
    for i in range(60):
        leave = rows and int(torch.randint(3, (1,), generator=generator)) == 0
        if leave or len(rows) > 9:
            rows.pop(sorted(rows)[int(torch.randint(len(rows), (1,), generator=generator))])
        else:
            rows[f"{i}"] = adapters[int(torch.randint(len(adapters), (1,), generator=generator))]
        if rows:
            check(bank, rows)


def test_only_places_with_another_adapter_are_written(monkeypatch) -> None:
    written: list[int] = []
    import lorakit.serve.bank as module

    original = module._write
    monkeypatch.setattr(
        module, "_write", lambda stack, i, site: (written.append(i), original(stack, i, site))
    )
    a, b, c = (adapter(key, 8) for key in "abc")
    bank = Bank()
    rows: dict[str, ServedAdapter | None] = {"1": a, "2": b, "3": c, "4": a}
    bank.arrange(list(rows.items()))
    assert written == [0, 1, 2, 3]
    written.clear()
    del rows["2"]
    rows["5"] = b
    check(bank, rows)
    assert written == [], "b's factors still lie where row 5 takes its place"
    rows["5"] = c
    check(bank, rows)
    assert written == [1]


def test_a_stack_that_is_made_anew_forgets_the_places_behind() -> None:
    a, b, c, d = (adapter(key, 3) for key in "abcd")
    bank = Bank()
    rows: dict[str, ServedAdapter | None] = {"1": a, "2": b, "3": c, "4": d}
    check(bank, rows)
    # Three places of four are written into the wider stack; the fourth holds nothing now.
    check(bank, {"1": a, "2": b, "5": adapter("wide", 14)})
    check(bank, rows)
    check(bank, {"1": a, "6": c, "7": d, "2": b})


def test_rows_of_one_adapter_need_no_stack() -> None:
    a = adapter("a", 4)
    bank = Bank()
    routing = bank.arrange([("1", a), ("2", a)])
    assert isinstance(routing.groups[0].segment, AdapterRows)
    check(bank, {"1": a, "2": a})


def test_a_weighted_sum_concatenates_ranks() -> None:
    a, b = adapter("a", 3, names=("l", "m")), adapter("b", 5, affine=True)
    both = weighted_sum([(a, 0.5), (b, -2.0)], "sum")
    assert both.sites["l"].r == 8
    assert both.sites["m"].r == 3
    x, y = torch.randn(2, 6), torch.randn(2, 9)
    change = 0.5 * (by_hand(a, "l", x, y) - y) - 2.0 * (by_hand(b, "l", x, y) - y)
    torch.testing.assert_close(by_hand(both, "l", x, y), y + change, rtol=1e-5, atol=1e-5)
