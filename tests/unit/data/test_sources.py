import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lorakit.data.rows import Origin, Rows
from lorakit.data.sources import load_rows
from lorakit.errors import DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i} é"} for i in range(5)]


def write(path, rows=ROWS):
    name = path.name
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".jsonl"):
        path.write_text(lines, encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        sep = "\t" if name.endswith(".tsv") else ","
        text = "\n".join(sep.join(row.values()) for row in rows)
        path.write_text(f"{sep.join(rows[0])}\n{text}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("d.jsonl", "d.jsonl line 3"),
        ("d.jsonl.gz", "d.jsonl.gz line 3"),
        ("d.json", "d.json row 3"),
        ("d.csv", "d.csv row 3"),
        ("d.tsv", "d.tsv row 3"),
        ("d.parquet", "d.parquet row 3"),
    ],
)
def test_every_file_type_gives_the_same_rows_with_their_origin(tmp_path, name, origin):
    rows = load_rows(write(tmp_path / name))
    assert list(rows) == ROWS
    assert rows.origin(2) == origin
    assert rows.sha256 == load_rows(ROWS).sha256
    assert rows.columns == ["prompt", "completion"]


def test_a_string_names_a_file_and_limit_takes_the_first_rows(tmp_path):
    rows = load_rows(str(write(tmp_path / "d.jsonl")), limit=2)
    assert list(rows) == ROWS[:2]


def test_limit_stops_before_a_broken_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\nbroken\n')
    assert len(load_rows(path, limit=1)) == 1


def test_limit_below_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least 1"):
        load_rows(ROWS, limit=0)


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    rows = load_rows(path)
    assert list(rows) == [{"text": "a"}, {"text": "b"}]
    assert rows.origin(1) == "d.jsonl line 3"


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row["text"] for row in load_rows(path)] == ["a", "b"]


def test_a_table_s_fillers_are_not_part_of_its_rows(tmp_path):
    def call(name, **arguments):
        function = {"name": name, "arguments": arguments}
        return [{"role": "assistant", "tool_calls": [{"function": function}]}]

    rows = [
        {"messages": call("weather", city="Graz"), "note": "a"},
        {"messages": call("add", a=1, b=[2]), "note": None},
    ]
    assert list(load_rows(write(tmp_path / "d.parquet", rows))) == rows


