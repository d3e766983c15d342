from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lorakit.errors import OutputError
from lorakit.report.figures import smoothed
from lorakit.report.html import _interval_below, render_report, write_report


def estimate(value, low, high, n=160):
    return {"value": value, "interval": [low, high], "n": n}


@pytest.fixture
def report():
    return {
        "title": "Tiny <model> answers",
        "tiles": [{"label": "execution accuracy", "value": "83.1 %", "note": "base 3.1 %"}],
        "comparison": {
            "columns": ["base", "adapter"],
            "rows": [
                {
                    "label": "execution accuracy",
                    "cells": [estimate(0.031, 0.013, 0.071), estimate(0.831, 0.766, 0.881)],
                    "share": True,
                },
                {"label": "perplexity", "cells": [estimate(14.2, 13.1, 15.4), None]},
            ],
        },
        "curve": {
            "train": [[step, 3.0 / step] for step in range(1, 41)],
            "validation": [[20, 0.3], [40, 0.2]],
        },
        "samples": [
            {
                "question": "How many books?",
                "reference": "SELECT COUNT(*) FROM books",
                "reference_rows": [[7]],
                "answers": {
                    "base": {"text": "<script>alert(1)</script>", "ok": False, "error": "syntax"},
                    "adapter": {"text": "SELECT COUNT(*) FROM books", "ok": True, "rows": [[7]]},
                },
            }
        ],
        "certificate": {
            "passed": True,
            "statement": "They agree.",
            "facts": {"largest logit error": 3.1e-5},
            "layers": [("layers.0.q_proj", 2e-6), ("layers.1.q_proj", 1e-6)],
        },
        "details": {"Adapter": {"r": 8, "targets": ["q", "v"], "bias": None}},
        "command": "lorakit demo",
    }


class _Checker(HTMLParser):
    """Every element closed, and a note of every attribute that would fetch something."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            local = (value or "").startswith("#")
            if name in ("src", "href", "xlink:href", "action", "data") and not local:
                self.fetched.append((tag, name, value))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(html):
    checker = _Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_the_page_is_well_formed_and_fetches_nothing(report):
    html = render_report(report)
    checker = check(html)
    assert checker.fetched == []
    assert "script" not in checker.tags
    assert "svg" in checker.tags
    assert "@import" not in html
    assert not re.search(r"url\(\s*['\"]?http", html)


def test_what_models_say_is_text_not_markup(report):
    html = render_report(report)
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "Tiny &lt;model&gt; answers" in html


def test_numbers_intervals_and_verdicts_are_shown(report):
    html = render_report(report)
    for text in ("83.1 %", "76.6 to 88.1", "14.2", "13.1 to 15.4", "3.1e-05", "passed", "q, v"):
        assert text in html
    assert html.count('class="verdict">right') == 1
    assert html.count('class="verdict">wrong') == 1
    # The dot of 0.831 lies at 83.1 % of its line; perplexities have no line.
    assert "left:83.10%" in html
    assert html.count('class="range"') == 2


def test_a_failed_certificate_says_so(report):
    report["certificate"]["passed"] = False
    assert ">failed</span>" in render_report(report)


def test_a_report_with_only_a_title_has_no_empty_sections():
    html = render_report({"title": "Nothing yet"})
    assert "section" not in check(html).tags


def test_the_curve_is_the_same_every_time_and_takes_the_pages_colours(report):
    from lorakit.report.figures import loss_curve

    svg = loss_curve(report["curve"])
    assert svg == loss_curve(report["curve"])
    assert "var(--accent)" in svg
    assert "optimizer step" in svg
    assert "best 0.2 at step 40" in svg


def test_smoothing_starts_at_the_first_value_and_weighs_the_past():
    assert smoothed([4.0, 2.0], 0.5) == pytest.approx([4.0, 8 / 3])
    assert smoothed([1.0, 5.0, 3.0], 0.0) == [1.0, 5.0, 3.0]


def test_a_place_that_cannot_be_written_is_an_output_error(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_report(report, tmp_path / "file" / "report.html")


def test_details_are_readable(report):
    report["details"] = {
        "Hardware": {"num_cores": 2, "memory_bytes": 25_276_510_208},
        "Data": {
            "train": {"source": "train.jsonl", "sha256": "ab" * 32, "report": {"num_rows": 44}},
            "seen": {"this_call_s": 2.5, "all_s": 61.0},
        },
        "Run": {"finished_at": "2026-11-23T07:54:21+00:00"},
        "Merge": {"layers": [{"layer": 0, "max_abs_error": 1e-6}], "by": "shard"},
    }
    html = render_report(report)
    for text in (
        "25.3 GB",
        "2026-11-23 07:54 UTC",
        "Data: train<",
        "rows 44<",
        "<dt>memory</dt>",
        "abababababab<",
    ):
        assert text in html
    assert "this call 2.5 s, all 1 min 1 s" in html
    for text in ("memory_bytes", "ab" * 7, "max_abs_error", "this_call"):
        assert text not in html


def test_columns_of_numbers_are_flush_right(report):
    report["methods"] = {
        "columns": ["arm", "trained", "settings"],
        "rows": [["a", "1,221,120", "r=4"], ["b", "–", "r=8"], ["c", "0.45 ± 0.1", ""]],
    }
    html = render_report(report)
    assert '<th scope="col" class="number">trained</th>' in html
    assert '<td class="number">0.45 ± 0.1</td>' in html
    assert '<th scope="col">settings</th>' in html


def test_drawings_and_tables_are_named_for_those_who_do_not_see_them(report):
    html = render_report(report)
    assert '<div class="figure" role="img" aria-label="Loss: ' in html
    assert html.count("<th ") == html.count('<th scope="col"')


@pytest.mark.browser
def test_chromium_draws_the_whole_page(report, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page, picture = write_report(report, tmp_path / "report.html"), tmp_path / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1600"]
    done = subprocess.run(
        [browser, *flags, f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0
    assert picture.stat().st_size > 30_000


def test_an_interval_behind_a_number_has_a_line_of_its_own():
    assert _interval_below("4.2 [4.1, 4.3]") == '4.2<span class="interval">[4.1, 4.3]</span>'
    assert _interval_below("q [a, <b>]") == "q [a, &lt;b&gt;]"
