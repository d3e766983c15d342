from dataclasses import replace

from tokenizers_for_tests import CHATML, NO_END, QWEN3, make_tokenizer

from lorakit.data.preview import (
    count_facts,
    data_findings,
    duplicate_finding,
    token_view,
)
from lorakit.data.sft import SftOptions, build_examples
from lorakit.data.sources import load_rows

PAIR = {"prompt": "What is the capital of France?", "completion": "Paris é 北."}
LONG = {"prompt": "name", "completion": "France " * 200}
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]


def findings(rows, tokenizer, **options):
    chosen = SftOptions(**options)
    report = build_examples(load_rows(rows), tokenizer, chosen).report
    return data_findings(report, tokenizer, chosen)


def texts(found, level):
    return [finding.text for finding in found if finding.level == level]


def pieces(view, colour):
    return "".join(view.plain[s.start : s.end] for s in view.spans if colour in str(s.style))


def test_learned_tokens_are_green_and_all_tokens_are_shown():
    tokenizer = make_tokenizer(CHATML)
    (example,) = build_examples(load_rows([PAIR]), tokenizer)
    view = token_view(example, tokenizer)
    assert view.plain == tokenizer.decode(example.input_ids)
    assert pieces(view, "green") == "Paris é 北.<|im_end|>"
    assert pieces(view, "bold green") == "<|im_end|>"
    assert pieces(view, "dim").endswith("<|im_start|>assistant\n")


def test_brackets_stand_in_for_colours():
    tokenizer = make_tokenizer(CHATML)
    (example,) = build_examples(load_rows([{"messages": TURNS}]), tokenizer)
    plain = token_view(example, tokenizer, brackets=True).plain
    assert "[[First.<|im_end|>]]" in plain
    assert plain.endswith("[[Second.<|im_end|>]]")


def test_a_long_example_is_shortened_in_its_middle():
    tokenizer = make_tokenizer(CHATML)
    (example,) = build_examples(load_rows([LONG]), tokenizer)
    view = token_view(example, tokenizer, max_tokens=11)
    assert f"[... {len(example) - 11} tokens ...]" in view.plain
    assert view.plain.startswith("<|im_start|>user")
    assert view.plain.endswith("<|im_end|>")


def test_all_in_order():
    found = findings([PAIR], make_tokenizer(CHATML, eos="<|im_end|>"))
    assert texts(found, "ok") == ["the end of every answer is learned (<|im_end|>)"]
    assert len(found) == 1


def test_eos_other_than_the_end_marker():
    found = findings([PAIR], make_tokenizer(CHATML, eos="</s>"))
    assert texts(found, "warning") == [
        "answers end with <|im_end|>, but the tokenizer's EOS is </s>"
    ]


def test_a_template_without_end_marker():
    found = findings([PAIR], make_tokenizer(NO_END))
    assert any("no end marker" in text for text in texts(found, "warning"))


def test_pad_equal_to_eos_is_said_and_in_order():
    found = findings([PAIR], make_tokenizer(CHATML, eos="<|im_end|>", pad="<|im_end|>"))
    assert any("pad and EOS are the same" in text for text in texts(found, "ok"))


def test_cut_dropped_and_empty_rows():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    found = texts(findings([PAIR, LONG], tokenizer, max_length=80), "warning")
    assert found[0] == "the end of the answer is learned in 1 of 2 examples"
    assert found[1] == "1 examples are cut at max_length 80 (50%)"
    found = texts(findings([PAIR, LONG], tokenizer, max_length=80, on_too_long="drop"), "warning")
    assert found == ["1 examples are left out at max_length 80"]
    rows = [
        {"messages": TURNS},
        {"messages": TURNS[:1]},
        {"messages": [*TURNS[:1], {"role": "assistant", "content": ""}]},
    ]
    found = texts(findings(rows, tokenizer), "warning")
    assert any("1 rows have no token to learn" in text for text in found)
    assert any("1 rows have an empty answer" in text for text in found)


def test_rewritten_history_and_text_of_the_template():
    found = texts(findings([{"messages": TURNS}], make_tokenizer(QWEN3, eos="<|im_end|>")), "ok")
    assert any("1 rows became one example per answer" in text for text in found)
    assert any("'<think>\\n\\n</think>\\n\\n'" in text for text in found)


def test_a_template_that_writes_the_date():
    template = "{% if false %}{{ strftime_now('%d') }}{% endif %}" + CHATML
    found = findings([PAIR], make_tokenizer(template, eos="<|im_end|>"))
    assert any("today's date" in text for text in texts(found, "warning"))


def test_an_end_that_is_never_learned():
    found = findings([PAIR], make_tokenizer(None), add_eos=False)
    assert texts(found, "warning") == ["the end of the answer is learned in 0 of 1 examples"]


def test_duplicates_between_training_and_validation():
    train, other = load_rows([PAIR, LONG]), load_rows([LONG, {"prompt": "a", "completion": "b"}])
    assert duplicate_finding(train, other).text.startswith("1 of 2 validation rows")
    assert duplicate_finding(train, other[1:]).level == "ok"


def test_the_counts():
    tokenizer = make_tokenizer(CHATML)
    report = build_examples(load_rows([PAIR, PAIR]), tokenizer).report
    facts = count_facts(report)
    assert facts["examples"] == "2"
    assert facts["ends learned"] == "2 x <|im_end|>"
    assert f"{report.num_learned_tokens:,} (" in facts["learned tokens"]
    assert "cut at max_length" not in facts
    assert count_facts(replace(report, num_cut=3))["cut at max_length"] == "3"
