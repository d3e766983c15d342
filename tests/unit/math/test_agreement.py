"""Every metric against its definition, written out over single examples."""

import itertools
import math

import pytest
import torch

from lorakit.math import agreement
from lorakit.math.task_metrics import TASK_METRICS, metrics_for, score_all

# 12 rows: TP 4, FP 1, FN 2, TN 5.
TRUE = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
SAID = [1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]


def scores(said, true, num_classes):
    return score_all(torch.tensor(said), torch.tensor(true), num_classes)


def test_two_classes_by_hand():
    found = scores(SAID, TRUE, 2)
    assert list(found) == ["accuracy", "f1", "accuracy_f1", "matthews"]
    assert found["accuracy"] == pytest.approx(9 / 12)
    assert found["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert found["accuracy_f1"] == pytest.approx((9 / 12 + 8 / 11) / 2)
    assert found["matthews"] == pytest.approx((4 * 5 - 1 * 2) / math.sqrt(5 * 6 * 6 * 7))


def test_f1_is_of_the_class_with_id_1():
    swapped = scores([1 - x for x in SAID], [1 - x for x in TRUE], 2)
    assert swapped["f1"] == pytest.approx(2 * 5 / (2 * 5 + 2 + 1))
    assert swapped["matthews"] == pytest.approx(scores(SAID, TRUE, 2)["matthews"])


def r_k(said, true, num_classes):
    """Gorodkin's R_K as the correlation of indicator matrices, from its definition."""

    def indicator(ids):
        return torch.nn.functional.one_hot(torch.tensor(ids), num_classes).double()

    x, y = indicator(said), indicator(true)
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt())


def test_three_classes_from_the_definitions():
    generator = torch.Generator().manual_seed(3)
    true = torch.randint(3, (50,), generator=generator).tolist()
    said = [
        t if u < 0.6 else int(u * 100) % 3
        for t, u in zip(true, torch.rand(50, generator=generator).tolist(), strict=True)
    ]
    found = scores(said, true, 3)
    assert list(found) == ["accuracy", "macro_f1", "matthews"]
    each = []
    for k in range(3):
        tp = sum(s == t == k for s, t in zip(said, true, strict=True))
        each.append(2 * tp / (said.count(k) + true.count(k)))
    assert found["macro_f1"] == pytest.approx(sum(each) / 3)
    assert found["matthews"] == pytest.approx(r_k(said, true, 3))
    assert found["accuracy"] == pytest.approx(
        sum(s == t for s, t in zip(said, true, strict=True)) / 50
    )


def test_a_class_that_does_not_occur_does_not_enter_the_macro_mean():
    assert scores([0, 1, 0], [0, 1, 1], 3)["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_one_answer_for_all_has_no_correlation():
    found = scores([1] * 6, [1, 1, 1, 1, 0, 0], 2)
    assert found["matthews"] == 0.0
    assert found["f1"] == pytest.approx(8 / 10)
    assert scores([0] * 4, [0, 0, 0, 0], 2)["f1"] == 0.0
    constant = score_all(torch.full((5,), 0.1), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 0)
    assert set(constant.values()) == {0.0}


def pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_correlations_of_numbers():
    x, y = [1.0, 2.0, 4.0, 3.0, 9.0], [0.5, 0.7, 3.0, 3.5, 4.0]
    found = score_all(torch.tensor(x), torch.tensor(y), 0)
    assert found["pearson"] == pytest.approx(pearson(x, y))
    # Ranks 1 2 4 3 5 against 1 2 3 4 5, no ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_ties_share_their_mean_rank():
    x, y = [3.0, 1.0, 3.0, 2.0, 3.0], [1.0, 1.0, 2.0, 4.0, 5.0]
    found = score_all(torch.tensor(x), torch.tensor(y), 0)
    assert found["spearman"] == pytest.approx(pearson([4, 1, 4, 2, 4], [1.5, 1.5, 3, 4, 5]))


def test_correlation_of_large_numbers_keeps_its_digits():
    x, y = [1e8 + a for a in (1.0, 2.0, 4.0)], [1.0, 2.0, 4.0]
    big = score_all(torch.tensor(x, dtype=torch.float64), torch.tensor(y), 0)
    assert big["pearson"] == pytest.approx(1.0, abs=1e-9)
    assert score_all(torch.tensor(y), -torch.tensor(y), 0)["pearson"] == pytest.approx(-1.0)


@pytest.mark.parametrize("num_classes", [0, 2, 3])
def test_sums_of_a_resample_give_the_metric_of_the_resample(num_classes):
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(30, (30,), generator=generator)
    if num_classes:
        said, true = torch.randint(num_classes, (2, 30), generator=generator)
    else:
        said, true = torch.randn(2, 30, generator=generator)
    for name in metrics_for(num_classes):
        if "spearman" in name:
            continue  # its ranks stay those of the whole sample
        metric = TASK_METRICS[name]
        total = metric.statistics(said, true, num_classes)[chosen].sum(0)
        direct = metric.value(said[chosen], true[chosen], num_classes)
        assert float(metric.score(total)) == pytest.approx(direct, abs=1e-9)


def test_scores_take_a_batch_of_sums():
    said, true = torch.tensor(SAID), torch.tensor(TRUE)
    for name in metrics_for(2):
        sums = TASK_METRICS[name].statistics(said, true, 2).view(3, 4, -1).sum(1)
        together = TASK_METRICS[name].score(sums)
        alone = torch.stack([TASK_METRICS[name].score(row) for row in sums])
        torch.testing.assert_close(together, alone)


def test_matthews_of_every_small_table_is_the_indicators_correlation():
    for said in itertools.product(range(2), repeat=4):
        true = (0, 1, 1, 0)
        statistics = agreement.class_statistics(torch.tensor(said), torch.tensor(true), 2)
        found = float(agreement.matthews(statistics.sum(0)))
        expected = 0.0 if len(set(said)) == 1 else r_k(list(said), list(true), 2)
        assert found == pytest.approx(expected)
