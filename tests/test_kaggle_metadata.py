"""tools/kaggle_metadata.py: what Kaggle or its client would refuse is refused here, before anything is sent."""

import copy
import importlib.util
import json
import os
import random
import re
import subprocess
import sys

import kaggle_metadata as km
import pytest

DROP = object()  # in the tables: leave the field out
NOTEBOOK = {
    "cells": [{"cell_type": "code", "source": ["a = 1\n", "\n", "\n"], "outputs": []}],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}
DATASET = {
    "title": "Reading model",
    "id": "me/reading-model",
    "id_no": 12,
    "subtitle": "Weights of a reading model",
    "description": "Five folds.",
    "licenses": [{"name": "CC0-1.0"}],
    "keywords": ["nlp", "english"],
    "resources": [
        {"path": "oof.csv", "description": "scores", "schema": {"fields": [{"name": "id", "type": "string"}]}}
    ],
}
KERNEL = {
    "id": "me/reading-model-train",
    "id_no": 34,
    "title": "Reading model: train",
    "code_file": "train.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_tpu": False,
    "enable_internet": False,
    "machine_shape": "NvidiaTeslaT4",
    "keywords": ["nlp"],
    "dataset_sources": ["me/reading-model", "Other-1/data/3"],
    "kernel_sources": ["me/other-notebook", "me/abcde/2"],
    "competition_sources": ["commonlitreadabilityprize", "GiveMeSomeCredit"],
    "model_sources": ["keras/deberta_v3/keras/gemma_1.1_2b_en/2"],
    "docker_image": "gcr.io/kaggle-gpu-images/python@sha256:1",
    "docker_image_pinning_type": "original",
}
BASES = {"dataset": DATASET, "kernel": KERNEL}
RULES = {"dataset": km.dataset_problems, "kernel": km.kernel_problems}

