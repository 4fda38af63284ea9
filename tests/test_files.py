"""The forms that tables come in, where they are found, and what files call their columns."""

import gzip
import io
import sys
import unicodedata
import zipfile

import kernel_utils as ku
import numpy as np
import pandas as pd
import pretraining
import pytest

from conftest import trained

TRAIN = "id,excerpt,target\na,a cat sat,1.5\nb,the dog ran,-2\nc,a red hat,0\n"
TEST = "id,excerpt\nx,a cat\ny,a dog\n"
SAMPLE = "id,target\ny,0\nx,0\n"


def packed(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return stream.getvalue()


def parquet(frame):
    stream = io.BytesIO()
    frame.to_parquet(stream)
    return stream.getvalue()


@pytest.fixture
def read(tmp_path):
    """Function: {name: content} of files and settings -> the three frames that are read."""

    def frames(files, **settings):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ku.read_competition(ku.Config(**(dict(data_dir=str(tmp_path)) | settings)))

    return frames


@pytest.fixture
def refusal(read):
    def message(files, **settings):
        with pytest.raises(ku.DataError) as error:
            read(files, **settings)
        return str(error.value)

    return message


# ---------------------------------------------------------------------------------------
# Forms


def as_tsv(text):
    return text.replace(",", "\t")


def as_jsonl(text):
    frame = pd.read_csv(io.StringIO(text))
    return frame.to_json(orient="records", lines=True)


FORMS = {
    "csv": lambda text: text,
    "CSV": lambda text: text,
    "csv.gz": lambda text: gzip.compress(text.encode()),
    "csv.zip": lambda text: packed(**{"a/table.csv": text, "__MACOSX/a/._table.csv": "x"}),
    "zip": lambda text: packed(**{"other.tsv": as_tsv(text)}),
    "tsv": lambda text: b"\xef\xbb\xbf" + as_tsv(text).replace("\n", "\r\n").encode(),
    "tsv.gz": lambda text: gzip.compress(as_tsv(text).encode()),
    "jsonl": as_jsonl,
    "jsonl.zip": lambda text: packed(**{"x.jsonl": as_jsonl(text)}),
    "parquet": lambda text: parquet(pd.read_csv(io.StringIO(text))),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_the_same_in_every_form(read, form, capsys):
    tables = {"Train": TRAIN, "test": TEST, "sampleSubmission": SAMPLE}
    train, test, sample = read({f"{name}.{form}": FORMS[form](text) for name, text in tables.items()})
    expected = [["a", "a cat sat", 1.5], ["b", "the dog ran", -2.0], ["c", "a red hat", 0.0]]
    assert list(train.columns) == ["id", "excerpt", "target"] and train.to_numpy().tolist() == expected
    assert test.to_numpy().tolist() == [["x", "a cat"], ["y", "a dog"]]
    assert sample.to_numpy().tolist() == [["y", "0"], ["x", "0"]] and sample.attrs["header"] == ["id", "target"]
    assert capsys.readouterr().out == "3 training rows, 2 test rows\n"


def test_cells_of_jsonl_are_the_text_that_stands_in_them_and_what_an_object_lacks_is_empty(read):
    lines = '{"id": 1, "excerpt": "a \\ud83d\\ude00", "target": 1.50}\n\n'
    lines += '{"id": 1.0, "target": -2e-1, "excerpt": "a dog", "grade": 3, "lists": [1]}\n'
    lines += '{"id": 12345678901234567890, "excerpt": "a\\rcat", "target": 3, "grade": null, "ok": true}\n'
    train, _, _ = read({"train.jsonl": lines})
    assert train["id"].tolist() == ["1", "1.0", "12345678901234567890"]
    assert train["excerpt"].tolist() == ["a \U0001f600", "a dog", "a\rcat"]
    assert train["target"].tolist() == [1.5, -0.2, 3.0]
    assert train["grade"].tolist() == ["", "3", ""] and train["ok"].tolist() == ["", "", "True"]


def test_cells_of_parquet_are_written_as_people_write_them(read):
    frame = pd.DataFrame(
        {
            "id": pd.array([1, 2, 3], dtype="Int64"),
            "excerpt": pd.Categorical(["a cat", "a dog", "a cat"]),
            "target": np.float32([0.1, 2, 3]),
            "grade": pd.array([3, None, 5], dtype="Int64"),
            "share": [0.5, None, 3.0],
            "lists": [[1], [2], [3]],
        }
    )
    train, _, _ = read({"train.parquet": parquet(frame.set_index("id"))})
    assert train["id"].tolist() == ["1", "2", "3"] and train["excerpt"].tolist() == ["a cat", "a dog", "a cat"]
    assert train["target"].tolist() == [0.1, 2.0, 3.0]
    assert train["grade"].tolist() == ["3", "", "5"] and train["share"].tolist() == ["0.5", "", "3.0"]


LISTS = '{"id": 1, "excerpt": "a", "target": 1}\n{"id": 2, "excerpt": ["a", "b"], "target": 1}\n'


@pytest.mark.parametrize(
    "files, parts",
    [
        ({"train.zip": packed(**{"train.csv": TRAIN, "test.csv": TEST})}, ["train.zip", "'train.csv', 'test.csv'"]),
        ({"train.csv.zip": packed(**{"../train.csv": TRAIN})}, ["train.csv.zip", "'../train.csv'"]),
        ({"train.zip": packed(**{"images.bin": "x"})}, ["train.zip", "csv, tsv, jsonl or parquet", "images.bin"]),
        ({"train.csv.zip": packed(**{"train.csv": TRAIN})[:-30]}, ["train.csv.zip: cannot be read"]),
        ({"train.csv.gz": gzip.compress(TRAIN.encode())[:-9]}, ["train.csv.gz: cannot be read"]),
        ({"train.parquet": b"PAR1"}, ["train.parquet: cannot be read"]),
        ({"train.csv": TRAIN.encode("utf-16")}, ["train.csv, line 1", "UTF-8"]),
        ({"train.tsv": TRAIN}, ["train.tsv: the header is one name", "separated by tabs?"]),
        ({"train.csv": TRAIN.replace(",", ";")}, ["train.csv: the header is one name", "separated by commas?"]),
        ({"train.jsonl": '{"id": 1}\n{"id": \n'}, ["train.jsonl, line 2: not JSON"]),
        ({"train.jsonl": '[{"id": 1}]\n'}, ["train.jsonl, line 1: expected a JSON object"]),
        ({"train.jsonl": LISTS}, ["column excerpt: expected text", "row 2 (id 2): \"['a', 'b']\""]),
        ({"train.jsonl": LISTS.replace('["a", "b"]', '"\\ud800"')}, ["column excerpt", "row 2 (id 2): '\\ud800'"]),
        ({"train.csv": "id,excerpt, target,target\na,b,1,2\n"}, ["'target' twice"]),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_what_it_is(refusal, files, parts):
    message = refusal(files)
    assert [part for part in parts if part not in message] == []


def test_parquet_without_pyarrow_says_what_to_install(refusal, monkeypatch):
    frame = pd.DataFrame({"id": ["a"]})
    content = parquet(frame)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refusal({"train.parquet": content})


@pytest.mark.parametrize(
    "train, line",
    [
        ("id,ex\rcerpt,target\na,b,1\n", 1),
        (TRAIN.replace("a cat", "a\rcat"), 2),
        (TRAIN.replace("a cat", "a\rcat").replace("\n", "\r\n"), 2),
        ("id,target,excerpt\na,1,a cat\nb,2,a dog\r\r\nc,3,a hat\n", 3),
        (TRAIN.replace("red hat", "red\rhat").rstrip("\n"), 4),
        (TRAIN.replace(",1.5\n", ",1.5\r"), 2),
    ],
    ids=["header", "first row", "CRLF", "end of a text", "last row", "between rows"],
)
def test_a_carriage_return_that_tears_a_row_is_refused_with_its_line(refusal, train, line):
    assert f"train.csv, line {line}: a lone carriage return (\\r)" in refusal({"train.csv": train})


@pytest.mark.parametrize(
    "train, text",
    [
        (TRAIN.replace("\n", "\r"), "a cat sat"),
        (TRAIN.replace("\n", "\r").replace("a cat sat", '"a\ncat"'), "a\ncat"),
        (TRAIN.replace("a cat sat", '"a\rcat"'), "a\rcat"),
        (TRAIN.replace("\n", "\r\n").replace("a cat sat", '"a\rcat\r\nsat"'), "a\rcat\r\nsat"),
        (TRAIN.replace("\n", "\r\r\n"), "a cat sat"),
    ],
    ids=["old Mac", "old Mac, quoted", "quoted", "CRLF, quoted", "doubled"],
)
def test_carriage_returns_that_end_every_row_or_stand_in_quotes_are_read(read, train, text):
    frame, _, _ = read({"train.csv": train})
    assert frame["id"].tolist() == ["a", "b", "c"] and frame["excerpt"].iloc[0] == text


# ---------------------------------------------------------------------------------------
# Names of files


@pytest.mark.parametrize(
    "name",
    [
        "SampleSubmission",
        "sample-submission",
        "sample_sub",
        "sample submission",
        "submission_sample",
        "Sample_Submission",
    ],
)
def test_a_sample_is_found_under_its_usual_spellings(read, name):
    _, _, sample = read({"train.csv": TRAIN, "test.csv": TEST, f"{name}.csv": SAMPLE})
    assert sample["id"].tolist() == ["y", "x"]


def test_files_of_other_names_are_read_by_setting_also_from_other_folders(read, tmp_path, capsys):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "hidden.csv").write_text(TEST)
    files = {"data/en/labelled.csv": TRAIN, "data/fmt.tsv": as_tsv(SAMPLE), "data/test.json": "[]"}
    names = dict(train_file="en/labelled.csv", test_file=str(tmp_path / "made/hidden.csv"), sample_file="fmt.tsv")
    train, test, sample = read(files, data_dir=str(tmp_path / "data"), **names)
    assert (len(train), len(test), len(sample)) == (3, 2, 2)
    assert "not read in" in capsys.readouterr().out


def test_train_csv_wins_over_other_forms_and_what_is_not_read_is_printed(read, capsys):
    others = {"train.parquet": "x", "test_labels.csv": "x", "sample_sub_v2.xlsx": "x", "latest_news.csv": "x"}
    read({"train.csv": TRAIN, "test.csv": TEST} | others)
    line = capsys.readouterr().out.splitlines()[0]
    assert ": sample_sub_v2.xlsx, test_labels.csv, train.parquet (" in line and "news" not in line
    assert all(name in line for name in ("train_file", "test_file", "sample_file"))


@pytest.mark.parametrize(
    "files, settings, parts",
    [
        ({"train.tsv": "", "train.jsonl": ""}, {}, ["train.jsonl, train.tsv", "set train_file"]),
        ({"train.csv": TRAIN, "sample_sub.csv": "", "submissionSample.csv": ""}, {}, ["set sample_file"]),
        ({"train.csv": TRAIN}, dict(train_file="b.csv"), ["has no b.csv", "it has train.csv", "train_file"]),
        ({"train.csv": TRAIN}, dict(test_file="b.csv"), ["has no b.csv", "test_file"]),
        ({"train.csv": TRAIN, "test.json": "[]"}, {}, ["test.json", "not a form that is read", "test_file"]),
        ({"train.csv": TRAIN, "Test.csv.bz2": "[]"}, {}, ["Test.csv.bz2", "not a form that is read", "test_file"]),
        ({"train.xlsx": TRAIN}, {}, ["no train.csv", "csv, tsv, jsonl or parquet", "train.xlsx"]),
    ],
)
def test_a_table_that_is_not_there_not_the_only_one_or_not_readable_is_refused(refusal, files, settings, parts):
    message = refusal(files, **settings)
    assert [part for part in parts if part not in message] == []


def test_on_kaggle_a_competition_is_found_by_any_form_of_its_tables(read, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    zipped = {f"input/competitions/quora/{name}.csv.zip": packed(**{f"{name}.csv": text})
              for name, text in {"train": TRAIN, "test": TEST, "sample_submission": SAMPLE}.items()}  # fmt: skip
    train, test, sample = read(zipped | {"input/datasets/me/data/train.csv": "x"}, data_dir="")
    assert (len(train), len(test), len(sample)) == (3, 2, 2)
    assert ku._find_data_dir(ku.Config(), "test").path == tmp_path / "input/competitions/quora"


def test_inference_reads_the_file_of_the_run_or_the_one_it_is_given(runs, tmp_path):
    run = ku.Bundle.open(runs / "one")
    (tmp_path / "rows.jsonl").write_text(as_jsonl(TEST))
    with pytest.raises(ku.DataError, match=r"no test\.csv .*it has rows\.jsonl: set data_dir or test_file"):
        ku.read_test_set(run, str(tmp_path))
    test, sample = ku.read_test_set(run, str(tmp_path), "rows.jsonl")
    assert test["id"].tolist() == ["x", "y"] and sample is None


def test_pretraining_reads_the_same_forms(tmp_path):
    (tmp_path / "train.tsv").write_text(as_tsv(TRAIN))
    (tmp_path / "more.jsonl").write_text(as_jsonl(TEST))
    cfg = pretraining.PretrainConfig(data_dir=str(tmp_path), test_file="more.jsonl")
    texts, counts = pretraining._read_texts(cfg)
    assert texts == ["a cat sat", "the dog ran", "a red hat", "a cat", "a dog"]
    assert counts == {"train.tsv": 3, "more.jsonl": 2, "empty": 0, "repeated": 0}


# ---------------------------------------------------------------------------------------
# Names of columns, ids


def test_blanks_around_names_do_not_count_in_files_and_settings(read):
    columns = dict(id_column=" key", text_columns=" text", target_columns="score ", error_column=" sd ")
    train, test, sample = read(
        {
            "train.csv": "key , text, score, sd\na,a cat,1,2\nb,a dog,2,2\n",
            "test.csv": "key, text\nx,a cat\n",
            "sample_submission.csv": "key, score\nx,0\n",
        },
        **columns,
        error_weights=True,
    )
    assert list(train.columns) == ["key", "text", "score", "sd"] and test["text"].tolist() == ["a cat"]
    assert list(sample.columns) == ["key", "score"] and sample.attrs["header"] == ["key", " score"]


@pytest.mark.parametrize("value", ['"Loss, damage",Other', '["Loss, damage", "Other"]', ["Loss, damage", "Other"]])
def test_a_name_with_a_comma_is_quoted_or_in_a_list(value):
    assert ku.Config(target_columns=value).target_columns == ["Loss, damage", "Other"]


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_the_column_without_a_name_can_be_the_ids_beside_one_that_pandas_named(read, name):
    train, test, sample = read(
        {
            "train.csv": ",Unnamed: 1,excerpt,target\n7,0,a cat,1\n8,0,a dog,2\n",
            "test.csv": ",excerpt\n3,a cat\n",
            "sample_submission.csv": ",target\n3,0\n",
        },
        id_column=name,
    )
    assert train[name].tolist() == ["7", "8"] and test[name].tolist() == sample[name].tolist() == ["3"]
    assert sample.attrs["header"] == ["", "target"]


IDS = "{},excerpt,target\n7,a cat,1\n8,a dog,2\n"
ASKED = "{},excerpt\n3,a cat\n4,a dog\n"
WANTED = "{},target\n4,0\n3,0\n"


@pytest.mark.parametrize(
    "files, settings, train_ids, test_ids",
    [
        ([IDS.format("id"), ASKED.format("test_id"), WANTED.format("test_id")], {}, ["7", "8"], ["3", "4"]),
        ([IDS.format("id"), ASKED.format("test_id")], {}, ["7", "8"], ["3", "4"]),
        ([IDS.format("id"), ASKED.format("id,key"), WANTED.format("key")], {}, ["7", "8"], None),
        ([IDS.format("id"), ASKED.format("ref"), WANTED.format("key")], {}, ["7", "8"], ["3", "4"]),
        ([IDS.format("id"), ASKED.format("id"), WANTED.format("key")], {}, ["7", "8"], ["3", "4"]),
        ([IDS.format("id"), ASKED.format("k")], dict(test_id_column="k"), ["7", "8"], ["3", "4"]),
        ([IDS.format("textID"), ASKED.format("textID"), WANTED.format("textID")], {}, ["7", "8"], ["3", "4"]),
        ([IDS.format(""), ASKED.format("id")], {}, ["7", "8"], ["3", "4"]),
        (["excerpt,target\na cat,1\na dog,2\n", "excerpt\na\nb\n"], {}, ["train-1", "train-2"], ["0", "1"]),
        (["excerpt,target\na cat,1\n", "excerpt\na\nb\n", WANTED.format("row")], {}, ["train-1"], ["4", "3"]),
        (["essay_id,prompt_id,excerpt,target\n7,1,a,1\n8,1,b,2\n"], {}, ["7", "8"], None),
        (["essay_id,prompt_id,excerpt,target\n7,1,a,1\n8,2,b,2\n"], {}, ["train-1", "train-2"], None),
    ],
)
def test_ids_are_found_whatever_files_call_them(read, files, settings, train_ids, test_ids):
    if files[1:] and files[1].startswith("id,key"):
        files[1] = "id,key,excerpt\n0,3,a cat\n0,4,a dog\n"
        test_ids = ["3", "4"]
    names = ["train.csv", "test.csv", "sample_submission.csv"]
    train, test, sample = read(dict(zip(names, files, strict=False)), **settings)
    assert train["id"].tolist() == train_ids
    assert (test is None and test_ids is None) or test["id"].tolist() == test_ids
    assert sample is None or sample["id"].tolist() == ["4", "3"]


@pytest.mark.parametrize(
    "train, test, sample, settings, parts",
    [
        (TRAIN, None, None, dict(id_column="idd"), ["no column 'idd' (did you mean id?)"]),
        (TRAIN, TEST, None, dict(test_id_column="key"), ["test.csv: no column 'key'"]),
        (TRAIN, "excerpt\na\nb\n", "row,target\n1,0\n", {}, ["test.csv: no column 'id'"]),
        (IDS.format("key"), "excerpt\na\nb\n", None, dict(id_column="key"), ["test.csv: no column 'key'"]),
    ],
)
def test_ids_that_cannot_be_found_are_refused(refusal, train, test, sample, settings, parts):
    files = {"train.csv": train, "test.csv": test, "sample_submission.csv": sample}
    message = refusal({name: text for name, text in files.items() if text}, **settings)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    "test, sample, header",
    [
        (",excerpt\n3,a cat\n4,a dog\n", ",target\n4,0\n3,0\n", ",target"),
        ("test_id,excerpt\n3,a cat\n4,a dog\n", "test_id, target\n4,0\n3,0\n", "test_id, target"),
        ("test_id,excerpt\n3,a cat\n4,a dog\n", None, "test_id,target"),
    ],
)
def test_a_submission_has_the_header_of_the_sample_or_the_id_of_the_test(tiny, competition, test, sample, header):
    (competition / "test.csv").write_text(test)
    (competition / "sample_submission.csv").unlink()
    if sample:
        (competition / "sample_submission.csv").write_text(sample)
    lines = (trained(tiny()) / "submission.csv").read_text().splitlines()
    assert lines[0] == header
    assert [line.split(",")[0] for line in lines[1:]] == (["4", "3"] if sample else ["3", "4"])


# ---------------------------------------------------------------------------------------
# Texts and labels


def test_rows_without_any_text_are_left_out_with_their_number_and_rows_keep_theirs(read, refusal, capsys):
    text = "id,excerpt,more,target\na,,x,1\nb,y,,2\nb, ,,none\nd,q,r,4\n"
    train, _, _ = read({"train.csv": text}, text_columns="excerpt,more")
    assert train["id"].tolist() == ["a", "b", "d"] and train["more"].tolist() == ["x", "", "r"]
    assert "train.csv: 1 rows without a text are left out, the first is row 3" in capsys.readouterr().out
    assert "row 4 (id d): 'q'" in refusal({"train.csv": text.replace("r,4", "r,q")}, text_columns="excerpt,more")


def test_numbers_are_texts_beside_a_text_or_on_request(read, refusal):
    train = {"train.csv": "id,excerpt,answer,target\na,what is it?,7,1\nb,and now?,12.5,2\n"}
    read(train, text_columns="excerpt,answer")
    assert "numeric_texts" in refusal(train, text_columns="answer")
    assert read(train, text_columns="answer", numeric_texts=True)[0]["answer"].tolist() == ["7", "12.5"]


def labelled(labels):
    return {"train.csv": "id,excerpt,target\n" + "".join(f"{i},a cat,{label}\n" for i, label in enumerate(labels))}


ACCENTED = "caf\xe9"


@pytest.mark.parametrize(
    "one, other",
    [("1", "1.0"), ("2.5", "2.50"), ("Yes", "yes"), ("no", " no "), ("New York", "NewYork"), ("A", "\uff21"),
     (ACCENTED, unicodedata.normalize("NFD", ACCENTED))],
)  # fmt: skip
def test_labels_that_differ_only_in_how_they_are_written_are_warned_of_with_their_rows(read, one, other):
    with pytest.warns(UserWarning, match="differ only in how they are written") as caught:
        read(labelled([one, other, one, "red"]), task="multiclass")
    assert f"{one!r} 2, {other!r} 1" in str(caught[0].message) and "red" not in str(caught[0].message)


def test_classes_are_printed_with_their_rows_up_to_ten(read, capsys):
    read(labelled([*"aab", *"cdefghijkl"]), task="multiclass")
    assert "12 classes with their rows: 'a' 2, 'b' 1, " in (line := capsys.readouterr().out.splitlines()[0])
    assert line.endswith("'j' 1 and 2 more")
