"""The metrics against the official E2E script's scores of two real system outputs."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from lorakit.evaluate.corpus_metrics import cider_scores, corpus_nist
from lorakit.evaluate.metrics import corpus_bleu, corpus_rouge_l

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LORAKIT_DATA", ROOT.parent / "shared" / "data")) / "e2e"

pytestmark = pytest.mark.skipif(
    not (DATA / "golden" / "scores.json").is_file(),
    reason="the E2E data is not here: set LORAKIT_DATA to the directory that holds e2e/",
)


@pytest.fixture(scope="module")
def references() -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    with gzip.open(DATA / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            groups.setdefault(row["mr"], []).append(row["ref"])
    assert len(groups) == 630
    assert sum(map(len, groups.values())) == 4693
    return list(groups.values())


@pytest.mark.parametrize(
    ("system", "bleu", "rouge"),
    [("tgen_std_run0.txt", 0.6616, 0.6914), ("tgen_minus_run0.txt", 0.6380, 0.6893)],
)
def test_scores_equal_the_official_script(
    references: list[list[str]], system: str, bleu: float, rouge: float
) -> None:
    scores = json.loads((DATA / "golden" / "scores.json").read_text())["files"][system]["raw_refs"]
    assert (scores["BLEU"], scores["ROUGE_L"]) == (bleu, rouge)

    answers = (DATA / "golden" / system).read_text(encoding="utf-8").splitlines()
    assert round(corpus_bleu(answers, references), 4) == bleu
    assert corpus_rouge_l(answers, references) == pytest.approx(rouge, abs=5e-4)


@pytest.mark.parametrize(
    ("system", "nist", "cider"),
    [
        ("tgen_std_run0.txt", 8.5446, 2.2312),
        pytest.param("tgen_minus_run0.txt", 7.7740, 2.0084, marks=pytest.mark.slow),
    ],
)
def test_nist_and_cider_equal_the_official_script(
    references: list[list[str]], system: str, nist: float, cider: float
) -> None:
    scores = json.loads((DATA / "golden" / "scores.json").read_text())["files"][system]["raw_refs"]
    assert (scores["NIST"], scores["CIDEr"]) == (nist, cider)

    answers = (DATA / "golden" / system).read_text(encoding="utf-8").splitlines()
    assert round(corpus_nist(answers, references), 4) == nist
    found = cider_scores(answers, references)
    # Java's tokenizer is not ours: 0.0001 on one system, 0.0051 on the other.
    assert sum(found) / len(found) == pytest.approx(cider, abs=6e-3)