# what | field | value | a part of the message, which begins with the field
REFUSED = [
    ("dataset", "id", DROP, "id is missing"),
    ("dataset", "id", None, "id must be owner/slug without a version, got null"),
    ("dataset", "id", "", "id must be owner/slug"),
    ("dataset", "id", 7, "id must be owner/slug without a version, got 7"),
    ("dataset", "id", "reading-model", 'id must be owner/slug without a version, got "reading-model"'),
    ("dataset", "id", "me/", "id must be owner/slug"),
    ("dataset", "id", "/reading-model", "id must be owner/slug"),
    ("dataset", "id", "me/reading-model/2", "id must be owner/slug without a version"),
    ("dataset", "id", "me/reading_model", "id must have a slug of lower-case letters, digits and single hyphens"),
    ("dataset", "id", "me/reading--model", "id must have a slug of lower-case"),
    ("dataset", "id", "me/-reading", "id must have a slug of lower-case"),
    ("dataset", "id", "me/reading-model\n", "id must have a slug of lower-case"),
    ("dataset", "id", "me/Reading-model", "id must have a slug of lower-case"),
    ("dataset", "id", "me/lesemodell-größe", "id must have a slug of lower-case"),
    (
        "dataset",
        "id",
        "m_e/reading-model",
        'id must have an owner of letters, digits and single hyphens inside, got "m_e"',
    ),
    ("dataset", "id", "me/" + "a" * 5, 'id must have a slug of 6 to 50 characters, got 5: "aaaaa"'),
    ("dataset", "id", "me/" + "a" * 51, "id must have a slug of 6 to 50 characters, got 51"),
    ("dataset", "id", "me/INSERT_SLUG_HERE", "id still has the placeholder"),
    ("dataset", "id_no", "12", 'id_no must be a whole number from 1, got "12"'),
    ("dataset", "id_no", True, "id_no must be a whole number"),
    ("dataset", "title", DROP, "title is missing"),
    ("dataset", "title", None, "title must be text, got null"),
    ("dataset", "title", 3, "title must be text, got 3"),
    ("dataset", "title", "a" * 5, "title must have 6 to 50 characters, got 5"),
    ("dataset", "title", "a" * 51, "title must have 6 to 50 characters, got 51"),
    ("dataset", "title", "Reading_model", "title must have no underscore"),
    ("dataset", "title", "Reading\nmodel", 'title must be one line without spaces at its ends, got "Reading\\nmodel"'),
    ("dataset", "title", "Reading\u200bmodel", "title must be one line"),
    ("dataset", "title", " Reading model", "title must be one line without spaces at its ends"),
    ("dataset", "title", "INSERT_TITLE_HERE", "title still has the placeholder"),
    ("dataset", "subtitle", "a" * 19, "subtitle must be empty or have 20 to 80 characters, got 19"),
    ("dataset", "subtitle", "a" * 81, "subtitle must be empty or have 20 to 80 characters, got 81"),
    ("dataset", "subtitle", ["a"], "subtitle must be text, got a list of 1"),
    ("dataset", "description", {}, "description must be text, got an object of 0"),
    ("dataset", "licenses", DROP, "licenses is missing"),
    ("dataset", "licenses", [], "licenses must be a list of exactly one"),
    ("dataset", "licenses", [{"name": "other"}, {"name": "other"}], "licenses must be a list of exactly one"),
    ("dataset", "licenses", {"name": "other"}, "licenses must be a list of exactly one"),
    ("dataset", "licenses", ["CC0-1.0"], "licenses must be a list of exactly one"),
    ("dataset", "licenses", [{}], "licenses must be one of CC0-1.0,"),
    ("dataset", "licenses", [{"name": "CC BY 4.0"}], 'got "CC BY 4.0" (did you mean CC-BY-4.0?)'),
    ("dataset", "licenses", [{"name": "MIT"}], "licenses must be one of CC0-1.0,"),
    ("dataset", "keywords", "nlp", 'keywords must be a list in square brackets, got "nlp"'),
    ("dataset", "keywords", None, "keywords must be a list in square brackets, got null"),
    ("dataset", "keywords", ["nlp", 3], "keywords [1] must be text, got 3"),
    ("dataset", "keywords", ["nlp", "nlp"], 'keywords [1] is in the list twice: "nlp"'),
    ("dataset", "resources", {"path": "oof.csv"}, "resources must be a list"),
    ("dataset", "resources", ["oof.csv"], 'resources [0] must be an object, got "oof.csv"'),
    ("dataset", "resources", [{}], "resources [0] path must be text, got null"),
    ("dataset", "resources", [{"path": "no.csv"}], "resources [0] path must be a file in the folder"),
    ("dataset", "resources", [{"path": "../outside.py"}], "resources [0] path must be a path inside the folder"),
    ("dataset", "resources", [{"path": "sub/inner.py"}], "resources [0] path must be a plain file name"),
    ("dataset", "resources", [{"path": "oof.csv"}] * 2, "resources [1] path is in the list twice"),
    ("dataset", "resources", [{"path": "oof.csv", "description": 1}], "resources [0] description must be text"),
    ("dataset", "resources", [{"path": "oof.csv", "schema": []}], "resources [0] schema must be"),
    ("dataset", "resources", [{"path": "oof.csv", "schema": {"fields": [{}]}}], "resources [0] schema must be"),
    (
        "dataset",
        "resources",
        [{"path": "oof.csv", "schema": {"fields": [{"name": "id", "type": 1}]}}],
        "resources [0] schema fields must have texts",
    ),
    ("dataset", "isPrivate", True, '"isPrivate" is no field: a dataset is private unless'),
    ("dataset", "licences", [], '"licences" is no field (did you mean licenses?)'),
    ("kernel", "id", DROP, "id is missing"),
    ("kernel", "id", "reading-model-train", "id must be owner/slug without a version"),
    ("kernel", "id", "me/reading-model-train/1", "id must be owner/slug without a version"),
    ("kernel", "id", "me/abcd", "id must have a slug of 5 to 50 characters, got 4"),
    ("kernel", "id", "me/INSERT_KERNEL_SLUG_HERE", "id still has the placeholder"),
    ("kernel", "id", "me/reading-model", "title must become the slug of id, me/reading-model, but"),
    ("kernel", "id_no", 1.5, "id_no must be a whole number from 1, got 1.5"),
    ("kernel", "title", DROP, "title is missing"),
    ("kernel", "title", 5, "title must be text, got 5"),
    ("kernel", "title", "abcd", "title must have 5 to 50 characters, got 4"),
    ("kernel", "title", "a" * 51, "title must have 5 to 50 characters, got 51"),
    ("kernel", "title", "Something else", "title must become the slug of id, me/reading-model-train, but"),
    ("kernel", "code_file", DROP, "code_file is missing"),
    ("kernel", "code_file", None, "code_file must be text, got null"),
    ("kernel", "code_file", "", "code_file must be a path inside the folder"),
    ("kernel", "code_file", "no.ipynb", 'code_file must be a file in the folder, but there is no "no.ipynb"'),
    ("kernel", "code_file", "sub", "code_file must be a file in the folder"),
    ("kernel", "code_file", "nul\0.ipynb", "code_file must be a file in the folder"),
    ("kernel", "code_file", "../outside.py", "code_file must be a path inside the folder"),
    ("kernel", "code_file", "sub/../../outside.py", "code_file must be a path inside the folder"),
    ("kernel", "code_file", "/etc/hostname", "code_file must be a path inside the folder"),
    ("kernel", "code_file", "C:\\train.ipynb", "code_file must be a path inside the folder"),
    ("kernel", "code_file", "link.ipynb", "code_file must be a file and not a symbolic link"),
    ("kernel", "code_file", "linked/inner.py", "code_file must be a file and not a symbolic link"),
    ("kernel", "code_file", "script.py", 'code_file "script.py" does not fit kernel_type notebook'),
    ("kernel", "language", "Python", "language must be one of python, r, rmarkdown, got"),
    ("kernel", "language", DROP, "language is missing"),
    ("kernel", "kernel_type", "jupyter", "kernel_type must be one of script, notebook"),
    ("kernel", "kernel_type", ["notebook"], "kernel_type must be one of script, notebook, got a list of 1"),
    ("kernel", "kernel_type", "script", 'code_file "train.ipynb" does not fit kernel_type script'),
    ("kernel", "is_private", "yes", 'is_private must be true or false without quotes, got "yes"'),
    ("kernel", "is_private", "true", 'is_private must be true or false without quotes, got "true"'),
    ("kernel", "enable_gpu", 1, "enable_gpu must be true or false without quotes, got 1"),
    ("kernel", "enable_tpu", None, "enable_tpu must be true or false without quotes, got null"),
    ("kernel", "enable_internet", DROP, "enable_internet is missing: without it Kaggle's client turns the internet on"),
    ("kernel", "enable_internet", "false", "enable_internet must be true or false without quotes"),
    ("kernel", "enable_gpu", False, "enable_gpu is false, but machine_shape NvidiaTeslaT4 is a GPU"),
    ("kernel", "enable_tpu", True, "enable_tpu is true, but machine_shape NvidiaTeslaT4 is a GPU"),
    ("kernel", "machine_shape", "TpuV5E8", "enable_gpu is true, but machine_shape TpuV5E8 is a TPU"),
    ("kernel", "machine_shape", "NvidiaTeslaP100", 'machine_shape "NvidiaTeslaP100" is retired'),
    ("kernel", "machine_shape", "tpuV38", 'machine_shape "tpuV38" is retired'),
    ("kernel", "machine_shape", "None", 'machine_shape "None" is a text'),
    ("kernel", "machine_shape", "nvidiaTeslaT4", "(did you mean NvidiaTeslaT4? upper and lower case count)"),
    ("kernel", "machine_shape", 4, "machine_shape must be one of NvidiaTeslaT4,"),
    ("kernel", "dataset_sources", None, "dataset_sources must be a list"),
    ("kernel", "dataset_sources", "me/data", "dataset_sources must be a list"),
    ("kernel", "dataset_sources", ["data"], "dataset_sources [0] must be owner/slug or owner/slug/version"),
    ("kernel", "dataset_sources", ["me/data", ""], "dataset_sources [1] must be owner/slug"),
    ("kernel", "dataset_sources", ["me/data/latest"], "dataset_sources [0] must be owner/slug"),
    ("kernel", "dataset_sources", ["me/data/1/2"], "dataset_sources [0] must be owner/slug"),
    ("kernel", "dataset_sources", ["me/my_data"], "dataset_sources [0] must be owner/slug"),
    ("kernel", "dataset_sources", ["me/data"] * 2, "dataset_sources [1] is in the list twice"),
    ("kernel", "kernel_sources", ["me/abcd"], "kernel_sources [0] must be owner/slug"),
    ("kernel", "kernel_sources", ["me/abcde/"], "kernel_sources [0] must be owner/slug"),
    ("kernel", "kernel_sources", [["me/abcde"]], "kernel_sources [0] must be owner/slug"),
    ("kernel", "model_sources", ["me/model/pyTorch/base"], "model_sources [0] must be owner/model/framework"),
    ("kernel", "model_sources", ["me/model/pyTorch/base/v1"], "model_sources [0] must be owner/model/framework"),
    ("kernel", "model_sources", ["me/model/pyTorch/base/" + "1" * 5000], "model_sources [0] must be owner/model"),
    ("kernel", "model_sources", ["me//pyTorch/base/1"], "model_sources [0] must be owner/model/framework"),
    ("kernel", "model_sources", ["me/model/pyTorch/base/1/2"], "model_sources [0] must be owner/model/framework"),
    ("kernel", "competition_sources", "titanic", "competition_sources must be a list"),
    (
        "kernel",
        "competition_sources",
        ["https://www.kaggle.com/competitions/titanic"],
        "competition_sources [0] must be the name in the competition's address",
    ),
    ("kernel", "keywords", "nlp", "keywords must be a list"),
    ("kernel", "docker_image", 1, "docker_image must be text"),
    ("kernel", "docker_image_pinning_type", "", "docker_image_pinning_type must be one of original, latest"),
    ("kernel", "docker_image_pinning_type", "newest", "docker_image_pinning_type must be one of original, latest"),
    ("kernel", "enable_internt", False, '"enable_internt" is no field (did you mean enable_internet?)'),
]

