"""Rows of preferences in every shape they come in, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny_runs
from lorakit.data.collate import PreferenceCollator
from lorakit.data.encode import IGNORED, Example
from lorakit.data.options import SftOptions
from lorakit.data.preference import PreferenceExamples, build_preferences
from lorakit.data.rows import Origin, Rows
from lorakit.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tiny_runs.write_model(tmp_path_factory.mktemp("preference"))
    loaded = PreTrainedTokenizerFast.from_pretrained(directory)
    loaded.chat_template = tiny_runs.TEMPLATE
    return loaded


def rows_of(*rows: dict[str, Any]) -> Rows:
    origins = [Origin("pairs.jsonl line", i) for i in range(1, len(rows) + 1)]
    return Rows(list(rows), origins, "pairs.jsonl")


def build(
    tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], paired: bool = True, **options: Any
) -> PreferenceExamples:
    return build_preferences(rows_of(*rows), tokenizer, SftOptions(**options), paired=paired)


def parts(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[str, str]:
    learned = [i for i, label in enumerate(example.labels) if label != IGNORED]
    assert learned == list(range(learned[0], len(example)))
    ids = example.input_ids
    return tokenizer.decode(ids[: learned[0]]), tokenizer.decode(ids[learned[0] :])


USER = {"role": "user", "content": "w1 w2"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("w3 w4", "w5"))
SAME_PAIR: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"},
    "turns": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "text and whole conversations": {
        "prompt": "w1 w2",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "transcripts": {
        "chosen": "\n\nHuman: w1 w2\n\nAssistant: w3 w4",
        "rejected": "\n\nHuman: w1 w2\n\nAssistant: w5",
    },
    "messages and texts": {"messages": [USER], "chosen": "w3 w4", "rejected": "w5"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "w1 w2"}],
        "chosen": {"from": "gpt", "value": "w3 w4"},
        "rejected": {"from": "gpt", "value": "w5"},
    },
    "instruction": {"instruction": "w1 w2", "input": "", "chosen": "w3 w4", "rejected": "w5"},
}


@pytest.mark.parametrize("row", SAME_PAIR.values(), ids=SAME_PAIR)
def test_every_shape_gives_the_same_two_answers(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]
) -> None:
    [pair] = build(tokenizer, row)
    chosen, rejected = pair.answers
    assert parts(tokenizer, chosen.example) == (
        "<user> w1 w2 <end> <assistant>",
        "w3 w4 <end> </s>",
    )
    assert parts(tokenizer, rejected.example) == ("<user> w1 w2 <end> <assistant>", "w5 <end> </s>")
    assert (chosen.desirable, rejected.desirable) == (True, False)


def test_only_the_last_answer_of_a_dialogue_is_compared(tokenizer: PreTrainedTokenizerFast) -> None:
    early = {"role": "assistant", "content": "w9"}
    [pair] = build(tokenizer, {"prompt": [USER, early, USER], "chosen": "w3", "rejected": "w5"})
    prompt, answer = parts(tokenizer, pair.answers[0].example)
    assert prompt == "<user> w1 w2 <end> <assistant> w9 <end> <user> w1 w2 <end> <assistant>"
    assert answer.startswith("w3")


def test_verdicts_and_pairs_become_single_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    single = build(
        tokenizer,
        {"prompt": "w1", "completion": "w3", "label": True},
        {"prompt": "w1", "completion": "w5", "label": 0},
        paired=False,
    )
    assert [example.answers[0].desirable for example in single] == [True, False]
    both = build(tokenizer, SAME_PAIR["texts"], paired=False)
    assert [example.answers[0].desirable for example in both] == [True, False]
    assert (both.report.num_desirable, both.report.num_undesirable) == (1, 1)


def test_verdicts_of_a_table_without_types_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ("True", "false", "1", " 0 ", "FALSE")
    rows = [{"prompt": "w1", "completion": "w3", "label": text} for text in texts]
    found = build(tokenizer, *rows, paired=False)
    verdicts = [example.answers[0].desirable for example in found]
    assert verdicts == [True, False, True, False, False]


def test_an_answer_of_several_turns_stays_behind_its_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    call, result = {"role": "assistant", "content": "w8"}, {"role": "tool", "content": "w9"}
    for prompt in ("w1 w2", [USER]):
        row = {"prompt": prompt, "chosen": [call, result, GOOD], "rejected": [BAD]}
        [pair] = build(tokenizer, row)
        before, answer = parts(tokenizer, pair.answers[0].example)
        assert before == ("<user> w1 w2 <end> <assistant> w8 <end> <unk> w9 <end> <assistant>")
        assert answer == "w3 w4 <end> </s>"


def test_a_prompt_of_turns_is_not_said_twice_before_whole_conversations(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    [whole] = build(tokenizer, row)
    [parted] = build(tokenizer, SAME_PAIR["turns"])
    assert [a.example.input_ids for a in whole.answers] == [
        a.example.input_ids for a in parted.answers
    ]
    other = {"role": "user", "content": "w7"}
    with pytest.raises(DataError, match="the prompt's turns and an answer"):
        build(tokenizer, row | {"chosen": [other, GOOD]})


def test_same_answers_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    found = build(tokenizer, SAME_PAIR["texts"], {"prompt": "w1", "chosen": "w2", "rejected": "w2"})
    assert len(found) == 1
    assert found.report.notes == ("1 pairs whose two answers are the same are left out",)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "w1", "chosen": "w2"}, "pairs of answers are needed"),
        ({"chosen": "w2", "rejected": "w3"}, "answers without a prompt"),
        ({"prompt": "w1", "chosen": 5, "rejected": "w3"}, "column 'chosen'"),
        ({"prompt": "w1", "chosen": [USER], "rejected": "w3"}, "an assistant's turn at the end"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w2"}, "no preference is left"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_row(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as error:
        build(tokenizer, row)
    assert words in str(error.value)
    assert "pairs.jsonl" in str(error.value)


def test_turns_of_a_transcript_are_context(tokenizer: PreTrainedTokenizerFast) -> None:
    start = "\n\nHuman: w1\n\nAssistant: w2\n\nw9\n\nHuman: w6\n\nAssistant:"
    found = build(tokenizer, {"chosen": f"{start} w3", "rejected": f"{start} w4"})
    asked, answer = parts(tokenizer, found[0].answers[0].example)
    assert answer.split()[0] == "w3"
    assert [word for word in asked.split() if word.startswith("w")] == ["w1", "w2", "w9", "w6"]
    with pytest.raises(DataError, match="answers without a prompt"):
        build(tokenizer, {"chosen": "w1 Human: w2", "rejected": "w3"})


def test_a_rating_without_a_bound_is_told_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "w1", "completion": "w2", "label": 4}
    with pytest.raises(DataError, match=r"preference\.desirable_from"):
        build(tokenizer, row, paired=False)


@pytest.mark.parametrize("verdict", ["good", None, 0.5])
def test_a_verdict_that_is_none_is_refused(
    tokenizer: PreTrainedTokenizerFast, verdict: Any
) -> None:
    row = {"prompt": "w1", "completion": "w2", "label": verdict}
    with pytest.raises(DataError, match="true or false"):
        build(tokenizer, row, paired=False)


def test_ratings_are_cut_at_a_number(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "w1", "completion": "w2", "label": n} for n in (1, 3, 3.5, 5)]

    def rated(*rows: dict[str, Any], desirable_from: float) -> list[bool]:
        options = {"paired": False, "desirable_from": desirable_from}
        found = build_preferences(rows_of(*rows), tokenizer, SftOptions(), **options)
        return [example.answers[0].desirable for example in found]

    assert rated(*rows, desirable_from=3.5) == [False, False, True, True]
    table = [{"prompt": "w1", "completion": "w2", "label": text} for text in ("5", "1.5")]
    assert rated(*table, desirable_from=2) == [True, False]
    for value in (True, "five", "nan", None, float("nan")):
        with pytest.raises(DataError, match="a number"):
            rated({"prompt": "w1", "completion": "w2", "label": value}, desirable_from=2)
    with pytest.raises(DataError, match="pairs have no ratings"):
        rated(SAME_PAIR["texts"], desirable_from=2)


@pytest.mark.parametrize("policy", ["cut", "drop", "error"])
def test_too_long_answers(tokenizer: PreTrainedTokenizerFast, policy: Any) -> None:
    long = {"prompt": "w1 w2", "chosen": " ".join(["w3"] * 20), "rejected": "w5"}
    rows = (SAME_PAIR["texts"], long)
    if policy == "error":
        with pytest.raises(DataError, match="line 2"):
            build(tokenizer, *rows, max_length=10, on_too_long=policy)
        return
    found = build(tokenizer, *rows, max_length=10, on_too_long=policy)
    assert len(found) == (2 if policy == "cut" else 1)
    assert found.report.longest <= 10


def test_a_batch_holds_chosen_then_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    other = {"prompt": "w7", "chosen": "w8", "rejected": "w9 w9 w9"}
    found = build(tokenizer, SAME_PAIR["texts"], other)
    batch = PreferenceCollator(0, mismatched=False)(list(found))
    assert batch["desirable"].tolist() == [True, True, False, False]
    answers = [example.answers[i].example for i in range(2) for example in found]
    for row, mask, example in zip(
        batch["input_ids"], batch["attention_mask"], answers, strict=True
    ):
        assert row[mask.bool()].tolist() == example.input_ids


def test_mismatched_answers_follow_their_neighbours_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 10}", "label": True} for i in range(3)]
    found = build(tokenizer, *rows, paired=False)
    batch = PreferenceCollator(0, mismatched=True)(list(found))
    assert batch["desirable"].shape == (3,)
    assert batch["input_ids"].shape[0] == 6
    text = tokenizer.decode(batch["input_ids"][5][batch["attention_mask"][5].bool()])
    assert text == "<user> w2 <end> <assistant> w10 <end> </s>"
    assert torch.equal(batch["labels"][5] != IGNORED, batch["labels"][3] != IGNORED)


def test_the_functions_that_may_be_called_stand_in_the_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    known = copy.deepcopy(tokenizer)
    template = "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}" + tiny_runs.TEMPLATE
    known.chat_template = template
    turns = [{"role": "user", "content": "w1"}]
    answers = {"chosen": "w2", "rejected": "w3"}
    rows = [
        {"prompt": turns, **answers},
        {k: [*turns, {"role": "assistant", "content": v}] for k, v in answers.items()},
    ]
    for row in rows:
        ((answer, _),) = [j.answers for j in build(known, {**row, "tools": [{"name": "w7"}]})]
        assert parts(known, answer.example)[0].startswith("w7")
