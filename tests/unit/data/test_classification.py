"""Rows of GLUE's formats to examples, and every way in which a row can be wrong."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tiny_classifiers
from lorakit.data.classification import build_classification
from lorakit.data.classify_options import ClassifyOptions, find_columns, targets_of
from lorakit.data.collate import ClassifyCollator
from lorakit.data.sources import load_rows
from lorakit.data.targets import Targets, find_targets
from lorakit.errors import ConfigError, DataError

TWO = Targets(("0", "1"))


@pytest.fixture(scope="module")
def encoder():
    return tiny_classifiers.tokenizer()


@pytest.fixture(scope="module")
def decoder():
    return tiny_classifiers.tokenizer(encoder=False)


def build(rows, tokenizer, targets=TWO, **options):
    given = load_rows(rows) if isinstance(rows, list) else rows
    return build_classification(given, tokenizer, ClassifyOptions(**options), targets)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("sentence", "label"), ("sentence", None, "label")),
        (("text", "label"), ("text", None, "label")),
        (("idx", "sentence1", "sentence2", "label"), ("sentence1", "sentence2", "label")),
        (("question", "sentence", "label"), ("question", "sentence", "label")),
        (("question1", "question2", "label"), ("question1", "question2", "label")),
        (("premise", "hypothesis", "label"), ("premise", "hypothesis", "label")),
        (("text_a", "text_b", "labels"), ("text_a", "text_b", "labels")),
        (("sentence1", "sentence2", "score", "genre"), ("sentence1", "sentence2", "score")),
    ],
)
def test_columns_are_guessed(names, expected):
    found = find_columns(load_rows([dict.fromkeys(names, "x")]), ClassifyOptions())
    assert (found.text, found.text_pair, found.label) == expected


def test_named_columns_win():
    rows = load_rows([{"sentence": "a", "review": "b", "stars": 1, "label": 0}])
    options = ClassifyOptions(columns={"text": "review", "label": "stars"})
    found = find_columns(rows, options)
    assert (found.text, found.text_pair, found.label) == ("review", None, "stars")


@pytest.mark.parametrize(
    ("row", "columns", "says"),
    [
        ({"body": "a", "label": 0}, {}, "no column holds the text"),
        ({"sentence": "a", "gold": 0}, {}, "no column holds the label"),
        ({"sentence": "a", "label": 0}, {"text": "sentense"}, "sentense"),
        ({"sentence": "a", "label": 0}, {"text_pair": "sentence"}, "a second text needs a first"),
    ],
)
def test_columns_that_are_missing(row, columns, says):
    with pytest.raises((DataError, ConfigError)) as caught:
        find_columns(load_rows([row]), ClassifyOptions(columns=columns))
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".csv", ".tsv", ".parquet"])
def test_every_file_type_gives_the_same_examples(tmp_path, encoder, kind):
    made = tiny_classifiers.rows(6)
    path = tmp_path / f"rows{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in made)
    separated = {".csv": ",", ".tsv": "\t"}.get(kind)
    if kind == ".jsonl":
        path.write_text(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(made), path)
    else:
        table = [list(made[0]), *([str(v) for v in row.values()] for row in made)]
        path.write_text("".join(separated.join(fields) + "\n" for fields in table))
    rows = load_rows(path)
    targets = targets_of(rows, ClassifyOptions())
    assert targets.names == ("0", "1")
    assert list(build(rows, encoder, targets)) == list(build(made, encoder))


def labelled(values):
    return load_rows([{"sentence": "w1", "label": value} for value in values])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 0, 1], ("0", "1")),
        (["1", "0", "10", "2"], ("0", "1", "2", "10")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([True, False], ("0", "1")),
        (["yes", "no ", "yes"], ("no", "yes")),
        ([3, 5, 3, 5], ("3", "5")),
        ([2.5, 3.0], ()),
        (["3.80", "4"], ()),
    ],
)
def test_labels_are_found_out(values, names):
    assert find_targets(labelled(values), "label").names == names


def test_what_was_decided_is_said():
    (note,) = find_targets(labelled([0.5, 5.0, 2.0]), "label").notes
    assert "from 0.5 to 5" in note
    assert "regression" in note
    (note,) = find_targets(labelled([3, 5]), "label").notes
    assert "3, 5 become the class ids 0 to 1" in note


def test_labels_of_the_bases_own_head_keep_its_order():
    known = ("POSITIVE", "mixed", "negative")
    targets = find_targets(labelled(["negative", "positive"]), "label", known=known)
    assert targets.names == ("positive", "mixed", "negative")
    assert "the base's own head" in targets.notes[0]
    # Another task's labels, and numbers, say nothing of these outputs.
    assert find_targets(labelled(["spam", "mixed"]), "label", known=known).names == (
        "mixed",
        "spam",
    )
    assert find_targets(labelled([1, 0]), "label", known=("1", "0")).names == ("0", "1")


def test_numbers_are_a_regression_when_told():
    targets = find_targets(labelled([1, 2, 3]), "label", kind="regression")
    assert targets.regression
    assert targets.num_outputs == 1
    assert targets.read("2.5", where="here") == 2.5


def test_given_classes_keep_their_order_and_take_names_or_numbers():
    targets = find_targets(labelled(["b", "a"]), "label", classes=("b", "a", "c"))
    assert targets.names == ("b", "a", "c")
    assert [targets.read(v, where="here") for v in ("a", 0, "2", " c")] == [1, 0, 2, 2]
    # Where the names are numbers, a number is a name and never a place.
    assert Targets(("3", "5")).read(5, where="here") == 1
    with pytest.raises(DataError):
        Targets(("3", "5")).read(0, where="here")


@pytest.mark.parametrize(
    ("values", "kind", "says", "where"),
    [
        ([0, 1, None], "auto", "without a label", "row 3"),
        (["a", " "], "auto", "without a label", "row 2"),
        ([0, 0, 0], "auto", "the same label", "a list of rows"),
        ([0, "1"], "auto", "of two kinds", "row 2"),
        ([0, [1]], "auto", "cannot be a class", "row 2"),
        ([0.5, 1.0], "classes", "cannot be a class", "row 1"),
        (list(range(12)), "auto", "nearly every row", "a list of rows"),
    ],
)
def test_labels_that_cannot_be(values, kind, says, where):
    with pytest.raises(DataError) as caught:
        find_targets(labelled(values), "label", kind=kind)
    assert says in caught.value.what
    assert where in caught.value.where


@pytest.mark.parametrize("value", ["high", "nan", float("inf"), [1.0], {}])
def test_a_regression_target_that_is_no_number(encoder, value):
    rows = [{"sentence": "w1", "label": 2.5}, {"sentence": "w2", "label": value}]
    with pytest.raises(DataError, match="not a number") as caught:
        build(rows, encoder, Targets(()))
    assert "row 2, column 'label'" in caught.value.where


@pytest.mark.parametrize("value", [2, "yes", -1, "01"])
def test_a_label_outside_the_classes(encoder, value):
    rows = [{"sentence": "w1", "label": 0}, {"sentence": "w2", "label": value}]
    with pytest.raises(DataError, match="none of the classes") as caught:
        build(rows, encoder)
    assert "row 2, column 'label'" in caught.value.where
    assert caught.value.expected == "0, 1"
    assert ("GLUE" in caught.value.remedy) == (value == -1)


@pytest.mark.parametrize("text", ["", "  ", None, 3])
@pytest.mark.parametrize("column", ["sentence1", "sentence2"])
def test_text_that_is_missing(encoder, column, text):
    rows = [{"sentence1": "w1", "sentence2": "w2", "label": 0} for _ in range(3)]
    rows[2][column] = text
    with pytest.raises(DataError, match="without text") as caught:
        build(rows, encoder)
    assert f"row 3, column '{column}'" in caught.value.where


def test_a_pair_is_encoded_as_the_tokenizer_does(encoder):
    (example,) = build([{"sentence1": "w3 w4", "sentence2": "w5", "label": 1}], encoder)
    assert example.input_ids == [1, 7, 8, 2, 9, 2]
    assert example.token_type_ids == [0, 0, 0, 0, 1, 1]
    assert example.label == 1


def test_a_tokenizer_without_a_separator_gets_a_line_break(decoder):
    examples = build([{"sentence1": "w3", "sentence2": "w5", "label": 1}], decoder)
    assert examples[0].token_type_ids is None
    assert examples.report.joined
    assert any("line break" in note for note in examples.report.notes)


def test_long_rows_are_cut_counted_and_keep_their_ends(encoder):
    rows = [
        {"sentence1": "w1 " * 20, "sentence2": "w2 w3", "label": 1},
        {"sentence1": "w1", "sentence2": "w2", "label": 0},
    ]
    examples = build(rows, encoder, max_length=10)
    assert [len(example) for example in examples] == [10, 5]
    # The longer sentence is cut; both ends and the whole second sentence stay.
    assert examples[0].input_ids[-4:] == [2, 6, 7, 2]
    assert examples.report.num_cut == 1
    assert "1 of 2 rows are cut at 10 tokens" in examples.report.notes
    dropped = build(rows, encoder, max_length=10, on_too_long="drop")
    assert [example.row for example in dropped] == [1]
    assert dropped.report.num_dropped == 1
    with pytest.raises(DataError, match="longer than max_length"):
        build(rows, encoder, max_length=10, on_too_long="error")
    with pytest.raises(DataError, match="no row is left"):
        build(rows[:1], encoder, max_length=10, on_too_long="drop")


def test_the_limit_is_what_model_and_tokenizer_can_read(encoder):
    rows = load_rows([{"sentence": "w1 " * 90, "label": 1}])
    examples = build_classification(rows, encoder, ClassifyOptions(), TWO, context=30)
    assert len(examples[0]) == 30
    assert len(build(rows, encoder)[0]) == 48
    with pytest.raises(ConfigError, match="longer than what the model can read"):
        build_classification(rows, encoder, ClassifyOptions(max_length=49), TWO, context=512)


def test_the_report_counts(encoder):
    examples = build(tiny_classifiers.rows(7), encoder, Targets(("0", "1", "2")))
    report = examples.report.to_json()
    assert report["class_counts"] == {"0": 4, "1": 3, "2": 0}
    assert "no row has the label 2" in report["notes"]
    assert report["num_tokens"] == sum(examples.lengths)
    assert report["columns"] == {
        "text": "sentence1",
        "text_pair": "sentence2",
        "label": "label",
    }
    scores = build(tiny_classifiers.rows(5, kind="score"), encoder, Targets(()))
    assert scores.report.label_mean == pytest.approx(sum(e.label for e in scores) / 5)
    json.dumps(report)


def test_the_batch_is_padded_on_the_right(encoder):
    examples = build(
        [
            {"sentence1": "w3 w4", "sentence2": "w5", "label": 1},
            {"sentence1": "w3", "sentence2": "w5", "label": 0},
        ],
        encoder,
    )
    batch = ClassifyCollator(9, regression=False)(examples)
    assert batch["input_ids"].tolist() == [[1, 7, 8, 2, 9, 2], [1, 7, 2, 9, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["labels"].dtype == torch.int64
    scores = build(tiny_classifiers.rows(3, kind="score"), encoder, Targets(()))
    assert ClassifyCollator(0, regression=True)(scores)["labels"].dtype == torch.float32


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="unknown role 'txt'"):
        ClassifyOptions(columns={"txt": "a"})
    with pytest.raises(ConfigError, match="cannot be the classes"):
        ClassifyOptions(classes=("a", "a"))
    with pytest.raises(ConfigError, match="a regression has no classes"):
        ClassifyOptions(classes=("a", "b"), labels="regression")


def test_targets_survive_json():
    for targets in (TWO, Targets(())):
        assert Targets.from_json(json.loads(json.dumps(targets.to_json()))) == targets
    with pytest.raises(ValueError, match="classes need names"):
        Targets.from_json({"kind": "classes", "names": []})