ACCEPTED = [
    ("dataset", {}),
    ("dataset", {"title": "a" * 6, "id": "me/" + "a" * 6}),
    ("dataset", {"title": "a" * 50, "id": "me/" + "a" * 50}),
    ("dataset", {"title": "Größe & Maß (v2.0)", "id": "CooperUnion/2-3-4-5"}),
    ("dataset", {"subtitle": "a" * 20}),
    ("dataset", {"subtitle": "a" * 80}),
    ("dataset", {"subtitle": "", "description": ""}),
    ("dataset", {"subtitle": None, "description": None, "id_no": None, "resources": None}),
    ("dataset", {name: DROP for name in DATASET if name not in km.DATASET_REQUIRED}),
    ("dataset", {"keywords": [], "resources": []}),
    ("dataset", {"resources": [{"path": "oof.csv"}, {"path": "manifest.json", "schema": {}}]}),
    ("dataset", {"licenses": [{"name": "copyright-authors", "title": "All rights"}]}),
    ("dataset", {"expectedUpdateFrequency": "never", "userSpecifiedSources": "", "image": None}),
    ("kernel", {}),
    ("kernel", {"title": "a" * 5, "id": "me/" + "a" * 5}),
    ("kernel", {"title": "a" * 50, "id": "me/" + "a" * 50}),
    ("kernel", {"title": "Don't stop: 1,000 (café)", "id": "me/don-t-stop-1000-cafe"}),
    ("kernel", {"title": "snake_case_title", "id": "me/snake-case-title"}),
    ("kernel", {name: DROP for name in KERNEL if name not in km.KERNEL_REQUIRED}),
    ("kernel", {"enable_gpu": False, "machine_shape": ""}),
    ("kernel", {"enable_gpu": False, "machine_shape": None}),
    ("kernel", {"enable_gpu": False, "enable_tpu": True, "machine_shape": "TpuV5E8"}),
    ("kernel", {"enable_gpu": DROP, "enable_tpu": DROP, "machine_shape": "NvidiaL4"}),
    ("kernel", {"enable_internet": True, "is_private": False}),
    ("kernel", {"kernel_type": "script", "code_file": "script.py"}),
    ("kernel", {"kernel_type": "script", "code_file": "./sub/inner.py"}),
    ("kernel", {"language": "rmarkdown"}),
    ("kernel", {"docker_image": None, "docker_image_pinning_type": None, "id_no": None}),
    ("kernel", {"docker_image": "", "docker_image_pinning_type": "latest"}),
    ("kernel", {f"{kind}_sources": [] for kind in ("dataset", "kernel", "competition", "model")}),
    ("kernel", {"dataset_sources": ["uciml/iris", "me/2020-21/999999999"]}),
]

