"""Hostile input: each ends in one error that names its place, with nothing written, or else is taken as it stands."""

import csv
import functools
import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import kernel_utils as ku
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_texts, tiny_config, trained

NUL = "\x00"


def content_of(path):
    """What a path is: the target of a link, the bytes of a file, and else its kind."""
    if path.is_symlink():
        return os.readlink(path)
    return path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else path.lstat().st_mode


def snapshot(folder):
    return {str(path): content_of(path) for path in sorted(folder.rglob("*"))}


@pytest.fixture
def train(competition, backbone_folder, tmp_path, monkeypatch):
    """Function: settings -> folder of a quick run that was made as train.ipynb makes it."""
    monkeypatch.chdir(tmp_path)
    base = dict(data_dir=str(competition), backbone=str(backbone_folder("tiny")), n_folds=2, epochs=1, max_length=32)
    return lambda settings: trained(ku.Config.from_dict(base | settings))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Function: words, a function and its arguments -> asserts that it ends in one error with these words, fit to be
    shown, that asks for nothing, and that all that lies in `tmp_path` is as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asks {question}"))
    for name in ("runs/earlier/oof.csv", "submission.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("what was there before")

    def call(words, function, *arguments):
        before = snapshot(tmp_path)
        with pytest.raises(ku.KitError) as error:
            function(*arguments)
        shown = error.value._render_traceback_()[-1].replace(f"{tmp_path}/", "")
        assert 'File "' not in shown and "Traceback" not in shown
        assert len(shown) < 5000 and shown.replace("\n", "").isprintable()
        assert [word for word in words if word not in shown] == [], shown
        assert snapshot(tmp_path) == before

    return call


# ---------------------------------------------------------------------------------------
# How a folder is spoilt: functions that make a function of a folder


def write(name, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def append(name, content):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def instead(name, make):
    """Take a file away and call `make` with its path."""
    return lambda folder: [(folder / name).unlink(), make(folder / name)]


def recode(name, change):
    """Change the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def set_column(name, column, values):
    """Set a column of a table to one value, or to a list of values."""

    def change(folder):
        frame = pd.read_csv(folder / name, dtype=str)
        frame[column] = values
        frame.to_csv(folder / name, index=False)

    return change


def edit(name, change):
    """Call `change` with the content of a JSON file and write that back."""

    def spoil(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def keys(name, **values):
    return edit(name, lambda content: content.update(values))


def tensors(name, change):
    """Call `change` with the tensors of a file and write them back."""

    def spoil(folder):
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name, metadata={"format": "pt"})

    return spoil


def deny(name, mode):
    """Change the permissions of a file or a new folder."""

    def spoil(folder):
        if os.geteuid() == 0:
            pytest.skip("root may read and write everything: run the tests as another user")
        if not (folder / name).exists():
            (folder / name).mkdir()
        (folder / name).chmod(mode)

    return spoil


def cases(table):
    """Parametrise a test over a table: name -> what the test takes."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in table.items()])


# ---------------------------------------------------------------------------------------
# Tables


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("xl/workbook.xml"), "<workbook/>")  # without the time
    return file.getvalue()


ROW = "x,a cat sat,{},0\n"  # row 41 of train.csv

TABLES = {  # name -> (what is done to the competition, the settings, what the message must hold)
    "UTF-16": (recode("train.csv", lambda data: data.decode().encode("utf-16")), {}, ["train.csv", "UTF-8"]),
    "UTF-16 without its mark": (
        recode("train.csv", lambda data: data.decode().encode("utf-16-le")),
        {},
        ["train.csv, line 1", "NUL"],
    ),
    "Latin-1 in the last row": (
        recode("train.csv", lambda data: data + "x,café,1,0\n".encode("latin-1")),
        {},
        ["train.csv, line 42", "UTF-8", "0xe9"],
    ),
    "a surrogate": (recode("train.csv", lambda data: data + b"x,\xed\xa0\x80,1,0\n"), {}, ["train.csv", "UTF-8"]),
    "an empty file": (write("train.csv", ""), {}, ["train.csv", "header"]),
    "blank lines alone": (write("train.csv", "\n \n\n"), {}, ["train.csv", "header"]),
    "a header alone": (write("train.csv", "id,excerpt,target\n"), {}, ["train.csv", "no rows"]),
    "NUL in a text": (append("train.csv", f"x,a{NUL}cat,1,0\n"), {}, ["train.csv, line 42", "NUL"]),
    "a tail of NUL": (append("train.csv", NUL * 4096), {}, ["train.csv, line 42", "NUL"]),
    "an unclosed quote": (
        append("train.csv", 'x,"a cat,1,0\ny,a dog,2,0\n'),
        {},
        ["train.csv, line 42"],
    ),
    "a quote that a later row closes": (
        append("train.csv", 'x,"a cat,1,0\ny,"a dog",2,0\n'),
        {},
        ["train.csv, line 42"],
    ),
    "a cell too many": (append("train.csv", "x,a cat, sat,1,0\n"), {}, ["train.csv", "line 42"]),
    "a cell too many in the first row": (
        write("train.csv", "id,excerpt,target\nx,a cat, sat,1\ny,a dog,2\n"),
        {},
        ["train.csv", "more cells than the header"],
    ),
    "cells too few": (
        append("train.csv", "x,a cat\n"),
        {},
        ["train.csv, column target", "row 41 (id x)"],
    ),
    "a text column twice": (
        recode("train.csv", lambda data: data.replace(b"standard_error", b"excerpt", 1)),
        {},
        ["train.csv", "'excerpt'", "twice"],
    ),
    "a target column twice": (
        recode("train.csv", lambda data: data.replace(b"standard_error", b"target", 1)),
        {},
        ["train.csv", "'target'", "twice"],
    ),
    "a column missing": (
        recode("train.csv", lambda data: data.replace(b"target", b"score", 1)),
        {},
        ["train.csv", "no column 'target'", "id, excerpt, score"],
    ),
    "names of columns that move the cursor": (
        recode("train.csv", lambda data: data.replace(b"target", b"\x1b[2Jtarget", 1)),
        {},
        ["train.csv", "'target'", r"\x1b[2Jtarget"],
    ),
    "a column whose name has 600 kB": (
        recode("train.csv", lambda data: data.replace(b"target", b"target" * 10**5, 1)),
        {},
        ["train.csv", "'target'"],
    ),
    "a PNG": (write("train.csv", b"\x89PNG\r\n\x1a\n" + bytes(64)), {}, ["train.csv", "UTF-8"]),
    "a gzip file": (recode("train.csv", gzip.compress), {}, ["train.csv", "UTF-8"]),
    "an Excel file": (write("train.csv", zipped()), {}, ["train.csv, line 1"]),
    "a page of HTML": (write("train.csv", "<!DOCTYPE html>\n<p>Sign in\n"), {}, ["train.csv", "no column 'excerpt'"]),
    "a pointer of Git LFS": (
        write("train.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        {},
        ["train.csv", "no column 'excerpt'", "git-lfs"],
    ),
    "a folder": (instead("train.csv", Path.mkdir), {}, ["train.csv", "not a file"]),
    "a dangling link": (instead("train.csv", lambda path: path.symlink_to("gone")), {}, ["train.csv", "not a file"]),
    "a link to itself": (instead("train.csv", lambda path: path.symlink_to(path)), {}, ["train.csv", "not a file"]),
    "a pipe": (instead("train.csv", os.mkfifo), {}, ["train.csv", "not a file"]),
    "an unreadable file": (deny("train.csv", 0), {}, ["train.csv", "Permission denied"]),
    "a target of 1e999": (
        append("train.csv", ROW.format("1e999")),
        {},
        ["train.csv, column target: expected a finite number", "row 41 (id x): '1e999'"],
    ),
    "a target with the thousands set apart": (
        append("train.csv", ROW.format("1_000")),
        {},
        ["train.csv, column target: expected a finite number", "row 41 (id x): '1_000'"],
    ),
    "a target in hexadecimal": (
        append("train.csv", ROW.format("0x1F")),
        {},
        ["train.csv, column target: expected a finite number", "row 41 (id x): '0x1F'"],
    ),
    "decimal commas": (
        set_column("train.csv", "target", "1,5"),
        {},
        ["train.csv, column target: expected a finite number", "row 1 (id 000): '1,5'", "and 37 more"],
    ),
    "a target without any value": (
        set_column("train.csv", "target", ""),
        {},
        ["train.csv, column target: expected a finite number", "row 1 (id 000): ''"],
    ),
    "a target of texts": (
        set_column("train.csv", "target", "high"),
        {},
        ["train.csv, column target: expected a finite number", "row 1 (id 000): 'high'"],
    ),
    "an id of 1 MB in a bad row": (
        append("train.csv", "x" * 10**6 + ",a cat,none,0\n"),
        {},
        ["train.csv, column target", "row 41 (id xxx", "'none'"],
    ),
    "one id for all rows": (set_column("train.csv", "id", "same"), {}, ["train.csv, column id: expected each id once"]),
    "an id of blanks": (
        append("train.csv", "  ,a cat,1,0\n"),
        {},
        ["train.csv, column id: expected a value", "row 41"],
    ),
    "texts that are all empty": (
        set_column("train.csv", "excerpt", ""),
        {},
        ["train.csv: no row has a text in excerpt"],
    ),
    "texts that are numbers": (
        set_column("train.csv", "excerpt", "3.14"),
        {},
        ["train.csv, column excerpt: expected texts, not numbers", "'3.14'"],
    ),
    "semicolons": (
        recode("train.csv", lambda data: data.replace(b",", b";")),
        {},
        ["train.csv", "one name", "separated by commas"],
    ),
    "tabs": (
        recode("train.csv", lambda data: data.replace(b",", b"\t")),
        {},
        ["train.csv", "one name", "separated by commas"],
    ),
    "a fold that no integer holds": (
        set_column("train.csv", "fold", ["0", "1e30"] * 20),
        {},
        ["train.csv, column fold: expected a fold number", "row 2 (id 001): '1e30'"],
    ),
    "half a fold": (
        set_column("train.csv", "fold", ["0", "1.5"] * 20),
        {},
        ["train.csv, column fold: expected a fold number", "row 2 (id 001): '1.5'"],
    ),
    "one fold": (set_column("train.csv", "fold", "3"), {}, ["train.csv, column fold", "two or more folds"]),
    "a target that is the fold": (
        set_column("train.csv", "fold", [0, 1] * 20),
        dict(target_columns="fold"),
        ["target_columns", "'fold'"],
    ),
    "a template with a column that is not there": (
        lambda folder: None,
        dict(template="[{genre}] {excerpt}"),
        ["train.csv", "no column 'genre'"],
    ),
    "a template with a column that test.csv lacks": (
        lambda folder: None,
        dict(template="{standard_error} {excerpt}"),
        ["test.csv", "no column 'standard_error'"],
    ),
    "an empty group": (
        set_column("train.csv", "author", ["one", ""] * 20),
        dict(fold_kind="group", group_column="author"),
        ["train.csv, column author: expected a value", "row 2 (id 001)"],
    ),
    "fewer groups than folds": (
        set_column("train.csv", "author", "one"),
        dict(fold_kind="stratified_group", group_column="author"),
        ["train.csv, column author", "2 stratified_group folds"],
    ),
    "a single label": (
        set_column("train.csv", "target", "yes"),
        dict(task="binary"),
        ["train.csv, column target: expected two labels", "got 1"],
    ),
    "a fold whose model would train on one label": (
        set_column("train.csv", "target", ["rare", *["no"] * 39]),
        dict(task="binary"),
        ["train.csv, labels in one fold only: target 'rare' (1 rows in fold", "all rows are alike, no model can learn"],
    ),
    "fewer rows than folds": (
        write("train.csv", "id,excerpt,target\nx,a cat,1\ny,a dog,2\n"),
        dict(n_folds=3),
        ["train.csv", "3 stratified folds"],
    ),
    "test.csv without the text": (
        recode("test.csv", lambda data: data.replace(b"excerpt", b"text", 1)),
        {},
        ["test.csv", "no column 'excerpt'", "id, text"],
    ),
    "test.csv in Latin-1": (
        recode("test.csv", lambda data: data + "x,café\n".encode("latin-1")),
        {},
        ["test.csv, line 12", "UTF-8"],
    ),
    "test.csv is empty": (write("test.csv", ""), {}, ["test.csv", "header"]),
    "test.csv is a folder": (instead("test.csv", Path.mkdir), {}, ["test.csv", "not a file"]),
    "test.csv is a dangling link": (
        instead("test.csv", lambda path: path.symlink_to("gone")),
        {},
        ["test.csv", "not a file"],
    ),
    "an id twice in test.csv": (
        append("test.csv", "000,a cat\n"),
        {},
        ["test.csv, column id: expected each id once", "row 11 (id 000)"],
    ),
    "an empty id in test.csv": (
        lambda folder: [append("test.csv", ",a cat\n")(folder), append("sample_submission.csv", ",0\n")(folder)],
        {},
        ["test.csv, column id: expected a value", "row 11"],
    ),
    "a sample with other ids": (
        recode("sample_submission.csv", lambda data: data.replace(b"009", b"9")),
        {},
        ["sample_submission.csv lacks 1 ids", "'009'", "test.csv lacks 1 ids", "'9'"],
    ),
    "a sample with other columns": (
        recode("sample_submission.csv", lambda data: b"id,a,b\nx,0,0\n"),
        {},
        ["sample_submission.csv"],
    ),
    "a sample with a column twice": (
        write("sample_submission.csv", "id,target,target\n" + "".join(f"00{i},0,0\n" for i in range(10))),
        {},
        ["sample_submission.csv", "'target'", "twice"],
    ),
    "a sample of the id alone": (
        write("sample_submission.csv", "id\n" + "".join(f"00{i}\n" for i in range(10))),
        {},
        ["sample_submission.csv has columns nothing", "target"],
    ),
    "a sample that is empty": (write("sample_submission.csv", ""), {}, ["sample_submission.csv", "header"]),
    "a sample without rows": (write("sample_submission.csv", "id,target\n"), {}, ["sample_submission.csv", "no rows"]),
    "a sample that is a PNG": (
        write("sample_submission.csv", b"\x89PNG\r\n\x1a\n"),
        {},
        ["sample_submission.csv", "UTF-8"],
    ),
}


@cases(TABLES)
def test_a_hostile_table_is_refused_with_its_place_before_anything_is_written(case, train, competition, refused):
    spoil, settings, words = case
    spoil(competition)
    refused(words, train, settings)


ODD_IDS = ["007", "7", "1e5", "0x1F", "True", "nan", "None", "1.0", "-0", "2024-01-01", "=1+1", " a", "é", "a,b", '"']
BREAKS = ["a cat\nsat on\r\na mat", "\n\na dog\n", 'the "red" cat, or\nso']

TAKEN = {  # name -> (ids, texts that come first, what is done to the bytes of the files)
    "a byte-order mark": ([], [], lambda data: b"\xef\xbb\xbf" + data),
    "CRLF": ([], [], lambda data: data.replace(b"\n", b"\r\n")),
    "CR alone, as on an old Mac": ([], [], lambda data: data.replace(b"\n", b"\r")),
    "no line end at the end": ([], [], lambda data: data.rstrip(b"\n")),
    "ids that look like numbers and gaps": (ODD_IDS, [], bytes),
    "texts of mixed types": ([], ["1984", "True", "nan", "3.5", "None", "a cat"], bytes),
    "line breaks in quotes": ([], BREAKS, bytes),
    "emoji": ([], ["👍🏽 a cat 👩‍👩‍👧", "🐈"], bytes),
    "zero-width and control characters": (
        [],
        ["a\u200bcat \u2060sat", "\ufeffa dog", "a\x1b[2Jcat\x07 \x7f"],
        bytes,
    ),
    "from right to left": ([], ["החתול ישב על המחצלת", "القط \u202eجلس\u202c", "a cat \u202etas"], bytes),
    "a word of 100 kB": ([], ["x" * 10**5, "a cat " + "é" * 10**5], bytes),
    "accents in pieces": ([], ["e\u0301" * 1000, "a\u0300\u0301\u0302" * 100], bytes),
}


def save_table(path, header, rows, change):
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    path.write_bytes(change(file.getvalue().encode()))


def save_odd_competition(folder, ids, texts, change):
    """A competition of 40 rows, the same in train.csv and test.csv, that begins with these ids and texts."""
    ids = [*ids, *(f"{i:03d}" for i in range(100, 140 - len(ids)))]
    texts = [*texts, *make_texts(40 - len(texts))]
    targets = [round(len(text) % 7 / 7, 3) for text in texts]
    save_table(folder / "train.csv", ["id", "excerpt", "target"], zip(ids, texts, targets, strict=True), change)
    save_table(folder / "test.csv", ["id", "excerpt"], zip(ids, texts, strict=True), change)
    save_table(folder / "sample_submission.csv", ["id", "target"], [(name, 0) for name in reversed(ids)], change)
    return ids, texts


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cases(TAKEN)
def test_odd_tables_are_trained_on_and_predicted_with_ids_and_texts_as_they_stand(case, train, competition):
    ids, texts = save_odd_competition(competition, *case)
    frame, _, _ = ku.read_competition(ku.Config(data_dir=str(competition)))
    assert (frame["id"].tolist(), frame["excerpt"].tolist()) == (ids, texts)
    run = train({})
    oof, submission = read_rows(run / "oof.csv"), read_rows(run / "submission.csv")
    assert [row["id"] for row in oof] == ids and [row["id"] for row in submission] == ids[::-1]
    assert torch.tensor([float(row["prediction"]) for row in oof]).isfinite().all()
    golden = json.loads((run / "golden.json").read_text())["rows"]
    assert {row["id"]: row["cells"]["excerpt"] for row in golden}.items() <= dict(zip(ids, texts, strict=True)).items()


def test_a_text_of_a_megabyte_is_trained_on(train, competition):
    append("train.csv", "x," + "a cat sat on the mat " * (10**6 // 21) + ",1,0\n")(competition)
    assert ku.RunFolder(train({})).read_record()["oof"]["rows"] == 41


# ---------------------------------------------------------------------------------------
# Settings


def file_named(name):
    return lambda folder: (folder / name).write_text("a file")


def nothing(folder):
    pass


LONG = "x" * 300
SETTINGS = {  # name -> (what is done to the folder, the settings, what the message must hold)
    "a name with a typo": (nothing, dict(epoch=1), ["no setting 'epoch' (did you mean epochs?)"]),
    "a name that is no name": (nothing, {"__class__": 1}, ["no setting '__class__'"]),
    "a name that is no text": (nothing, {7: 1}, ["no setting 7"]),
    "a list as a number": (nothing, dict(epochs=[1]), ["epochs must be a whole number", "[1]"]),
    "a number of 400 digits": (nothing, dict(lr="1" * 400), ["lr must be a finite number"]),
    "NaN as a whole number": (nothing, dict(epochs=float("nan")), ["epochs must be a whole number", "nan"]),
    "a number that is an object": (nothing, dict(lr=object()), ["lr must be a finite number", "object"]),
    "a choice that is no text": (nothing, dict(head=["mean"]), ["head must be text", "['mean']"]),
    "a choice as yes or no": (nothing, dict(cuda_graphs=True), ["cuda_graphs must be text (auto, on, off), got True"]),
    "a choice in capitals": (nothing, dict(task="Binary"), ["task must be one of", "'Binary'"]),
    "convolutions of nothing": (
        nothing,
        dict(conv_kernels="", conv_channels=""),
        ["conv_kernels must be whole numbers"],
    ),
    "a state that no memory holds": (nothing, dict(head="lstm", rnn_size=10**15), ["rnn_size must be", f"{10**15}"]),
    "channels that no memory holds": (
        nothing,
        dict(head="conv1d", conv_channels=f"{10**15},1"),
        ["conv_channels must be", f"{10**15}"],
    ),
    "a length without room for text": (
        nothing,
        dict(max_length=8, template="a cat sat on the mat and so on {excerpt}"),
        ["max_length 8", "11 tokens around 1 texts"],
    ),
    "a length beyond the positions": (nothing, dict(max_length=10**6), ["max_length must be at most 160"]),
    "more layers than there are": (
        nothing,
        dict(freeze_layers=99),
        ["freeze_layers must be at most", "2 layers", "99"],
    ),
    "a fold that is not there": (nothing, dict(run_folds="2"), ["run_folds must be", "0, 1", "'2'"]),
    "a fold below zero": (nothing, dict(run_folds="-1"), ["run_folds must be", "0, 1", "'-1'"]),
    "a run name above": (nothing, dict(run_name="../x"), ["run_name must be letters", "'../x'"]),
    "a run name below": (nothing, dict(run_name="a/b"), ["run_name must be letters", "'a/b'"]),
    "a run name of two dots": (nothing, dict(run_name=".."), ["run_name must be letters", "'..'"]),
    "a run name at the root": (nothing, dict(run_name="/x"), ["run_name must be letters", "'/x'"]),
    "a run name of Windows": (nothing, dict(run_name="C:\\x"), ["run_name must be letters", "C:"]),
    "a run name with NUL": (nothing, dict(run_name=f"a{NUL}b"), ["run_name must be", r"'a\x00b'"]),
    "a run name with a line break": (nothing, dict(run_name="a\n"), ["run_name must be letters", r"'a\n'"]),
    "a run name that is there": (nothing, dict(run_name="earlier"), ["run_name 'earlier'", "exists"]),
    "a run name too long": (nothing, dict(run_name=LONG), ["runs/xxx", "name too long"]),
    "an output_dir that is a file": (
        file_named("out"),
        dict(output_dir="out"),
        ["out/competition-bert", "ot a directory"],
    ),
    "an output_dir below a file": (
        file_named("out"),
        dict(output_dir="out/runs"),
        ["out/runs/competition-bert", "ot a directory"],
    ),
    "an output_dir with NUL": (nothing, dict(output_dir=f"a{NUL}b"), ["output_dir", r"'a\x00b"]),
    "an output_dir of nobody": (nothing, dict(output_dir="~nobody-at-all/x"), ["output_dir", "'~nobody-at-all/x"]),
    "an output_dir that is read-only": (
        deny("locked", 0o555),
        dict(output_dir="locked/runs"),
        ["locked/runs", "Permission denied"],
    ),
    "a data_dir that is a file": (file_named("in"), dict(data_dir="in"), ["data_dir 'in' is not a folder"]),
    "a data_dir with NUL": (nothing, dict(data_dir=f"a{NUL}b"), ["data_dir", r"'a\x00b'"]),
    "a data_dir of nobody": (nothing, dict(data_dir="~nobody-at-all/x"), ["data_dir", "'~nobody-at-all/x'"]),
    "a data_dir that is empty": (
        lambda folder: (folder / "in").mkdir(),
        dict(data_dir="in"),
        ["data_dir 'in' has no train.csv"],
    ),
    "a data_dir with too long a name": (nothing, dict(data_dir=LONG), ["data_dir", LONG]),
    "a data_dir that is closed": (deny("in", 0), dict(data_dir="in"), ["data_dir", "Permission denied"]),
    "a backbone with too long a name": (nothing, dict(backbone=LONG), ["backbone", LONG]),
    "a backbone that is a file": (file_named("b"), dict(backbone="b"), ["backbone 'b' was not found"]),
    "a backbone with NUL": (nothing, dict(backbone=f"a{NUL}b"), ["backbone", r"'a\x00b'"]),
    "a backbone of nobody": (nothing, dict(backbone="~nobody-at-all/x"), ["backbone", "'~nobody-at-all/x'"]),
    "a backbone that is an address": (nothing, dict(backbone="http://127.0.0.1:9/x"), ["backbone", "was not found"]),
}


@cases(SETTINGS)
def test_hostile_settings_are_refused_by_name_before_anything_is_written(case, train, tmp_path, refused):
    spoil, settings, words = case
    spoil(tmp_path)
    refused(words, train, settings)


# ---------------------------------------------------------------------------------------
# Backbones

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
DENSE = "encoder.layer.1.output.dense.weight"
DEEP = "[" * 10**5


class Touch:
    """What pickle makes of this, when it reads it, is a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def as_pickle(save):
    """Take model.safetensors away and call `save(its tensors, path of pytorch_model.bin)`."""

    def spoil(folder):
        content = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        save(content, folder / "pytorch_model.bin")

    return spoil


def header(length, text=b"", rest=b""):
    """A safetensors file: the length of the header, the header, the data."""
    return write(WEIGHTS, struct.pack("<Q", length) + text + rest)


def tensor_entry(name, shape, offsets):
    text = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return header(len(text), text, bytes(16))


def vocabulary(change):
    return edit(TOKENIZER, lambda content: change(content["model"]["vocab"]))


def sharded(weight_map):
    """Weights whose index names other files than there are."""

    def spoil(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(weight_map)

    return spoil


BACKBONES = {  # name -> (what is done to a backbone, what the message must hold)
    "no config": (remove(CONFIG), ["backbone", "lacks config.json"]),
    "a config that is no JSON": (write(CONFIG, "hidden_size: 32"), ["backbone/config.json"]),
    "half a config": (truncate(CONFIG), ["backbone/config.json"]),
    "a config in UTF-16": (recode(CONFIG, lambda data: data.decode().encode("utf-16")), ["backbone/config.json"]),
    "a config that is a list": (write(CONFIG, "[1]"), ["backbone/config.json", "an object"]),
    "a config that nests too deep": (write(CONFIG, DEEP), ["backbone/config.json"]),
    "a config without a type": (edit(CONFIG, lambda c: c.pop("model_type")), ["backbone", "model_type"]),
    "an unknown type": (keys(CONFIG, model_type="evil"), ["backbone", "evil"]),
    "a type of images": (keys(CONFIG, model_type="vit"), ["backbone"]),
    "code of its own": (
        lambda folder: [
            keys(CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})(folder),
            (folder / "evil.py").write_text(f"open({str(folder.parent / 'marker')!r}, 'w')"),
        ],
        ["backbone", "never run"],
    ),
    "code of its own for a model that there is": (
        lambda folder: [
            keys(CONFIG, model_type="vit", auto_map={"AutoModel": "evil.M"})(folder),
            (folder / "evil.py").write_text(f"open({str(folder.parent / 'marker')!r}, 'w')"),
        ],
        ["backbone"],
    ),
    "a kernel of the hub, nested": (
        keys(CONFIG, text_config={"_attn_implementation_internal": "evil/kernel"}),
        [CONFIG, "_attn_implementation_internal could make transformers run code"],
    ),
    "experts of the hub, in a list": (
        keys(CONFIG, parts=[[{"_experts_implementation_internal": "evil/kernel"}]]),
        [CONFIG, "_experts_implementation_internal could make transformers run code"],
    ),
    "attention of the hub, nested": (
        keys(CONFIG, encoder={"attn_implementation": "evil/kernel"}),
        [CONFIG, "attn_implementation could make transformers run code"],
    ),
    "attention of the hub for each part": (
        keys(CONFIG, attn_implementation={"text_config": "evil/kernel"}),
        [CONFIG, "attn_implementation could make transformers run code"],
    ),
    "a size that is text": (keys(CONFIG, hidden_size="768"), ["backbone", "hidden_size"]),
    "a negative size": (keys(CONFIG, hidden_size=-32), ["backbone"]),
    "a size that no memory holds": (keys(CONFIG, hidden_size=2**40), ["backbone"]),
    "no layers": (keys(CONFIG, num_hidden_layers=0), ["backbone"]),
    "two million layers": (keys(CONFIG, num_hidden_layers=2 * 10**6), [CONFIG, "at most 1000 of num_hidden_layers"]),
    "a billion labels": (keys(CONFIG, num_labels=10**9), [CONFIG, "at most 100000 of num_labels"]),
    "labels in 400 digits": (keys(CONFIG, num_labels=10**400), [CONFIG, "at most 100000 of num_labels"]),
    "a hundred layers": (keys(CONFIG, num_hidden_layers=100), ["backbone", "far larger than model.safetensors"]),
    "two billion words": (keys(CONFIG, vocab_size=2 * 10**9), ["backbone", "far larger than model.safetensors"]),
    "places for every token there is": (keys(CONFIG, max_position_embeddings=10**10), ["backbone", "far larger than"]),
    "heads that do not divide the size": (keys(CONFIG, num_attention_heads=5), ["backbone", "32", "5"]),
    "an activation that is not there": (keys(CONFIG, hidden_act="evil"), ["backbone", "evil"]),
    "a pad token beyond the vocabulary": (keys(CONFIG, pad_token_id=10**6), ["backbone"]),
    "no weights": (remove(WEIGHTS), ["backbone", "weights"]),
    "half the weights": (truncate(WEIGHTS), ["backbone", WEIGHTS]),
    "a header of 2**60 bytes": (header(2**60, b"{}"), ["backbone", WEIGHTS]),
    "offsets beyond the file": (tensor_entry(DENSE, [32, 48], [0, 6144]), ["backbone", WEIGHTS]),
    "weights of other shapes": (
        tensors(WEIGHTS, lambda t: t.update({DENSE: torch.zeros(2, 2)})),
        ["backbone", DENSE],
    ),
    "weights that are missing": (tensors(WEIGHTS, lambda t: t.pop(DENSE)), ["backbone", "lacks 1 weights", DENSE]),
    "none of the weights": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"}),
        ["backbone", "far larger", WEIGHTS],
    ),
    "a weight that is NaN": (
        tensors(WEIGHTS, lambda t: t[DENSE].view(-1)[7:8].fill_(float("nan"))),
        ["backbone", "not finite", DENSE],
    ),
    "a weight that is infinite": (
        tensors(WEIGHTS, lambda t: t[DENSE].view(-1)[7:8].fill_(float("inf"))),
        ["backbone", "not finite", DENSE],
    ),
    "an index that is no JSON": (sharded("no"), ["backbone", "index.json"]),
    "an index of files that are not there": (
        sharded('{"metadata": {}, "weight_map": {"x": "../model-2.safetensors"}}'),
        ["backbone", "model-2.safetensors"],
    ),
    "a pickle that writes a file": (
        as_pickle(lambda content, path: path.write_bytes(pickle.dumps(Touch(path.parents[1] / "marker"), 2))),
        ["backbone", "pytorch_model.bin"],
    ),
    "a pickle in an archive that writes a file": (
        as_pickle(lambda content, path: torch.save({**content, "x": Touch(path.parents[1] / "marker")}, path)),
        ["backbone", "pytorch_model.bin"],
    ),
    "a pickle of random bytes": (
        as_pickle(lambda content, path: path.write_bytes(bytes(range(256)) * 40)),
        ["backbone", "pytorch_model.bin"],
    ),
    "half a pickle": (
        lambda folder: [as_pickle(torch.save)(folder), truncate("pytorch_model.bin")(folder)],
        ["backbone", "pytorch_model.bin"],
    ),
    "a pickle of a list": (as_pickle(lambda content, path: torch.save([1], path)), ["backbone"]),
    "no tokenizer": (remove(TOKENIZER), ["backbone", "no vocabulary"]),
    "half a tokenizer": (truncate(TOKENIZER), ["backbone", "tokenizer"]),
    "a tokenizer of nothing": (write(TOKENIZER, "{}"), ["backbone", "tokenizer"]),
    "a tokenizer of an unknown kind": (
        edit(TOKENIZER, lambda c: c["model"].update(type="Evil")),
        ["backbone", "tokenizer"],
    ),
    "a tokenizer without words": (vocabulary(lambda words: words.clear()), ["tokenizer"]),
    "a tokenizer of other words": (
        edit(TOKENIZER, lambda c: c["model"].update(vocab={"<unk>": 1, "<pad>": 0, "<s>": 2, "</s>": 3})),
        ["tokenizer", "unknown"],
    ),
    "ids beyond the embeddings": (
        vocabulary(lambda words: words.update(cat=10**6)),
        ["backbone", "tokenizer", "1000000", "27"],
    ),
    "a tokenizer config that is no JSON": (write("tokenizer_config.json", "{"), ["backbone", "tokenizer"]),
    "weights that are a pipe": (instead(WEIGHTS, os.mkfifo), ["backbone", "lacks config.json or weights"]),
    "a tokenizer that is a pipe": (instead(TOKENIZER, os.mkfifo), ["backbone", "tokenizer"]),
}


@pytest.fixture
def backbone(backbone_folder, tmp_path):
    """A copy of a tiny BERT that may be spoilt."""
    return Path(shutil.copytree(backbone_folder("tiny"), tmp_path / "backbone"))


@cases(BACKBONES)
def test_a_hostile_backbone_is_refused_with_its_place_and_nothing_of_it_is_run(case, backbone, train, refused):
    spoil, words = case
    spoil(backbone)
    refused(words, train, dict(backbone=str(backbone)))


def test_the_hostile_pickle_would_write_its_file_where_it_were_loaded(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


def test_weights_that_were_saved_as_a_pickle_train_as_those_in_safetensors_which_is_said_aloud(backbone, train, capsys):
    settings = dict(backbone=str(backbone), run_folds="0")
    expected = (train(settings | dict(run_name="safetensors")) / "oof.csv").read_bytes()
    assert "pickle" not in capsys.readouterr().out
    as_pickle(torch.save)(backbone)
    assert (train(settings | dict(run_name="pickle")) / "oof.csv").read_bytes() == expected
    assert "weights from pytorch_model.bin: a pickle" in capsys.readouterr().out


def test_weights_that_were_saved_as_a_pickle_are_refused_where_torch_reads_them_unsafely(backbone, train, monkeypatch):
    as_pickle(torch.save)(backbone)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(ku.KitError, match=r"safe to read from torch 2\.10 on: pytorch_model\.bin"):
        train(dict(backbone=str(backbone)))


# ---------------------------------------------------------------------------------------
# Runs to go on with

RECORD, GOLDEN, FOLD = "record.json", "golden.json", "fold0/model.safetensors"
MINE = dict(run_name="mine", run_folds="0")
SAME = MINE | dict(batch_size=8)  # as `tiny_config` has it

RESUMED = {  # name -> (what is done to a run of that name, what the message must hold)
    "half a record": (truncate(RECORD), ["runs/mine/record.json"]),
    "a record that is a list": (write(RECORD, "[]"), ["runs/mine/record.json"]),
    "a record that nests too deep": (write(RECORD, DEEP), ["runs/mine/record.json"]),
    "a record without settings": (edit(RECORD, lambda r: r.pop("settings")), ["runs/mine", RECORD, "settings"]),
    "a record without sessions": (
        edit(RECORD, lambda r: [r.pop("sessions"), r.update(status="running")]),
        ["runs/mine", RECORD, "sessions"],
    ),
    "a record without folds": (edit(RECORD, lambda r: r.pop("folds")), ["runs/mine", RECORD, "folds"]),
    "a record of other data": (
        edit(RECORD, lambda r: r["fingerprint"].update({"the targets": "0"})),
        ["runs/mine exists", "the targets"],
    ),
    "no record": (remove(RECORD), ["runs/mine exists", "no run"]),
    "a record that is a folder": (instead(RECORD, Path.mkdir), ["runs/mine exists", "no run"]),
    "a folder that is a file": (lambda run: [shutil.rmtree(run), run.write_text("")], ["runs/mine exists", "no run"]),
}


@pytest.fixture(scope="module")
def mine(runs, backbone_folder):
    """A run of that name; copy it."""
    return trained(tiny_config(runs.parent / "competition", backbone_folder("tiny"), runs.parent / "mine", **MINE))


@cases(RESUMED)
def test_a_hostile_run_of_the_same_name_is_refused_and_stays_as_it_is(case, mine, train, refused, tmp_path):
    spoil, words = case
    spoil(Path(shutil.copytree(mine, tmp_path / "runs" / "mine")))
    refused(words, train, SAME)


def test_what_the_hostile_runs_of_the_same_name_were_before_is_complete(mine, train, tmp_path, capsys):
    shutil.copytree(mine, tmp_path / "runs" / "mine")
    train(SAME)
    assert "is complete, nothing is trained" in capsys.readouterr().out


SOURCES = {  # name -> (what is done to the folder, resume_from, what the message must hold)
    "nobody": (nothing, "~nobody-at-all/x", ["resume_from", "'~nobody-at-all/x'"]),
    "NUL": (nothing, f"a{NUL}b", ["resume_from", r"'a\x00b'"]),
    "too long a name": (nothing, LONG, ["resume_from", LONG]),
    "a file": (file_named("a"), "a", ["resume_from 'a'"]),
    "nothing": (nothing, "a", ["resume_from 'a'"]),
    "half a record": (
        lambda folder: [(folder / "a").mkdir(), write(RECORD, '{"status"')(folder / "a")],
        "a",
        ["a/record.json"],
    ),
    "a record of nothing": (
        lambda folder: [(folder / "a").mkdir(), write(RECORD, "{}")(folder / "a")],
        "a",
        ["resume_from 'a'"],
    ),
}


@cases(SOURCES)
def test_a_hostile_run_to_copy_is_refused_by_name_and_nothing_is_copied(case, train, tmp_path, refused):
    spoil, source, words = case
    spoil(tmp_path)
    refused(words, train, MINE | dict(resume_from=source))


# ---------------------------------------------------------------------------------------
# Links, pipes and other files in a run

LINKS = {  # what is a link in a run -> what it leads to, beside runs/
    "log.jsonl": "file",
    ".lock": "file",
    ".record.json.tmp": "file",
    ".oof.csv.tmp": "gone",
    "oof.csv": "file",
    "golden.json": "../runs/mine/golden.json",  # a loop
    "curves.png": "/dev/full",
    "submission.csv": "file",
    "checkpoints": "",
    "fold0/model.safetensors": "file",
    "fold1": "",
    ".fold1.tmp": "",
    "tokenizer/tokenizer.json": "file",
    "tokenizer/more": "",
}


@pytest.fixture
def outside(tmp_path):
    """A folder beside runs/ with what nobody may touch."""
    folder = tmp_path / "outside"
    (folder / "fold0-step9").mkdir(parents=True)
    (folder / "file").write_text("precious")
    return folder


@pytest.fixture
def unfinished(mine, tmp_path):
    """A copy of a run that a kill ended before its record said so."""
    folder = Path(shutil.copytree(mine, tmp_path / "runs" / "mine"))
    keys(RECORD, status="running")(folder)
    return folder


def spoil_with_links(run, outside):
    """Put all links into a run, and a pipe; what a message about them must hold."""
    for name, target in LINKS.items():
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / target)
    os.mkfifo(run / "notes.txt")
    return [*(f"/{name}: a symbolic link" for name in LINKS), "/notes.txt: a pipe or a device"]


def test_links_in_a_run_that_goes_on_are_refused_by_name_and_what_they_lead_to_stays(
    unfinished, outside, train, refused
):
    refused(["runs/mine", *spoil_with_links(unfinished, outside)], train, SAME)


@pytest.mark.parametrize("name", [".lock", ".record.json.tmp"])
def test_a_link_in_a_run_that_was_killed_as_it_began_is_refused(name, outside, train, tmp_path, refused):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine" / name).symlink_to(outside / "file")
    refused([f"{name}: a symbolic link"], train, SAME)


def test_links_in_a_run_to_copy_are_refused_by_name_and_nothing_is_copied(
    unfinished, outside, train, tmp_path, refused
):
    words = spoil_with_links(unfinished, outside)
    refused(["resume_from", *words], train, SAME | dict(resume_from="runs/mine", output_dir="copies"))
    (tmp_path / "all").mkdir()
    unfinished.rename(tmp_path / "all" / "mine")
    (unfinished.parent / "earlier/link").symlink_to("gone")
    refused(words, train, SAME | dict(resume_from="all", output_dir="copies"))


def test_links_in_a_run_to_predict_with_are_refused_by_name(runs, outside, tmp_path, refused, competition):
    run = Path(shutil.copytree(runs / "one", tmp_path / "runs" / "mine"))
    words = spoil_with_links(run, outside)
    refused(words, ku.load_bundle, str(run))
    refused(words, ku.predict_test, run, pd.read_csv(competition / "test.csv"))


def test_the_folder_of_a_run_and_what_it_lies_in_may_be_links_and_a_tracker_may_keep_its_own(
    unfinished, outside, train, tmp_path, capsys
):
    (unfinished / "wandb").mkdir()
    (unfinished / "wandb/debug.log").symlink_to(outside / "file")
    unfinished.rename(tmp_path / "elsewhere")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/mine").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    train(SAME | dict(output_dir="results"))
    assert "disk/mine is complete" not in capsys.readouterr().out
    assert ku.RunFolder(tmp_path / "elsewhere").is_complete()
    train(SAME | dict(output_dir="copies", resume_from="results/mine"))
    assert not os.path.lexists(tmp_path / "copies/mine/wandb/debug.log")
    assert (outside / "file").read_text() == "precious"


def test_hard_links_in_a_run_keep_what_their_other_names_hold_and_a_lock_is_refused(
    unfinished, mine, outside, train, refused
):
    names = ["log.jsonl", "oof.csv", "golden.json", ".oof.csv.tmp", "tokenizer/tokenizer.json", "fold0/manifest.json"]
    for number, name in enumerate(names):
        (unfinished / name).unlink(missing_ok=True)
        (outside / str(number)).write_text("precious")
        os.link(outside / str(number), unfinished / name)
    train(SAME)
    assert {path.read_text() for path in outside.iterdir() if path.is_file()} == {"precious"}
    assert {path.name for path in unfinished.rglob("*")} == {path.name for path in mine.rglob("*")}
    assert all((unfinished / name).read_bytes() == (mine / name).read_bytes() for name in ("oof.csv", FOLD))
    keys(RECORD, status="running")(unfinished)
    os.link(outside / "file", unfinished / ".lock")
    refused(["runs/mine/.lock", "hard link"], train, SAME)


def test_files_in_the_place_of_folders_that_training_makes_are_replaced_and_folders_of_files_refused(
    unfinished, mine, train, capsys
):
    for name in ("fold0", "tokenizer"):
        shutil.rmtree(unfinished / name)
    (unfinished / "checkpoints").mkdir()
    for name in ("fold0", "tokenizer", ".fold0.tmp", "checkpoints/fold0-step9", "checkpoints/.fold0-step1.tmp"):
        (unfinished / name).write_text("")
    (unfinished / ".oof.csv.tmp").mkdir()
    train(SAME)
    assert "runs/mine/fold0 is damaged and trained again" in capsys.readouterr().out
    assert {path.name for path in unfinished.rglob("*")} == {path.name for path in mine.rglob("*")}
    for name in ("log.jsonl", "oof.csv", ".lock"):
        keys(RECORD, status="running")(unfinished)
        (unfinished / name).unlink(missing_ok=True)
        (unfinished / name).mkdir()
        with pytest.raises(ku.KitError, match=f"runs/mine/{name} could not be written: Is a directory"):
            train(SAME)
        (unfinished / name).rmdir()


def test_what_is_written_replaces_a_link_and_not_what_it_leads_to(outside, tmp_path):
    for name in ("content.json", ".content.json.tmp", "log.jsonl", ".folder.tmp", "folder"):
        (tmp_path / name).symlink_to(outside if "folder" in name else outside / "file")
    before = snapshot(outside)
    ku._write_json(tmp_path / "content.json", {"a": 1})
    ku._SealedFolder(tmp_path / "folder").save(lambda folder: (folder / "file").write_text("mine"))
    with ku._RunLog(ku.Config(), tmp_path) as log:
        log({"step": 1})
    (tmp_path / ".lock").symlink_to(outside / "file")
    with pytest.raises(ku.KitError, match=r"\.lock could not be written"), ku._locked(tmp_path):
        pass
    assert snapshot(outside) == before
    assert (tmp_path / "content.json").read_text() == '{\n "a": 1\n}\n'
    assert (tmp_path / "folder/file").read_text() == "mine" and (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


# ---------------------------------------------------------------------------------------
# Run folders and bundles

TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"

RUNS = {  # name -> (what is done to a run folder, or to one that becomes a bundle; what the message must hold)
    "half a record": (truncate(RECORD), [RECORD]),
    "a record that is no JSON": (write(RECORD, "complete"), [RECORD]),
    "a record that is a list": (write(RECORD, "[]"), [RECORD]),
    "a record that nests too deep": (write(RECORD, DEEP), [RECORD]),
    "settings of another version": (
        edit(RECORD, lambda r: r["settings"].update(evil=1)),
        [RECORD, "there is no setting 'evil'"],
    ),
    "a head that is not registered": (
        edit(RECORD, lambda r: r["settings"].update(head="median")),
        [RECORD, "head must be one of", "'median'"],
    ),
    "more outputs than targets": (
        keys(RECORD, outputs=["a", "b", "c"]),
        [RECORD, "outputs", "rows[0].prediction: expected a list of 3"],
    ),
    "half the weights": (truncate(FOLD), ["fold0"]),
    "random weights": (write(FOLD, bytes(range(256))), ["fold0"]),
    "weights of other shapes": (
        tensors(FOLD, lambda t: t.update({"output.weight": torch.zeros(3, 3)})),
        ["fold0", "output.weight"],
    ),
    "weights without a tensor": (tensors(FOLD, lambda t: t.pop("output.weight")), ["fold0", "output.weight"]),
    "weights that are NaN": (tensors(FOLD, lambda t: t["output.weight"].fill_(float("nan"))), ["one, fold 0, id"]),
    "weights of a fold that is no number": (lambda run: (run / "fold1").rename(run / "foldx"), ["fold"]),
    "half a tokenizer": (truncate("tokenizer/tokenizer.json"), ["tokenizer"]),
    "a tokenizer config that is no JSON": (write(TOKENIZER_CONFIG, "{"), ["tokenizer_config.json"]),
    "a tokenizer with code of its own": (
        keys(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["evil.T", None]}),
        ["tokenizer_config.json", "auto_map could make transformers run code"],
    ),
    "a config that is no JSON": (write("fold0/config.json", "{"), ["config.json"]),
    "a config of another size": (keys("fold0/config.json", hidden_size=64), ["fold0"]),
    "a config of an unknown type": (keys("fold0/config.json", model_type="evil"), ["config.json", "evil"]),
}

FOLDERS = {  # name -> (what is done to a run folder, what the message must hold)
    "a record of an unfinished run": (keys(RECORD, status="running"), [RECORD, "did not finish"]),
    "a record of no fold": (keys(RECORD, folds=[]), [RECORD, "folds"]),
    "a record of a fold elsewhere": (edit(RECORD, lambda r: r["folds"][0].update(fold="/../../x")), [RECORD, "fold"]),
    "weights that are missing": (remove(FOLD), [FOLD]),
    "golden rows that are no JSON": (write(GOLDEN, "rows"), [GOLDEN]),
    "no golden rows": (keys(GOLDEN, rows=[]), ["golden"]),
}

PLACES = {  # name -> (what is done to the folder, settings of infer.ipynb, what the message must hold)
    "a bundle of nobody": (nothing, dict(bundle_dir="~nobody-at-all/x"), ["bundle_dir", "'~nobody-at-all/x'"]),
    "a bundle with NUL": (nothing, dict(bundle_dir=f"a{NUL}b"), ["bundle_dir", r"'a\x00b'"]),
    "a bundle with too long a name": (nothing, dict(bundle_dir=LONG), ["bundle_dir", LONG]),
    "a bundle that is a file": (file_named("b"), dict(bundle_dir="b"), ["bundle_dir 'b' has neither"]),
    "a folder of nothing": (
        lambda folder: (folder / "b").mkdir(),
        dict(bundle_dir="b"),
        ["bundle_dir 'b' has neither"],
    ),
    "no test set": (lambda folder: (folder / "in").mkdir(), dict(data_dir="in"), ["data_dir 'in' has no test.csv"]),
    "an output_dir that is a file": (file_named("out"), dict(output_dir="out"), ["out/submission.csv"]),
    "an output_dir below a file": (file_named("out"), dict(output_dir="out/a/b"), ["out/a/b/submission.csv"]),
    "a submission that is a folder": (
        lambda folder: (folder / "out/submission.csv").mkdir(parents=True),
        dict(output_dir="out"),
        ["out/submission.csv"],
    ),
}


def packed(run, folder):
    """A bundle of a run folder, sealed as if all in it were sound."""
    tokenizer = {path.name: f"one.tokenizer.{path.name}" for path in (run / "tokenizer").iterdir()}
    weights = {path.parent.name: f"one.{path.parent.name}.safetensors" for path in run.glob("fold*/model.safetensors")}
    sources = {"kernel_utils.py": Path(ku.__file__), "one.record.json": run / RECORD}
    sources |= {"one.config.json": run / "fold0/config.json"}
    sources |= {name: run / "tokenizer" / original for original, name in tokenizer.items()}
    sources |= {name: run / fold / "model.safetensors" for fold, name in weights.items()}
    folder.mkdir()
    for name, path in sources.items():
        shutil.copyfile(path, folder / name)
    parts = dict(record="one.record.json", config="one.config.json", tokenizer=tokenizer)
    parts |= {"weights": {fold.removeprefix("fold"): name for fold, name in weights.items()}}
    parts |= {"golden": json.loads((run / GOLDEN).read_text())}
    files = {name: {"bytes": path.stat().st_size, "sha256": ku._file_sha256(path)} for name, path in sources.items()}
    manifest = {
        "format": ku._BUNDLE_FORMAT,
        "dataset": {"id": "me/one"},
        "version": "",
        "files": files,
        "runs": {"one": parts},
    }
    (folder / ku._MANIFEST).write_bytes(ku._seal_manifest(manifest))
    return folder


def infer(settings):
    """Predict as infer.ipynb does."""
    cfg = ku.InferConfig.from_dict(settings)
    bundle = ku.load_bundle(cfg.bundle_dir, cfg.precision)
    ku.check_golden(bundle)
    test, sample = ku.read_test_set(bundle, cfg.data_dir)
    path = Path(cfg.output_dir) / "submission.csv"
    return ku.write_submission(bundle, test, ku.predict_bundle(bundle, test), sample, path)


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a finished run that may be spoilt."""
    return Path(shutil.copytree(runs / "one", tmp_path / "one"))


@pytest.fixture
def place(run, runs):
    """Settings of infer.ipynb that fit."""
    return dict(bundle_dir=str(run), data_dir=str(runs.parent / "competition"))


@cases(RUNS | FOLDERS)
def test_a_hostile_run_is_refused_with_its_place_and_the_submission_that_is_there_stays(case, run, place, refused):
    spoil, words = case
    spoil(run)
    refused(words, infer, place)


@cases(RUNS)
def test_a_hostile_run_in_a_sealed_bundle_is_refused_with_its_place(case, run, place, refused, tmp_path):
    spoil, words = case
    spoil(run)
    refused(words, infer, place | dict(bundle_dir=str(packed(run, tmp_path / "bundle"))))


WRONG = [None, True, -1, 2.5, 10**400, float("nan"), "x", "\ud800", [], {}, ["x"], {"x": None}]


def places_of(content, place=()):
    """The place, as keys, of every value in what a JSON file holds; of lists the first two."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:2])
    for key, value in items:
        yield (*place, key)
        if isinstance(value, (dict, list)):
            yield from places_of(value, (*place, key))


def spoilt_contents(path, step):
    """What a JSON file holds with a wrong value, or none, in one place: in every `step`-th one."""
    text = path.read_text()
    rng = random.Random(0)
    for place in list(places_of(json.loads(text)))[::step]:
        for wrong in (..., *rng.sample(WRONG, 2)):
            content = json.loads(text)
            parent = functools.reduce(lambda part, key: part[key], place[:-1], content)
            if wrong is ...:
                del parent[place[-1]]
            else:
                parent[place[-1]] = wrong
            yield json.dumps(content)


@pytest.mark.parametrize("name", [RECORD, GOLDEN])
def test_a_value_that_is_wrong_or_missing_in_a_file_of_a_run_is_one_error_or_harmless(name, run, capsys):
    harmless = refusals = 0
    for text in spoilt_contents(run / name, 4 if name == RECORD else 1):
        (run / name).write_text(text)
        try:
            loaded = ku._Run.load(run)
            ku._summary("one", loaded.record)
            loaded.golden_gaps(torch.zeros(len(loaded.golden["rows"]), 1).numpy(), [[0.0]])
            harmless += 1
        except ku.KitError:
            refusals += 1
    assert refusals > 10 and harmless > 5


def test_a_fold_whose_state_is_not_as_it_was_written_is_trained_again_though_its_seal_is_right(run, capsys):
    fold, data = run / "fold0", SimpleNamespace(folds=pd.read_csv(run / "oof.csv")["fold"].to_numpy(), n_outputs=1)
    assert ku._read_fold(fold, data, 0)["fold"] == 0
    results = []
    for text in spoilt_contents(fold / "state.json", 3):
        with ku._SealedFolder(run / "fold9").in_temporary() as sealed:
            shutil.copytree(fold, sealed, dirs_exist_ok=True)
            (sealed / "state.json").write_text(text)
            (sealed / ku._MANIFEST).unlink()
            files = {path.name: ku._describe_file(path) for path in sealed.iterdir()}
            (sealed / ku._MANIFEST).write_bytes(ku._seal_manifest({"files": files}))
            results.append(ku._read_fold(sealed, data, 0))
    assert capsys.readouterr().out.count("is damaged and trained again") == results.count(None) > 5


SCHEMA = {"rows": [{"fold": int, "prediction": [float, 2], "id?": (str, None)}, ...], "files": {ku._FILE_NAME: int}}
SOUND = {"rows": [{"fold": 1, "prediction": [0.5, 2]}], "files": {"a.txt": 3}, "more": [None]}
CONTENTS = {  # name -> (what is written, or done with the path; what the message must hold)
    "nothing": ("", ["not a JSON file"]),
    "a list": ("[]", ["expected an object, got []"]),
    "null": ("null", ["expected an object, got None"]),
    "an object of nothing": ("{}", ["rows: expected a list of one or more, got nothing"]),
    "no rows": (SOUND | {"rows": []}, ["rows: expected a list of one or more, got []"]),
    "a bool": (SOUND | {"rows": [{"fold": True, "prediction": [0, 1]}]}, ["rows[0].fold: expected a whole number"]),
    "a number below 0": (SOUND | {"files": {"a": -1}}, ["files.a: expected a whole number from 0 on, got -1"]),
    "NaN": (SOUND | {"rows": [{"fold": 1, "prediction": [0, float("nan")]}]}, ["rows[0].prediction[1]", "'NaN'"]),
    "400 digits": (SOUND | {"rows": [{"fold": 1, "prediction": [10**400, 0]}]}, ["prediction[0]: expected a finite"]),
    "10,000 digits": (SOUND | {"files": {"a": "DIGITS"}}, ["files.a: expected a whole number"]),
    "three numbers": (SOUND | {"rows": [{"fold": 1, "prediction": [0, 1, 2]}]}, ["prediction: expected a list of 2"]),
    "an id in a list": (SOUND | {"rows": [{"fold": 1, "prediction": [0, 1], "id": []}]}, ["rows[0].id: expected text"]),
    "a file above": (SOUND | {"files": {"..": 1}}, ["expected the name of a file, got '..'"]),
    "a file without a name": (SOUND | {"files": {"": 1}}, ["expected the name of a file, got ''"]),
    "a file elsewhere": (SOUND | {"files": {"a/b": 1}}, ["expected the name of a file, got 'a/b'"]),
    "a text of 10 MB": (SOUND | {"rows": "x" * 10**7}, ["rows: expected a list", "xxx"]),
    "half a pair of surrogates": (SOUND | {"more": "\ud800"}, ["not a JSON file", "surrogates"]),
    "depth": ('{"rows": ' * 900 + "1" + "}" * 900, ["not a JSON file", "recursion"]),
    "UTF-16": (lambda path: path.write_text("{}", encoding="utf-16"), ["not a JSON file", "utf-8"]),
    "a pipe": (os.mkfifo, ["not a JSON file", "expected a file"]),
    "a folder": (Path.mkdir, ["not a JSON file", "expected a file"]),
}


@cases(CONTENTS)
def test_a_json_file_that_is_not_as_its_schema_states_is_refused_with_the_place(case, tmp_path, refused):
    content, words = case
    path = tmp_path / "a.json"
    if callable(content):
        content(path)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text.replace('"DIGITS"', "1" * 10**4))
    refused(["a.json", *words], ku._read_json, path, SCHEMA)


def test_a_json_file_of_100_gb_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 10**11)
    with pytest.raises(ku.KitError, match=r"a\.json: not a JSON file \(expected a file of at most .*got 100000000000"):
        ku._read_json(tmp_path / "a.json")


def test_a_json_file_that_is_as_its_schema_states_is_read_as_it_stands(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SOUND))
    assert ku._read_json(tmp_path / "a.json", SCHEMA) == SOUND


@cases(PLACES)
def test_a_hostile_place_of_inference_is_refused_by_name(case, place, refused, tmp_path):
    spoil, settings, words = case
    spoil(tmp_path)
    refused(words, infer, place | settings)


@pytest.mark.parametrize("pack", [False, True], ids=["a run folder", "a bundle"])
def test_what_the_hostile_runs_were_before_predicts(pack, run, place, tmp_path):
    folder = packed(run, tmp_path / "bundle") if pack else run
    assert len(infer(place | dict(bundle_dir=str(folder), output_dir=str(tmp_path)))) == 10