def test_csv_quotes_keep_separators_and_line_breaks(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('\ufeffprompt,completion\n"a, b","c\nd"\n\n"""q""",\n', encoding="utf-8")
    rows = load_rows(path)
    assert list(rows) == [
        {"prompt": "a, b", "completion": "c\nd"},
        {"prompt": '"q"', "completion": ""},
    ]
    assert rows.origin(1) == "d.csv row 2"


def test_csv_fields_may_be_longer_than_the_csv_module_allows(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(load_rows(path)[0]["text"]) == 200_000


def test_a_directory_reads_all_its_files_in_order(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[2:])
    write(tmp_path / "a.csv", ROWS[:2])
    (tmp_path / "README.md").write_text("not data")
    rows = load_rows(tmp_path)
    assert list(rows) == ROWS
    assert [rows.origin(i) for i in (1, 2)] == ["a.csv row 2", "b.jsonl line 1"]


def test_a_directory_named_by_split_gives_train_unless_told(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[1:2])
    write(tmp_path / "valid.jsonl", ROWS[2:3])
    assert list(load_rows(tmp_path)) == ROWS[:2]
    assert list(load_rows(tmp_path, split="validation")) == ROWS[2:3]
    with pytest.raises(DataError, match="no files of the split 'test'") as caught:
        load_rows(tmp_path, split="test")
    assert "valid.jsonl" in str(caught.value)


def test_slices_and_selections_keep_their_origins(tmp_path):
    rows = load_rows(write(tmp_path / "d.jsonl"))
    assert rows[1:3].origin(1) == "d.jsonl line 3"
    assert rows.select([4, 0]).origin(0) == "d.jsonl line 5"
    assert rows.select([4, 0])[1] == ROWS[0]


def test_the_hash_is_of_content_and_order_not_of_key_order():
    one = load_rows([{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    same = load_rows([{"b": 2, "a": 1}, {"b": 4, "a": 3}])
    other = load_rows([{"a": 3, "b": 4}, {"a": 1, "b": 2}])
    assert one.sha256 == same.sha256 != other.sha256
    assert one.to_json() == {"source": "a list of rows", "num_rows": 2, "sha256": one.sha256}


def test_rows_need_one_origin_each():
    with pytest.raises(ValueError, match="2 rows but 1 origins"):
        Rows([{}, {}], [Origin("row", 1)], "x")


def fails(source, what, *parts, split=None):
    with pytest.raises(DataError) as caught:
        load_rows(source, split=split)
    text = str(caught.value)
    assert what in caught.value.what
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in text, text


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl")
    fails(str(tmp_path / "trian.jsonl"), "no such data file", "did you mean", "train.jsonl")
    fails(tmp_path / "zzz", "no such data file", "there: train.jsonl")
    fails(tmp_path / "no" / "d.jsonl", "no such data file", "no directory")


def test_a_bare_name_near_a_local_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    write(tmp_path / "reviews.jsonl")
    monkeypatch.chdir(tmp_path)
    fails("reviews", "no such data file", "did you mean reviews.jsonl?")
    fails("missing.jsonl", "no such data file")
    (tmp_path / "data").mkdir()
    fails("data/train", "no such data file", "an empty directory")


def test_wrong_file_type(tmp_path):
    (tmp_path / "d.xlsx").write_bytes(b"PK\x03\x04")
    fails(tmp_path / "d.xlsx", "unknown type", ".parquet", "'.xlsx'")
    (tmp_path / "d").write_text("x")
    fails(tmp_path / "d", "unknown type", "a name without type")
    fails(tmp_path / "d", "no splits", "split='train'", split="train")
    fails(ROWS, "no splits", split="train")


def test_a_directory_without_data(tmp_path):
    fails(tmp_path, "no data files", "an empty directory")
    (tmp_path / "notes.md").write_text("x")
    fails(tmp_path, "no data files", "notes.md")


@pytest.mark.parametrize(
    ("line", "what", "part"),
    [
        ('{"text": "b"', "malformed JSON line", "delimiter"),
        ("text", "malformed JSON line", "column 1"),
        ("[1, 2]", "must be a JSON object", "a list: [1, 2]"),
        ('"b"', "must be a JSON object", "a string"),
        ("null", "must be a JSON object", "null"),
        ("[" * 100_000, "malformed JSON line", ""),
    ],
)
def test_broken_json_lines_name_their_line(tmp_path, line, what, part):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    fails(path, what, "d.jsonl, line 3", part)


def test_a_json_list_under_the_name_jsonl(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('[\n{"text": "a"}\n]\n')
    fails(path, "malformed JSON line", "line 1", "belongs in a .json file")


def test_json_that_is_no_list_of_objects(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('{"data": []}')
    fails(path, "a list of objects", "an object")
    path.write_text('[{"a": 1}, 7]')
    fails(path, "must be a JSON object", "row 2", "a number: 7")
    path.write_text('[{"a": 1},')
    fails(path, "malformed JSON", "line 1")
    path.write_bytes(b'[{"a": "\xff"}]')
    fails(path, "not UTF-8", "byte 8")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
def test_empty_data(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b""))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    else:
        path.write_text({"d.json": "[]", "d.csv": "a,b\n"}.get(name, "\n"))
    fails(path, "the data is empty", name)


def test_an_empty_list_and_rows_that_are_no_dicts():
    fails([], "the data is empty")
    fails([{"a": 1}, 3], "a row must be a dict", "row 2", "int")


def test_files_of_no_bytes(tmp_path):
    (tmp_path / "d.csv").touch()
    fails(tmp_path / "d.csv", "the data is empty")
    (tmp_path / "d.json").touch()
    fails(tmp_path / "d.json", "malformed JSON")


def test_not_utf8(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n')
    fails(path, "not UTF-8", "line 2", "save the file as UTF-8")
    path = tmp_path / "d.csv"
    path.write_bytes(b"text\nok\n\xe9t\xe9\n")
    fails(path, "not UTF-8", "d.csv")


def test_a_wrong_suffix_is_recognised_by_its_bytes(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(gzip.compress(b"{}"))
    fails(path, "not UTF-8", "a gzip file")


def test_corrupt_gzip(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(b'{"text": "a"}\n')
    fails(path, "cannot unpack", "drop .gz")
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    path.write_bytes(whole[:-20])
    fails(path, "cannot unpack", "a whole gzip file")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError):
        load_rows(path)


def test_corrupt_parquet(tmp_path):
    path = write(tmp_path / "d.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "cannot read this Parquet file", "d.parquet")
    path.write_text("not parquet at all")
    fails(path, "cannot read this Parquet file")


@pytest.mark.parametrize(
    ("text", "what", "part"),
    [
        ("a,b\n1,2\n3\n", "too few fields", "row 2 (line 3)"),
        ("a,b\n1,2\n3,4,5\n", "too many fields", "2 fields: a, b"),
        ("a,a\n1,2\n", "does not name every column once", "'a', 'a'"),
        ("a,\n1,2\n", "does not name every column once", "''"),
        ('a,b\n"1"x,2\n', "malformed table", "after row 0"),
        ('a,b\n"1,2\n', "malformed table", "unexpected end of data"),
    ],
)
def test_broken_tables(tmp_path, text, what, part):
    path = tmp_path / "d.csv"
    path.write_text(text)
    fails(path, what, "d.csv", part)


def test_a_hub_id_without_a_network():
    fails("nobody/nothing", "the hub cannot be reached", "nobody/nothing, split train", "network")


def test_a_link_to_itself(tmp_path):
    path = tmp_path / "d.jsonl"
    path.symlink_to(path)
    fails(path, "no such data file")


def test_an_index_column_without_a_name_is_taken_along(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(",prompt,completion\n0,question 0,answer 0\n1,question 1,answer 1\n")
    rows = load_rows(path)
    assert [row["completion"] for row in rows] == ["answer 0", "answer 1"]


def test_a_data_set_that_was_saved_to_disk(tmp_path):
    one = tmp_path / "one"
    table = datasets.Dataset.from_list(ROWS)
    table.select([3, 1]).save_to_disk(one)
    rows = load_rows(one)
    assert list(rows) == [ROWS[3], ROWS[1]]
    assert rows.origin(1) == f"{one} row 2"
    fails(one, "no splits", "train", split="train")

    several = tmp_path / "several"
    datasets.DatasetDict(train=table, dev=table.select([2])).save_to_disk(several)
    assert list(load_rows(str(several), limit=2)) == ROWS[:2]
    assert list(load_rows(several, split="validation")) == [ROWS[2]]
    fails(several, "no split 'test'", "train, dev", split="test")
    (one / "dataset_info.json").write_text("{")
    fails(one, "cannot read this saved data set", "one")