# file name | a part of the message
HOSTILE = [
    ("", "has no name"),
    ("sub/oof.csv", "lies in a sub-folder, which Kaggle's client drops"),
    ("/etc/passwd", "is an absolute path"),
    ("C:\\oof.csv", "is an absolute path"),
    ("../oof.csv", "leads out of the folder"),
    ("a/../../oof.csv", "leads out of the folder"),
    ("..\\oof.csv", "leads out of the folder"),
    ("..", "leads out of the folder"),
    ("sub\\oof.csv", "must have a name of ASCII letters, digits, '.', '_' and '-'"),
    (".env", "is hidden"),
    (".git/config", "is hidden"),
    ("a&b.ini", "must have a name of ASCII"),
    ("a b.csv", "must have a name of ASCII"),
    ("@PaxHeader", "must have a name of ASCII"),
    ("größe.csv", "must have a name of ASCII"),
    ("\u0430.csv", "must have a name of ASCII"),  # a Cyrillic letter that looks like an a
    ("a\n.csv", "must have a name of ASCII"),
    ("a.csv\n", "must have a name of ASCII"),
    ("a\0.csv", "must have a name of ASCII"),
    ("a\udcff.csv", "must have a name of ASCII"),
    ("a+b.whl", "must have a name of ASCII"),
    ("-rf", "that begins with a letter or digit"),
    ("_hidden.csv", "that begins with a letter or digit"),
    ("name.", "does not end in a dot"),
    ("data.zip", "is an archive, which Kaggle unpacks"),
    ("DATA.ZIP", "is an archive"),
    ("data.tar", "is an archive"),
    ("data.tar.gz", "is an archive"),
    ("data.csv.gz", "is an archive"),
    ("data.tgz", "is an archive"),
    ("data.bz2", "is an archive"),
    ("data.xz", "is an archive"),
    ("data.7z", "is an archive"),
    ("data.rar", "is an archive"),
    ("data.zst", "is an archive"),
    ("a" * 101, "must have a name of at most 100 characters"),
    ("con", "has the name of a device on Windows"),
    ("NUL.txt", "has the name of a device on Windows"),
    ("com1.tar.csv", "has the name of a device on Windows"),
    ("dataset-metadata.json", "is not uploaded as a file"),
    ("datapackage.json", "is not uploaded as a file"),
    ("kernel-metadata.json", "is not uploaded as a file"),
    ("dataset-cover-image.png", "is not uploaded as a file"),
]


