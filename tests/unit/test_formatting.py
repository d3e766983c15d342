from __future__ import annotations

import pytest

from lorakit import formatting


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (8_300_000, "8.3 MB"),
        (99_960_000, "100 MB"),
        (538_090_408, "538 MB"),
        (999_600_000, "1.0 GB"),
        (25_276_502_016, "25.3 GB"),
        (3.2e12, "3.2 TB"),
    ],
)
def test_bytes(num_bytes, text):
    assert formatting.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.837, "0.84 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 0 s"),
        (192, "3 min 12 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds, text):
    assert formatting.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.8312, "83.1 %"), (0.0034, "0.34 %"), (0, "0.0 %"), (1, "100.0 %")]
)
def test_shares(share, text):
    assert formatting.format_share(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (134_515_008, "134,515,008"),
        (3.1e-5, "3.1e-05"),
        (14.236, "14.24"),
        (0.0, "0"),
        (True, "yes"),
        (float("nan"), "nan"),
        (123_456.7, "1.2e+05"),
    ],
)
def test_numbers(value, text):
    assert formatting.format_number(value) == text


def test_estimates():
    estimate = {"value": 0.831, "interval": [0.766, 0.8812], "n": 160}
    assert formatting.format_estimate(estimate) == "83.1 % [76.6, 88.1]"
    perplexity = {"value": 14.236, "interval": [13.1, 15.4], "n": 160}
    assert formatting.format_estimate(perplexity, share=False) == "14.24 [13.1, 15.4]"
    assert formatting.format_estimate({"value": 0.5, "interval": None}) == "50.0 %"
