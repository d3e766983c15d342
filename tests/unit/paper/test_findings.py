from __future__ import annotations

import pytest

from lorakit.paper.findings import (
    Value,
    compare_layers,
    compare_order,
    counts,
    relation,
    summary,
)


def test_a_difference_within_both_spreads_is_level() -> None:
    assert relation(Value(value=70.0, spread=3.0), Value(value=65.0, spread=4.0)) == "level with"
    assert relation(Value(value=70.1, spread=3.0), Value(value=65.0, spread=4.0)) == "above"
    assert relation(Value(value=1.0), Value(value=1.5)) == "below"
    assert relation(Value(value=1.0), Value(value=1.0)) == "level with"


@pytest.mark.parametrize(
    ("paper", "ours", "verdict"),
    [
        ((90.0, 80.0), (70.0, 60.0), "agrees"),
        ((90.0, 80.0), (60.0, 70.0), "disagrees"),
        ((90.0, 80.0), (61.0, 60.0), "cannot tell"),
        ((80.0, 80.0), (61.0, 60.0), "agrees"),
        ((80.0, 80.0), (90.0, 60.0), "disagrees"),
        ((80.0, 90.0), (60.0, 70.0), "agrees"),
    ],
)
def test_the_verdict_follows_the_numbers(paper, ours, verdict) -> None:
    found = compare_order(
        "BLEU",
        ("LoRA", "full"),
        (Value(value=paper[0], spread=0.1), Value(value=paper[1], spread=0.1)),
        (Value(value=ours[0], spread=2.0, n=1), Value(value=ours[1], spread=2.0, n=1)),
    )
    assert found.verdict == verdict
    assert f"LoRA {ours[0]:g} ± 2" in found.ours
    assert f"full {paper[1]:g} ± 0.1" in found.paper
    assert found.ours in found.sentence
    assert found.paper in found.sentence


def test_what_did_not_run_cannot_be_told() -> None:
    pair = Value(value=1.0), Value(value=2.0)
    assert compare_order("x", ("a", "b"), pair, None).verdict == "cannot tell"


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        ([True, True, True, False], "agrees"),
        ([True, False], "cannot tell"),
        ([False, False, False, True], "disagrees"),
        ([], "cannot tell"),
    ],
)
def test_layers_vote(holds, verdict) -> None:
    found = compare_layers("claim", "paper", holds, "numbers")
    assert found.verdict == verdict
    assert f"{sum(holds)} of {len(holds)} layers" in found.ours


def test_the_summary_counts_and_names_what_disagrees() -> None:
    findings = [
        compare_layers("one", "p", [True], "").to_json(),
        compare_layers("two", "p", [False], "").to_json(),
        compare_layers("three", "p", [True, False], "").to_json(),
    ]
    assert counts(findings) == {"agrees": 1, "disagrees": 1, "cannot tell": 1}
    text = summary(findings)
    assert "1 agree, 1 disagree" in text
    assert text.endswith("against the paper: two.")
    assert "against" not in summary(findings[:1])