def spoilt(what, changes):
    return {name: value for name, value in (BASES[what] | changes).items() if value is not DROP}


def fill(folder, metadata, what):
    """A folder as it would be uploaded: metadata (parsed, or bytes), a notebook, scripts, a table and links."""
    (folder / "sub").mkdir(parents=True)
    raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    (folder / f"{what}-metadata.json").write_bytes(raw)
    (folder / "train.ipynb").write_text(json.dumps(NOTEBOOK))
    (folder / "manifest.json").write_text("{}")
    for name in ("script.py", "sub/inner.py", "oof.csv", "../outside.py"):
        (folder / name).write_text("a = 1\n")
    return folder


def link(folder):
    (folder / "link.ipynb").symlink_to("train.ipynb")
    (folder / "linked").symlink_to("sub")


def upload(folder, metadata=DATASET, what="dataset"):
    """A folder without anything that a check of the whole folder would refuse."""
    fill(folder, metadata, what)
    (folder / "sub" / "inner.py").unlink()
    (folder / "sub").rmdir()
    return folder


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    folder = fill(tmp_path_factory.mktemp("shared") / "upload", {}, "dataset")
    link(folder)
    return folder


def ids(rows):
    return [f"{row[0]}-{row[1]}-{number}" for number, row in enumerate(rows)]


@pytest.mark.parametrize(("what", "field", "value", "message"), REFUSED, ids=ids(REFUSED))
def test_a_spoilt_field_is_refused_with_its_name(what, field, value, message, shared_folder):
    problems = RULES[what](spoilt(what, {field: value}), shared_folder)
    assert any(message in problem and field in problem for problem in problems), problems
    assert all(problem.startswith(f"{what}-metadata.json: ") and problem.isascii() for problem in problems)


@pytest.mark.parametrize(("what", "changes"), ACCEPTED)
def test_what_kaggle_takes_is_accepted(what, changes, shared_folder):
    assert RULES[what](spoilt(what, changes), shared_folder) == []


@pytest.mark.parametrize("what", BASES)
@pytest.mark.parametrize("value", [None, True, 3, 1.5, "text", [], [{}], {}])
def test_any_json_value_gets_an_answer_and_no_exception(value, what, shared_folder):
    assert RULES[what](value, shared_folder)


def test_all_problems_are_reported_together(shared_folder):
    changes = {"title": "abc", "language": "julia", "enable_internet": DROP, "keyword": [], "dataset_sources": ["x", 1]}
    problems = km.kernel_problems(spoilt("kernel", changes), shared_folder)
    fields = [problem.split(": ")[1].split()[0] for problem in problems]
    assert fields == [
        "enable_internet",
        "title",
        "language",
        "dataset_sources",
        "dataset_sources",
        '"keyword"',
        "title",
    ]


@pytest.mark.parametrize("name", km.LICENSES)
def test_every_licence_is_known_and_its_spelling_counts(name, shared_folder):
    assert km.dataset_problems(spoilt("dataset", {"licenses": [{"name": name}]}), shared_folder) == []
    (problem,) = km.dataset_problems(spoilt("dataset", {"licenses": [{"name": name.swapcase()}]}), shared_folder)
    assert problem.endswith(f"(did you mean {name}? upper and lower case count)")


@pytest.mark.parametrize("name", km.MACHINE_SHAPES)
def test_every_machine_goes_with_its_own_accelerator_only(name, shared_folder):
    for gpu in (True, False):
        changes = {"machine_shape": name, "enable_gpu": gpu, "enable_tpu": not gpu}
        problems = km.kernel_problems(spoilt("kernel", changes), shared_folder)
        assert len(problems) == (0 if gpu == name.startswith("Nvidia") else 2)


def test_both_accelerators_at_once_are_refused(shared_folder):
    changes = {"machine_shape": DROP, "enable_gpu": True, "enable_tpu": True}
    (problem,) = km.kernel_problems(spoilt("kernel", changes), shared_folder)
    assert "enable_gpu and enable_tpu are both true" in problem


