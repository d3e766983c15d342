"""Masks are proved by decoding the tokens that are learned."""

import json

import pytest
from tokenizers_for_tests import (
    CHATML,
    GEMMA,
    LLAMA3,
    MISTRAL,
    NO_END,
    PHI3,
    QWEN3,
    THINK_FIRST,
    make_tokenizer,
)

from lorakit.data.sft import (
    SftOptions,
    build_examples,
    question_text,
    reference_text,
    render_prompt,
    stop_token_ids,
)
from lorakit.data.sources import load_rows
from lorakit.errors import ConfigError, DataError
from lorakit.models.load import load_tokenizer

PAIR = {"prompt": "What is the capital of France?", "completion": "Paris."}
OTHER = {"prompt": "x", "completion": "y"}
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second."},
    ]
}


def learned(tokenizer, example):
    """The learned text, one string per unbroken run of learned tokens."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def build(rows, tokenizer, **options):
    return build_examples(load_rows(rows), tokenizer, SftOptions(**options))


def one(row, tokenizer, **options):
    (example,) = build([row], tokenizer, **options)
    return example


@pytest.mark.parametrize(
    ("template", "eos", "answer"),
    [
        (CHATML, "<|im_end|>", "Paris.<|im_end|>"),
        (CHATML, "</s>", "Paris.<|im_end|>"),
        (LLAMA3, "<|eot_id|>", "Paris.<|eot_id|>"),
        (MISTRAL, "</s>", " Paris.</s>"),
        (GEMMA, "<end_of_turn>", "Paris.<end_of_turn>"),
        (QWEN3, "<|im_end|>", "<think>\n\n</think>\n\nParis.<|im_end|>"),
        (PHI3, "<|endoftext|>", "Paris.<|end|>"),
        (NO_END, "</s>", " Paris.</s>"),
        (None, "</s>", "Paris.</s>"),
    ],
    ids=[
        "chatml",
        "chatml-other-eos",
        "llama3",
        "mistral",
        "gemma",
        "qwen3",
        "phi3",
        "no-end",
        "-",
    ],
)
def test_exactly_the_answer_and_its_end_are_learned(template, eos, answer):
    tokenizer = make_tokenizer(template, eos=eos)
    example = one(PAIR, tokenizer)
    assert learned(tokenizer, example) == [answer]
    prompt = render_prompt({"prompt": PAIR["prompt"]}, tokenizer)
    assert prompt == render_prompt(PAIR, tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert all(label == -100 for label in example.labels[: len(prompt)])
    assert example.input_ids[len(prompt) :] == example.labels[len(prompt) :]
    assert example.labels[-1] in stop_token_ids(tokenizer)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA, PHI3])
def test_all_assistant_turns_are_learned_in_one_example(template):
    tokenizer = make_tokenizer(template)
    runs = [run.strip() for run in learned(tokenizer, one(TWO_TURNS, tokenizer))]
    assert [run.split(".")[0] for run in runs] == ["First", "Second"]
    assert all(run.endswith((">", "]")) for run in runs)
    (last,) = learned(tokenizer, one(TWO_TURNS, tokenizer, last_turn_only=True))
    assert last.strip().startswith("Second.")


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA, PHI3, QWEN3, NO_END])
def test_each_turn_sees_what_generation_will_see(template):
    tokenizer = make_tokenizer(template)
    messages = TWO_TURNS["messages"]
    examples = build([TWO_TURNS], tokenizer)
    for end in (1, 3):
        prompt = render_prompt({"messages": messages[:end]}, tokenizer)
        assert any(
            example.input_ids[: len(prompt)] == prompt and example.labels[len(prompt)] != -100
            for example in examples
        )


def test_a_template_that_rewrites_history_gives_one_example_per_answer():
    tokenizer = make_tokenizer(QWEN3, eos="<|im_end|>")
    examples = build([TWO_TURNS, PAIR | {"messages": TWO_TURNS["messages"][:2]}], tokenizer)
    assert [learned(tokenizer, example) for example in examples] == [
        ["<think>\n\n</think>\n\nFirst.<|im_end|>"],
        ["<think>\n\n</think>\n\nSecond.<|im_end|>"],
        ["<think>\n\n</think>\n\nFirst.<|im_end|>"],
    ]
    assert [example.row for example in examples] == [0, 0, 1]
    assert "<think>" not in tokenizer.decode(examples[1].input_ids).split("Two?")[0]
    report = examples.report
    assert (report.num_rows, report.num_examples, report.num_rows_split) == (2, 3, 1)
    assert report.answer_lead == "<think>\n\n</think>\n\n"


def test_template_options_reach_the_template():
    tokenizer = make_tokenizer(QWEN3, eos="<|im_end|>")
    example = one(PAIR, tokenizer, template_options={"enable_thinking": False})
    assert learned(tokenizer, example) == ["Paris.<|im_end|>"]


def test_a_template_that_starts_inside_the_thinking_is_refused():
    with pytest.raises(DataError, match="does not continue its own generation prompt") as caught:
        one(PAIR, make_tokenizer(THINK_FIRST))
    assert "enable_thinking" in str(caught.value)
    assert caught.value.where == "row 1"


def test_without_end_marker_eos_is_added_and_said():
    tokenizer = make_tokenizer(NO_END)
    examples = build([TWO_TURNS], tokenizer)
    assert learned(tokenizer, examples[0]) == [" First.", " Second.</s>"]
    assert examples.report.num_eos_added == examples.report.num_ends_learned == 1
    assert any("no end marker" in note for note in examples.report.notes)
    bare = build([TWO_TURNS], tokenizer, add_eos=False)
    assert learned(tokenizer, bare[0]) == [" First.", " Second."]
    assert bare.report.num_ends_learned == 0


def test_an_end_marker_unknown_to_the_tokenizer_counts_as_none():
    template = CHATML.replace("<|im_end|>", "<|finis|>")
    examples = build([PAIR], make_tokenizer(template))
    assert examples.report.num_eos_added == 1
    assert examples.report.end_token == "</s>"


def test_no_eos_at_all_is_an_error_unless_not_asked_for():
    tokenizer = make_tokenizer(None, eos=None)
    with pytest.raises(DataError, match="no EOS token"):
        build([PAIR], tokenizer)
    assert learned(tokenizer, one(PAIR, tokenizer, add_eos=False)) == ["Paris."]
    assert build([PAIR], make_tokenizer(CHATML, eos=None)).report.end_token == "<|im_end|>"


def test_eos_written_in_the_data_is_not_doubled():
    tokenizer = make_tokenizer(None)
    example = one({"prompt": "a", "completion": "b</s>"}, tokenizer)
    assert learned(tokenizer, example) == ["b</s>"]


def test_pad_equal_to_eos_still_learns_eos():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>", pad="<|im_end|>")
    examples = build([PAIR, OTHER], tokenizer)
    assert examples.report.num_eos_learned == 2
    assert all(example.labels[-1] == tokenizer.eos_token_id for example in examples)


def test_bos_goes_before_plain_text_and_not_before_a_template():
    plain = make_tokenizer(None, bos="<s>")
    example = one(PAIR, plain)
    assert plain.decode(example.input_ids) == "<s>What is the capital of France?Paris.</s>"
    assert learned(plain, example) == ["Paris.</s>"]
    assert render_prompt(PAIR, plain)[0] == plain.bos_token_id
    chat = make_tokenizer(MISTRAL, bos="<s>")
    assert one(PAIR, chat).input_ids.count(chat.bos_token_id) == 1


def test_tokens_never_span_the_boundary():
    tokenizer = make_tokenizer(None)
    prompt = render_prompt({"prompt": "Fr"}, tokenizer)
    whole = tokenizer("France", add_special_tokens=False)["input_ids"]
    # The vocabulary has a token over the boundary; generation after "Fr" never sees it.
    assert whole[: len(prompt)] != prompt
    example = one({"prompt": "Fr", "completion": "ance"}, tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert learned(tokenizer, example) == ["ance</s>"]


def test_no_space_is_invented():
    tokenizer = make_tokenizer(None)
    example = one({"prompt": "Answer:", "completion": "Paris"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "Answer:Paris</s>"


def test_plain_text_is_learned_but_for_its_first_token():
    tokenizer = make_tokenizer(CHATML)
    example = one({"text": "The capital of France"}, tokenizer)
    assert tokenizer.decode(example.input_ids) == "The capital of France</s>"
    assert example.labels == [-100, *example.input_ids[1:]]


@pytest.mark.parametrize("row", [PAIR, TWO_TURNS])
def test_completion_only_off_learns_every_token(row):
    tokenizer = make_tokenizer(CHATML)
    example = one(row, tokenizer, completion_only=False)
    assert example.labels == [-100, *example.input_ids[1:]]
    assert tokenizer.decode(example.input_ids[-1:]) == "<|im_end|>"


def test_completion_only_off_without_template():
    tokenizer = make_tokenizer(None, bos="<s>")
    example = one(PAIR, tokenizer, completion_only=False)
    assert example.labels == [-100, *example.input_ids[1:]]


FORMATS = {
    "messages": {
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None},
            {"role": "assistant", "content": "a"},
        ]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    },
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "instruction-output": {"instruction": "q", "input": "", "output": "a", "id": 7},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_example(kind):
    tokenizer = make_tokenizer(CHATML)
    examples = build([FORMATS[kind]], tokenizer)
    assert examples.report.format == kind
    assert examples[0].input_ids == one(FORMATS["messages"], tokenizer).input_ids
    assert learned(tokenizer, examples[0]) == ["a<|im_end|>"]
    assert reference_text(FORMATS[kind]) == "a"


def test_prompt_and_completion_as_chat_lists_learn_the_completion_only():
    tokenizer = make_tokenizer(CHATML)
    messages = TWO_TURNS["messages"]
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert learned(tokenizer, one(row, tokenizer)) == ["Second.<|im_end|>"]
    assert reference_text(row) == "Second."
    assert render_prompt(row, tokenizer) == render_prompt(TWO_TURNS, tokenizer)


def test_alpaca_input_joins_the_instruction():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    chat = make_tokenizer(CHATML)
    assert "user\nAdd.\n\n1 and 2<|im_end|>" in chat.decode(one(row, chat).input_ids)
    plain = make_tokenizer(None)
    text = plain.decode(one(row, plain).input_ids)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:3</s>" in text
    assert "### Input" not in plain.decode(one(row | {"input": None}, plain).input_ids)


def test_a_system_prompt_goes_before_rows_without_one():
    tokenizer = make_tokenizer(CHATML)
    own = {"messages": [{"role": "system", "content": "Mine."}, *TWO_TURNS["messages"]]}
    rows = [TWO_TURNS, own, TWO_TURNS | {"system": "Row."}]
    texts = [tokenizer.decode(e.input_ids) for e in build(rows, tokenizer, system="Be brief.")]
    assert [text.split("\n")[1] for text in texts] == [
        "Be brief.<|im_end|>",
        "Mine.<|im_end|>",
        "Row.<|im_end|>",
    ]
    pair = tokenizer.decode(one(PAIR, tokenizer, system="Be brief.").input_ids)
    assert pair.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    with pytest.raises(DataError, match="needs a chat template"):
        one(PAIR, tokenizer, system="Be brief.", template="none")


def test_columns_may_have_other_names():
    tokenizer = make_tokenizer(CHATML)
    row = {"context": "q", "ref": "a", "text": "ignored"}
    columns = {"prompt": "context", "completion": "ref"}
    assert learned(tokenizer, one(row, tokenizer, columns=columns)) == ["a<|im_end|>"]
    with pytest.raises(DataError, match="no column 'contxt'") as caught:
        one(row, tokenizer, columns={"prompt": "contxt", "completion": "ref"})
    assert "did you mean 'context'?" in str(caught.value)


def test_a_tool_call_is_learned():
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls }}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = {"messages": [{"role": "user", "content": "q"}, call]}
    tokenizer = make_tokenizer(template)
    assert learned(tokenizer, one(row, tokenizer)) == ["[{'name': 'f'}]<|im_end|>"]


LONG = {"prompt": "name", "completion": "France " * 100}


def test_a_long_row_is_cut_at_its_end_without_a_false_eos():
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    examples = build([PAIR, LONG], tokenizer, max_length=60)
    whole = build([PAIR, LONG], tokenizer)
    assert examples[0].input_ids == whole[0].input_ids
    assert examples[1].input_ids == whole[1].input_ids[:60]
    assert examples[1].labels == whole[1].labels[:60]
    assert (examples.report.num_cut, examples.report.num_ends_learned) == (1, 1)
    assert examples.report.longest == 60


def test_drop_and_error_on_long_rows():
    tokenizer = make_tokenizer(CHATML)
    examples = build([PAIR, LONG], tokenizer, max_length=60, on_too_long="drop")
    assert [example.row for example in examples] == [0]
    assert examples.report.num_dropped == 1
    with pytest.raises(DataError, match="longer than max_length") as caught:
        build([PAIR, LONG], tokenizer, max_length=60, on_too_long="error")
    assert caught.value.where == "row 2"


def test_rows_in_which_nothing_is_learned_are_left_out_and_counted():
    tokenizer = make_tokenizer(CHATML)
    question = {"messages": TWO_TURNS["messages"][:1]}
    long_prompt = {
        "messages": [{"role": "user", "content": "x " * 200}, *TWO_TURNS["messages"][1:2]]
    }
    examples = build([question, TWO_TURNS, long_prompt], tokenizer, max_length=100)
    assert [example.row for example in examples] == [1]
    assert examples.report.num_nothing_learned == 2
    assert any("no token to learn" in note for note in examples.report.notes)


def test_all_labels_masked_is_an_error():
    tokenizer = make_tokenizer(CHATML)
    question = {"messages": TWO_TURNS["messages"][:1]}
    with pytest.raises(DataError, match="all labels are masked") as caught:
        build([question, question], tokenizer)
    assert "2 rows without a learned token" in str(caught.value)
    with pytest.raises(DataError, match="all labels are masked") as caught:
        build([PAIR], tokenizer, max_length=8)
    assert "raise max_length" in str(caught.value)


def test_an_end_that_is_never_learned_is_an_error():
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(DataError, match="never stop") as caught:
        build([LONG, LONG], tokenizer, max_length=60)
    assert "2 of 2 examples cut" in str(caught.value)
    assert build([LONG], tokenizer, max_length=60, add_eos=False).report.num_cut == 1
    assert build([{"text": "France " * 100}], tokenizer, max_length=9).report.num_cut == 1


def test_empty_answers_are_counted():
    examples = build([PAIR, {"prompt": "a", "completion": " "}], make_tokenizer(CHATML))
    assert examples.report.num_empty_answers == 1


def refuses(rows, what, *parts, template=CHATML, **options):
    with pytest.raises(DataError) as caught:
        build(rows, make_tokenizer(template), **options)
    text = str(caught.value)
    assert what in caught.value.what, text
    for part in parts:
        assert part in text, text


def test_a_row_without_the_columns_names_the_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="without the column 'completion'") as caught:
        build_examples(load_rows(path), make_tokenizer(CHATML))
    assert caught.value.where == "d.jsonl line 2"
    assert "answer" in str(caught.value)


def test_columns_that_fit_no_format():
    refuses([{"question": "a", "answer": "b"}], "fit no format", "question, answer", "columns:")


@pytest.mark.parametrize(
    ("row", "where", "part"),
    [
        (PAIR | {"completion": None}, "column 'completion'", "None"),
        (PAIR | {"completion": 5}, "column 'completion'", "5"),
        (PAIR | {"prompt": 5}, "column 'prompt'", "a list of messages"),
        ({"messages": []}, "column 'messages'", "at least one"),
        ({"messages": "hello"}, "column 'messages'", "a list of messages"),
        ({"messages": ["hello"]}, "message 1", '"role" and "content"'),
        ({"messages": [{"role": "elf", "content": "x"}]}, "message 1, role", "one of system"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content", "text"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1, content", "text"),
        ({"messages": [{"role": "user"}]}, "message 1, content", "text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1, from", "human"),
        ({"conversations": [{"from": "human"}]}, "message 1", '"from" and "value"'),
        ({"messages": [{"from": "human"}]}, "message 1", '"from" and "value"'),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1, value", "3"),
        ({"text": 3}, "column 'text'", "3"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input'", "3"),
    ],
)
def test_values_of_the_wrong_kind(row, where, part):
    refuses([row], "wrong kind", "row 1, column", where, part)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "Human", "content": "a"}, {"role": "GPT", "content": "b"}]},
        {"conversations": [{"role": "user", "content": "a"}, {"from": "Assistant", "value": "b"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "model", "content": [{"type": "text", "text": "b"}]},
            ]
        },
    ],
)
def test_speakers_and_texts_have_one_meaning_in_every_notation(row):
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = make_tokenizer(CHATML)
    one, other = (build_examples(load_rows([r]), tokenizer) for r in (row, {"messages": wanted}))
    assert (one[0].input_ids, one[0].labels) == (other[0].input_ids, other[0].labels)


def test_half_an_emoji():
    refuses([PAIR, PAIR | {"prompt": "a \ud83d"}], "surrogate", "row 2", "character 2")


def test_what_the_template_refuses():
    system = {"messages": [{"role": "system", "content": "s"}, *TWO_TURNS["messages"]]}
    refuses([system], "refuses this row", "first user turn", "System role", template=GEMMA)
    refuses([PAIR], "refuses this row", "first user turn", template=GEMMA, system="Be brief.")
    twice = {"messages": [TWO_TURNS["messages"][0]] * 2 + TWO_TURNS["messages"][1:2]}
    refuses([PAIR | twice], "refuses this row", "must alternate", template=GEMMA)
    refuses([{"messages": TWO_TURNS["messages"][1:]}], "refuses", "none before", template=GEMMA)


def test_what_needs_a_template():
    refuses([TWO_TURNS], "messages needs a chat template", template=None)
    with pytest.raises(DataError, match="needs a chat template"):
        one(PAIR, make_tokenizer(None), template="chat")
    with pytest.raises(DataError, match="no turns"):
        one({"text": "a"}, make_tokenizer(CHATML), template="chat")
    with pytest.raises(DataError, match="no prompt"):
        render_prompt({"text": "a"}, make_tokenizer(CHATML))
    with pytest.raises(DataError, match="without an answer"):
        reference_text({"prompt": "a"})


def test_template_none_leaves_a_chat_tokenizer_plain():
    tokenizer = make_tokenizer(CHATML)
    example = one(PAIR, tokenizer, template="none")
    assert tokenizer.decode(example.input_ids) == "What is the capital of France?Paris.</s>"
    assert stop_token_ids(tokenizer, SftOptions(template="none")) == [tokenizer.eos_token_id]


def test_options_are_checked():
    for wrong in (
        {"max_length": 1},
        {"template": "jinja"},
        {"on_too_long": "split"},
        {"columns": {"promt": "a"}},
    ):
        with pytest.raises(ConfigError):
            SftOptions(**wrong)


def test_the_report_is_plain_json():
    report = build([PAIR, OTHER], make_tokenizer(CHATML)).report.to_json()
    assert json.loads(json.dumps(report)) == report
    assert report["num_rows"] == 2
    assert report["template_sha256"] is not None
    assert report["num_learned_tokens"] < report["num_tokens"]


@pytest.mark.real
def test_smollm2_learns_the_answer_and_its_end(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    examples = build([PAIR, {"prompt": "cap", "completion": "ital of Café 北京 "}], tokenizer)
    assert [learned(tokenizer, example) for example in examples] == [
        ["Paris.<|im_end|>"],
        ["ital of Café 北京 <|im_end|>"],
    ]
    two = one(TWO_TURNS, tokenizer)
    assert learned(tokenizer, two) == ["First.<|im_end|>", "Second.<|im_end|>"]
    prompt = render_prompt(TWO_TURNS, tokenizer)
    assert two.input_ids[: len(prompt)] == prompt
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'])
def test_tools_are_rendered_as_a_list_or_as_json_text(tools):
    tokenizer = make_tokenizer(WITH_TOOLS, eos="<|im_end|>")
    example = one({**TWO_TURNS, "tools": tools}, tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("[add]")
    assert one({**TWO_TURNS, "tools": None}, tokenizer) == one(TWO_TURNS, tokenizer)
    assert one({**TWO_TURNS, "tools": " "}, tokenizer) == one(TWO_TURNS, tokenizer)


@pytest.mark.parametrize("tools", ["add", "{}", {"name": "add"}, ["add"], 3])
def test_tools_of_another_kind_are_refused(tools):
    with pytest.raises(DataError, match="a value of the wrong kind") as caught:
        one({**TWO_TURNS, "tools": tools}, make_tokenizer(WITH_TOOLS))
    assert "column 'tools'" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "Why?", "completion": "So."}, "Why?"),
        ({"instruction": "Add.", "input": "1+2", "output": "3"}, "Add.\n\n1+2"),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": "Two?"},
                    {"role": "assistant", "content": "2"},
                ]
            },
            "Two?",
        ),
    ],
)
def test_what_a_row_asks_is_said_without_the_template(row, asked):
    assert question_text(row) == asked


OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(template, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(OWN)
    tokenizer = make_tokenizer(template, eos="</s>")
    given = SftOptions(chat_template=str(file))
    assert given == SftOptions(chat_template=OWN)
    file.unlink()
    for row in (PAIR, TWO_TURNS):
        prompt = tokenizer.decode(render_prompt(row, tokenizer, given))
        assert prompt.startswith("[user] ")
        assert prompt.endswith("[assistant] ")
    (example,) = build_examples(load_rows([PAIR]), tokenizer, given)
    assert learned(tokenizer, example) == ["Paris.</s>"]
    assert stop_token_ids(tokenizer, given) == [tokenizer.eos_token_id]
    assert tokenizer.chat_template == template


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"chat_template": "absent.jinja"}, "cannot be read"),
        ({"chat_template": __file__.replace("test_sft", "__init__")}, "cannot be read"),
        ({"chat_template": OWN, "template": "none"}, "beside template: none"),
    ],
)
def test_a_template_of_ones_own_that_cannot_be(given, match):
    with pytest.raises(ConfigError, match=match):
        SftOptions(**given)


def test_a_file_that_is_no_template(tmp_path):
    (tmp_path / "notes.txt").write_text("a poem")
    with pytest.raises(ConfigError, match="not a chat template"):
        SftOptions(chat_template=str(tmp_path / "notes.txt"))