def test_a_long_value_is_shown_shortened(shared_folder):
    (problem,) = km.dataset_problems(spoilt("dataset", {"title": "a" * 10**6}), shared_folder)
    assert len(problem) < 200


@pytest.mark.parametrize(("name", "message"), HOSTILE)
def test_a_hostile_file_name_is_refused(name, message):
    problems = km.file_problems({"good.csv": 1, name: 1})
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith(f"file {name!a} ") for problem in problems)


@pytest.mark.parametrize("name", ["a", "A-1_b.safetensors", "kernel_utils.py", "a..b", "com10", "0", "a" * 100, "zip"])
def test_a_plain_file_name_is_accepted(name):
    assert km.file_problems({name: 1}) == []


def test_the_files_of_a_dataset_are_checked_together():
    assert km.file_problems({"a.csv": 1, "A.csv": 1}) == ["files 'a.csv' and 'A.csv' differ only by case"]
    assert km.file_problems({"a.csv": 0}) == ["file 'a.csv' is empty: 0 bytes"]
    assert km.file_problems({f"{i}": 1 for i in range(1000)}) == []
    assert km.file_problems({f"{i}": 1 for i in range(1001)}) == ["a dataset can have 1000 files, got 1001"]
    assert km.file_problems({"a": 10**11, "b": 10**11}) == []
    assert km.file_problems({"a": 10**11, "b": 10**11 + 1}) == [
        "a dataset can have 200000000000 bytes, got 200000000001"
    ]


NOT_JSON = [
    (b"", "is empty"),
    (b" \n", "is empty"),
    (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    (json.dumps({}).encode("utf-16"), "must be UTF-8"),
    (b'{"title": "Gr\xf6\xdfe"}', "must be UTF-8"),
    (b"{'title': 1}", "must be JSON: Expecting property name"),
    (b'{"title": "a",}', "must be JSON"),
    (b"{} {}", "must be JSON"),
    (b'{"title": "a", "title": "b"}', 'has "title" twice in one object'),
    (b'{"licenses": [{"name": "other", "name": "other"}]}', 'has "name" twice in one object'),
    (b"[" * 100_000, "must be JSON"),
    (b"1" * 5000, "digits"),
    (b"null", "must hold one object in curly brackets, got null"),
    (b"[]", "must hold one object in curly brackets, got a list of 0"),
]


@pytest.mark.parametrize("what", BASES)
@pytest.mark.parametrize(("raw", "message"), NOT_JSON)
def test_a_metadata_file_that_cannot_be_read_is_one_clear_problem(raw, message, what, tmp_path):
    (problem,) = km.folder_problems(upload(tmp_path / "upload", raw, what))
    assert problem.startswith(f"{what}-metadata.json: ") and message in problem


CODE = [
    ("train.ipynb", b"", "is empty"),
    ("train.ipynb", b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    ("train.ipynb", b"a = 1", "must be JSON"),
    ("train.ipynb", b"null", "must be a notebook"),
    ("train.ipynb", b"{}", "must be a notebook"),
    ("train.ipynb", b'{"cells": null}', "must be a notebook"),
    ("train.ipynb", b'{"cells": [3]}', "must be a notebook"),
    ("train.ipynb", b'{"cells": [{"source": "a"}]}', "must be a notebook"),
    ("train.ipynb", b'{"cells": [{"source": "a", "outputs": []}]}', "must be a notebook"),
    ("train.ipynb", b'{"cells": [{"cell_type": "code"}]}', "must be a notebook"),
    ("train.ipynb", b'{"cells": [{"cell_type": "code", "source": ["a", 1]}]}', "must be a notebook"),
    ("train.ipynb", json.dumps(NOTEBOOK | {"x": "a" * 10**6}).encode(), "must be below 1000000 bytes, has 1000"),
    ("script.py", b"a = '\xff'", "must be UTF-8"),
    ("script.py", b"a" * 10**6, "must be below 1000000 bytes, has 1000000"),
]


@pytest.mark.parametrize(("name", "raw", "message"), CODE)
def test_the_code_file_is_read(name, raw, message, tmp_path):
    kind = "notebook" if name.endswith("ipynb") else "script"
    folder = upload(tmp_path / "upload", spoilt("kernel", {"code_file": name, "kernel_type": kind}), "kernel")
    assert km.folder_problems(folder) == []
    (folder / name).write_bytes(raw)
    (problem,) = km.folder_problems(folder)
    assert problem.startswith(f'kernel-metadata.json: code_file "{name}" {message}')


def test_a_dataset_folder_may_hold_regular_files_only(tmp_path):
    folder = upload(tmp_path / "upload")
    assert km.folder_problems(folder) == []
    link(folder)
    (folder / "folder").mkdir()
    (folder / "folder" / "a.csv").write_text("a")
    (folder / "empty.csv").touch()
    (folder / ".env").write_text("KEY=1")
    os.mkfifo(folder / "pipe")
    assert sorted(re.sub(" by the.*|,.*|: put.*", "", problem) for problem in km.folder_problems(folder)) == [
        "file '.env' is hidden",
        "file '.env' must have a name of ASCII letters",
        "file 'empty.csv' is empty: 0 bytes",
        "file 'link.ipynb' is a symbolic link",
        "file 'linked' is a symbolic link",
        "file 'pipe' is no regular file",
        "folder 'folder' is a sub-folder",
    ]


def test_a_metadata_file_is_a_regular_file(tmp_path):
    (tmp_path / "dataset-metadata.json").mkdir()
    (tmp_path / "real.json").write_text(json.dumps(KERNEL))
    (tmp_path / "kernel-metadata.json").symlink_to("real.json")
    problems = km.folder_problems(tmp_path)
    assert {"dataset-metadata.json: must be a regular file", "kernel-metadata.json: must be a regular file"} < {
        *problems
    }


def test_a_dataset_without_a_file_is_refused(tmp_path):
    (tmp_path / "dataset-metadata.json").write_text(json.dumps(spoilt("dataset", {"resources": DROP})))
    assert km.folder_problems(tmp_path) == ["there is no file to upload"]


def test_the_command_prints_all_problems_of_all_folders_and_fails(tmp_path, monkeypatch, capsys):
    good = upload(tmp_path / "good")
    bad = upload(tmp_path / "bad", spoilt("dataset", {"title": "a", "id": "b"}))
    (bad / "kernel-metadata.json").write_text("{}")
    (tmp_path / "neither").mkdir()

    def run(*folders):
        monkeypatch.setattr(sys, "argv", ["kaggle_metadata.py", *map(str, folders)])
        with pytest.raises(SystemExit) as stop:
            km.main()
        return stop.value.code, capsys.readouterr().out.splitlines()

    assert run(good, good) == (0, [f"{good}: fine"]) and run(good) == (0, [f"{good}: fine"])
    code, lines = run(bad, good, tmp_path / "neither", tmp_path / "nowhere")
    assert code == 1 and f"{good}: fine" in lines and len(lines) == 2 + len(km.KERNEL_REQUIRED) + 3
    assert f"{tmp_path / 'nowhere'}: must be a folder" in lines
    assert any("must hold dataset-metadata.json or kernel-metadata.json, has neither" in line for line in lines)


# Runs the real client in a process of its own, where every request ends before it is sent. Cases [[command, folder]]
# come as JSON, answers go as JSON: null where the client would have sent the request, else what it raised.
CLIENT = """
import contextlib, json, socket, sys, types

def offline(*args, **kwargs):
    attempts.append(str(args))
    raise OSError("this test has no network")

attempts = []
socket.socket.connect = socket.getaddrinfo = socket.create_connection = offline
import requests
from kaggle import api
from slugify import slugify

class Sent(Exception):
    pass

def send(request):
    json.dumps(type(request).to_dict(request))
    raise Sent

def free(request):
    response = requests.Response()
    response.status_code = 404
    raise requests.HTTPError("no such dataset", response=response)

datasets = types.SimpleNamespace(get_dataset_status=free, create_dataset=send, create_dataset_version=send,
                                 create_dataset_version_by_id=send)
client = types.SimpleNamespace(datasets=types.SimpleNamespace(dataset_api_client=datasets),
                               kernels=types.SimpleNamespace(kernels_api_client=types.SimpleNamespace(save_kernel=send)))
api.build_kaggle_client = lambda *args, **kwargs: contextlib.nullcontext(client)
api._upload_blob = lambda *args, **kwargs: "token"
commands = {
    "create": lambda folder: api.dataset_create_new(folder, quiet=True),
    "version": lambda folder: api.dataset_create_version(folder, "notes", quiet=True),
    "push": api.kernels_push,
}

def answer(command, argument):
    if command == "slug":
        return slugify(argument)
    try:
        result = commands[command](argument)
    except Sent:
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return f"no request, but {result}"

with contextlib.redirect_stdout(sys.stderr):
    answers = [answer(*case) for case in json.load(sys.stdin)]
print(json.dumps({"answers": answers, "attempts": attempts}))
"""

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("kaggle") is None, reason="compares with Kaggle's own client: pip install kaggle six"
)


def ask_client(cases, folder):
    """Answers of the real client. Its own folders and a made-up key: with these, importing it sends nothing."""
    names = ("HOME", "KAGGLE_CONFIG_DIR", "TMPDIR")
    own = {name: str(folder / name) for name in names} | {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "none"}
    for name in names:
        os.mkdir(own[name])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE_")}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(cases),
        env=kept | own | {"KAGGLE_API_ENVIRONMENT": "LOCALHOST"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["attempts"] == []
    return result["answers"]


POOL = [None, True, False, 0, 1, -1, 1.5, 10**30, "", " ", "x", "true", "me/x", "me/abcde", "me/a-slug/1", "a/b/c/d/1"]
POOL += ["a/b/c/d/" + "1" * 5000, "\ud800", "nul\0", "größe", "INSERT_TITLE_HERE", "me/INSERT_SLUG_HERE", "oof.csv"]
POOL += [
    "sub",
    "script.py",
    "notebook",
    "python",
    "latest",
    "https://www.kaggle.com/me/x",
    [],
    [None],
    [3],
    ["x"],
    [[]],
]
POOL += [[""], ["me/x"], ["me/abcde/"], [{}], {}, {"name": "other"}, [{"name": 3}], [{"path": "oof.csv"}]]
POOL += ["a" * length for length in (4, 5, 6, 19, 20, 50, 51, 80, 81)]


def inner_places(value, path=()):
    """Paths of keys to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from inner_places(item, (*path, key))


def mutated(metadata, rng):
    """The metadata with one or two places dropped, replaced, repeated or cut."""
    metadata = json.loads(json.dumps(metadata))
    for _ in range(rng.randint(1, 2)):
        *path, key = rng.choice(list(inner_places(metadata)))
        holder = metadata
        for step in path:
            holder = holder[step]
        change = rng.choice(["drop", "replace", "replace", "replace", "wrap", "cut"])
        if change == "drop":
            del holder[key]
        elif change == "replace":
            holder[key] = copy.deepcopy(rng.choice(POOL))
        elif change == "wrap":
            holder[key] = [holder[key]] * rng.randint(1, 2)
        else:
            holder[key] = str(holder[key])[: rng.randint(0, 6)]
    return metadata


def metadata_cases():
    """Content of every table and of seeded mutations: (what, parsed metadata or bytes)."""
    cases = [(what, spoilt(what, {field: value})) for what, field, value, _ in REFUSED]
    cases += [(what, spoilt(what, changes)) for what, changes in ACCEPTED]
    cases += [(what, raw) for raw, _ in NOT_JSON for what in BASES]
    rng = random.Random(7)
    return cases + [(what, mutated(BASES[what], rng)) for _ in range(300) for what in BASES]


@needs_client
def test_whatever_the_real_client_refuses_or_crashes_on_is_refused_here(tmp_path):
    cases = []  # command, folder, our problems
    for number, (what, metadata) in enumerate(metadata_cases()):
        folder = fill(tmp_path / f"{number}" / "upload", metadata, what)
        link(folder)
        problems = [p for p in km.folder_problems(folder) if p.startswith(f"{what}-metadata.json")]
        cases += [(c, folder, problems) for c in (("create", "version") if what == "dataset" else ("push",))]
    for number, (name, raw, _) in enumerate(CODE):
        kind = "notebook" if name.endswith("ipynb") else "script"
        metadata = spoilt("kernel", {"code_file": name, "kernel_type": kind})
        folder = fill(tmp_path / f"code{number}" / "upload", metadata, "kernel")
        (folder / name).write_bytes(raw)
        cases.append(("push", folder, km.folder_problems(folder)))
    answers = ask_client([(command, str(folder)) for command, folder, _ in cases], tmp_path)
    missed = [
        (command, answer, next(folder.glob("*-metadata.json")).read_bytes()[:2000])
        for (command, folder, problems), answer in zip(cases, answers, strict=True)
        if answer and not problems
    ]
    assert not missed
    fine = [command for (command, _, problems), answer in zip(cases, answers, strict=True) if not problems]
    assert {*fine} == {"create", "version", "push"} and len(fine) > 60  # neither side refuses everything
    assert sum(answer is not None for answer in answers) > 300


@needs_client
def test_titles_become_the_slugs_that_the_client_expects(tmp_path):
    rng = random.Random(7)
    titles = [changes["title"] for what, changes in ACCEPTED if what == "kernel" and "title" in changes]
    titles += ["1,000,000 rows", "1, 2", "a,1", "'quoted'", "--a--", "A/B: C++ (100 %)", "Ünïcödé", "x–y"]
    titles += ["".join(rng.choices(" -_,.'\"()[]!?/+%019aAzZ", k=rng.randint(5, 50))) for _ in range(300)]
    assert [km.slug_of(title) for title in titles] == ask_client([("slug", title) for title in titles], tmp_path)
