"""tools/kaggle_metadata.py: what Kaggle or its client would refuse is refused before it is sent."""

import copy
import importlib.util
import json
import os
import random
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
DATASET = {"title": "Reading model", "id": "me/reading-model", "licenses": [{"name": "CC0-1.0"}]}
KERNEL = {
    "id": "me/reading-model-train",
    "title": "Reading model: train",
    "code_file": "train.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "enable_internet": False,
    "dataset_sources": ["me/reading-model", "Other-1/data/3"],
    "kernel_sources": ["me/other-notebook", "me/abcde/2"],
    "competition_sources": ["commonlitreadabilityprize", "GiveMeSomeCredit"],
    "model_sources": ["keras/deberta_v3/keras/gemma_1.1_2b_en/2"],
}
BASES = {"dataset": DATASET, "kernel": KERNEL}
LETTERS = "lower-case letters, digits and hyphens"

# what | field | values, each refused | the message
REFUSED = [
    ("dataset", "id", [DROP, None, "", 7, ["me/reading-model"]], "id must be owner/slug"),
    ("dataset", "id", ["reading-model", "me/", "/reading-model", "me/reading-model/2"], "owner/slug"),
    ("dataset", "id", ["me/reading_model", "me/reading--model", "me/-reading"], LETTERS),
    ("dataset", "id", ["me/reading-model\n", "me/Reading-model", "me/lesemodell-größe"], LETTERS),
    ("dataset", "id", ["m_e/reading-model", "me/INSERT_SLUG_HERE"], 'got "m'),
    ("dataset", "id", ["me/aaaaa", "me/" + "a" * 51], "the slug of 6 to 50 lower-case letters"),
    ("dataset", "title", [DROP, None, 3, "a" * 5, "a" * 51], "one line of 6 to 50 characters"),
    ("dataset", "title", ["Reading\nmodel", "Reading\u200bmodel", " Reading model"], "one line of"),
    ("dataset", "title", ["Reading_model", "INSERT_TITLE_HERE"], "title must have no underscore"),
    ("dataset", "licenses", [DROP, [], [{"name": "other"}] * 2], "a list of exactly one"),
    ("dataset", "licenses", [{"name": "other"}, ["CC0-1.0"]], "a list of exactly one"),
    ("dataset", "licenses", [[{}], [{"name": "CC BY 4.0"}], [{"name": "MIT"}]], "one of CC0-1.0,"),
    ("kernel", "id", [DROP, "reading-model-train", "me/reading-model-train/1"], "owner/slug"),
    ("kernel", "id", ["me/abcd", "me/INSERT_KERNEL_SLUG_HERE"], "the slug of 5 to 50 lower-case"),
    ("kernel", "id", ["me/reading-model"], "title must become the slug of id, me/reading-model, "),
    ("kernel", "title", ["Something else"], "title must become the slug of id, me/reading-model-t"),
    ("kernel", "title", [DROP, 5, "abcd", "a" * 51], "title must be one line of 5 to 50"),
    ("kernel", "code_file", [DROP, None, "", 7, "no.ipynb", "sub", "nul\0.ipynb"], "code_file must"),
    ("kernel", "code_file", ["../outside.ipynb", "/etc/hostname", "..", "link.ipynb"], "code_file"),
    ("kernel", "code_file", ["script.py"], "code_file script.py must be a notebook"),
    ("kernel", "language", [DROP, "Python", "r"], "language must be python, got"),
    ("kernel", "kernel_type", [DROP, "script", ["notebook"]], "kernel_type must be notebook, got"),
    ("kernel", "enable_internet", [DROP, None, "false", 0], "enable_internet must be true or false"),
    ("kernel", "dataset_sources", [None, "me/data"], "dataset_sources must be a list"),
    ("kernel", "dataset_sources", [["data"], ["me/data/latest"], [3]], "[0] must be owner/slug or"),
    ("kernel", "dataset_sources", [["me/data", ""], ["me/d", "me/my_data"]], "[1] must be owner/"),
    ("kernel", "kernel_sources", [["me/abcd"], ["me/abcde/"], [["me/abcde"]]], "[0] must be owner/"),
    ("kernel", "model_sources", [["me/m/pyTorch/base"], ["me//pyTorch/base/1"]], "owner/model/fram"),
    ("kernel", "model_sources", [["me/m/pyTorch/base/v1"], ["me/m/p/b/1/2"]], "owner/model/framework"),
    ("kernel", "competition_sources", [["https://www.kaggle.com/c/titanic"]], "not the address"),
]
ACCEPTED = [
    ("dataset", {"title": "a" * 6, "id": "me/" + "a" * 6}),
    ("dataset", {"title": "a" * 50, "id": "me/" + "a" * 50}),
    ("dataset", {"title": "Größe & Maß (v2.0)", "id": "CooperUnion/2-3-4-5"}),
    ("dataset", {"licenses": [{"name": "copyright-authors", "title": "All rights"}]}),
    ("dataset", {"subtitle": "", "description": "Five folds.", "keywords": ["nlp"]}),
    ("kernel", {"title": "a" * 5, "id": "me/" + "a" * 5}),
    ("kernel", {"title": "Don't stop: (2.0)", "id": "me/don-t-stop-2-0"}),
    ("kernel", {"title": "snake_case_title", "id": "me/snake-case-title"}),
    ("kernel", {name: DROP for name in KERNEL if name.endswith("_sources")}),
    ("kernel", {name: [] for name in KERNEL if name.endswith("_sources")}),
    ("kernel", {"enable_internet": True, "is_private": False, "machine_shape": "NvidiaL4"}),
]
BAD_NAMES = ["", "sub/oof.csv", "/etc/passwd", "C:\\oof.csv", "../oof.csv", "..", ".env", "a&b.ini"]
BAD_NAMES += ["a b.csv", "größe.csv", "\u0430.csv", "a\n.csv", "a.csv\n", "a\0.csv", "a\udcff.csv"]
BAD_NAMES += ["a+b.whl", "-rf", "_hidden.csv", "name.", "a" * 101]


def spoilt(what, changes):
    return {name: value for name, value in (BASES[what] | changes).items() if value is not DROP}


def upload(folder, metadata, what):
    """A folder as it would be uploaded, with nothing else to refuse; metadata parsed or as bytes."""
    folder.mkdir(parents=True)
    raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    (folder / f"{what}-metadata.json").write_bytes(raw)
    (folder / "train.ipynb").write_text(json.dumps(NOTEBOOK))
    (folder / "script.py").write_text("a = 1\n")
    if what == "kernel":
        (folder / "sub").mkdir()
        (folder / "link.ipynb").symlink_to("train.ipynb")
        (folder.parent / "outside.ipynb").write_text(json.dumps(NOTEBOOK))
    return folder


@pytest.mark.parametrize(("what", "field", "values", "message"), REFUSED)
def test_a_spoilt_field_is_refused_with_its_name(what, field, values, message, tmp_path):
    for number, value in enumerate(values):
        folder = tmp_path / f"{number}" / "upload"
        problems = km.folder_problems(upload(folder, spoilt(what, {field: value}), what))
        assert any(message in problem and field in problem for problem in problems), value
        assert all(p.startswith(f"{what}-metadata.json: ") and p.isascii() for p in problems)


@pytest.mark.parametrize(("what", "changes"), ACCEPTED)
def test_what_kaggle_takes_is_accepted(what, changes, tmp_path):
    assert km.folder_problems(upload(tmp_path / "upload", spoilt(what, changes), what)) == []


def test_any_json_value_gets_an_answer_and_no_exception(tmp_path):
    for value in (None, True, 3, 1.5, "text", [], [{}], {}):
        assert km.dataset_problems(value)
        assert km.kernel_problems(value, tmp_path)
        for what, base in BASES.items():
            for field in base:
                metadata = base | {field: value}
                check = km.dataset_problems if what == "dataset" else km.kernel_problems
                check(metadata, *([] if what == "dataset" else [tmp_path]))


def test_all_problems_are_reported_together(tmp_path):
    changes = {"title": "abc", "language": "julia", "enable_internet": DROP, "code_file": DROP}
    changes |= {"dataset_sources": ["x", "a" * 10**6]}
    problems = km.kernel_problems(spoilt("kernel", changes), tmp_path)
    fields = [problem.split(": ")[1].split()[0] for problem in problems]
    sources = ["dataset_sources"] * 2
    assert fields == ["title", "language", "enable_internet", *sources, "code_file"]
    assert all(len(problem) < 250 for problem in problems)  # a long value is shortened


def test_every_licence_of_kaggle_is_known_and_its_spelling_counts():
    assert {"CC0-1.0", "CC-BY-4.0", "apache-2.0", "copyright-authors", "other"} < {*km.LICENSES}
    for name in km.LICENSES:
        assert km.dataset_problems(DATASET | {"licenses": [{"name": name}]}) == []
        assert km.dataset_problems(DATASET | {"licenses": [{"name": name.swapcase()}]})


def test_a_name_that_is_lost_or_changed_on_the_way_is_refused():
    for name in BAD_NAMES:
        problems = km.file_problems({"good.csv": 1, name: 1})
        assert problems and all(problem.startswith(f"file {name!a} must have") for problem in problems)
    for name in ("data.zip", "DATA.ZIP", "a.tar", "a.csv.gz", "a.tgz", "a.7z", "a.rar", "a.zst"):
        assert km.file_problems({name: 1}) == [f"file {name!r} is an archive, which Kaggle unpacks"]
    for name in ("dataset-metadata.json", "datapackage.json", "dataset-cover-image.png"):
        assert "which is not uploaded" in km.file_problems({name: 1})[0]
    plain = ["a", "A-1_b.safetensors", "kernel_utils.py", "a..b", "0", "a" * 100, "zip", "con"]
    assert km.file_problems(dict.fromkeys(plain, 1)) == []


def test_the_files_of_a_dataset_are_checked_together():
    case = "files 'a.csv' and 'A.csv' differ only by case"
    assert km.file_problems({"a.csv": 1, "A.csv": 1}) == [case]
    assert km.file_problems({"a.csv": 0}) == ["file 'a.csv' is empty: 0 bytes"]
    many = {f"{i}": 1 for i in range(1000)}
    assert km.file_problems(many) == []
    assert km.file_problems(many | {"x": 1}) == ["a dataset can have 1000 files, got 1001"]
    assert km.file_problems({"a": 10**11, "b": 10**11}) == []
    assert "can have 200000000000 bytes" in km.file_problems({"a": 10**11, "b": 10**11 + 1})[0]


NOT_JSON = [
    (b"", "must be JSON in UTF-8"),
    (b"\xef\xbb\xbf{}", "must be JSON in UTF-8: Unexpected UTF-8 BOM"),
    (json.dumps({}).encode("utf-16"), "must be JSON in UTF-8"),
    (b'{"title": "Gr\xf6\xdfe"}', "must be JSON in UTF-8"),
    (b'{"title": "a",}', "must be JSON in UTF-8"),
    (b"{} {}", "must be JSON in UTF-8"),
    (b"[" * 100_000, "must be JSON in UTF-8"),
    (b"1" * 5000, "must be JSON in UTF-8"),
    (b"null", "must hold one object, got nothing"),
    (b"[]", "must hold one object, got []"),
]


@pytest.mark.parametrize("what", BASES)
def test_a_metadata_file_that_cannot_be_read_is_one_clear_problem(what, tmp_path):
    for number, (raw, message) in enumerate(NOT_JSON):
        (problem,) = km.folder_problems(upload(tmp_path / f"{number}" / "upload", raw, what))
        assert problem.startswith(f"{what}-metadata.json: {message}")
    folder = upload(tmp_path / "linked" / "upload", {}, what)
    (folder / f"{what}-metadata.json").rename(tmp_path / "real.json")
    (folder / f"{what}-metadata.json").symlink_to(tmp_path / "real.json")
    message = f"{what}-metadata.json: must be a regular file"
    assert km.folder_problems(folder) == [message]


CODE = [
    (b"", "must be JSON in UTF-8"),
    (b"a = 1", "must be JSON in UTF-8"),
    (b"null", "must be a notebook"),
    (b"{}", "must be a notebook"),
    (b'{"cells": null}', "must be a notebook"),
    (b'{"cells": [3]}', "must be a notebook"),
    (b'{"cells": [{"source": "a", "outputs": []}]}', "must be a notebook"),
    (b'{"cells": [{"cell_type": "code"}]}', "must be a notebook"),
    (b'{"cells": [{"cell_type": "code", "source": ["a", 1]}]}', "must be a notebook"),
    (json.dumps(NOTEBOOK | {"x": "a" * 10**6}).encode(), "must be below 1000000 bytes, has 1000"),
]


@pytest.mark.parametrize(("raw", "message"), CODE)
def test_the_notebook_of_a_kernel_is_read(raw, message, tmp_path):
    folder = upload(tmp_path / "upload", KERNEL, "kernel")
    assert km.folder_problems(folder) == []
    (folder / "train.ipynb").write_bytes(raw)
    (problem,) = km.folder_problems(folder)
    assert problem.startswith(f"kernel-metadata.json: code_file train.ipynb {message}")


def test_a_dataset_folder_may_hold_regular_files_only(tmp_path):
    folder = upload(tmp_path / "upload", DATASET, "dataset")
    (folder / "link.csv").symlink_to("script.py")
    (folder / "folder").mkdir()
    (folder / "empty.csv").touch()
    os.mkfifo(folder / "pipe")
    problems = sorted(" ".join(problem.split()[:5]) for problem in km.folder_problems(folder))
    assert problems == [
        "file 'empty.csv' is empty: 0",
        "file 'link.csv' is no regular",
        "file 'pipe' is no regular",
        "folder 'folder' is a sub-folder,",
    ]
    for path in ("link.csv", "empty.csv", "pipe", "script.py", "train.ipynb"):
        (folder / path).unlink()
    (folder / "folder").rmdir()
    assert km.folder_problems(folder) == ["there is no file to upload"]


def test_the_command_prints_all_problems_of_all_folders_and_fails(tmp_path, monkeypatch, capsys):
    good = upload(tmp_path / "good", DATASET, "dataset")
    bad = upload(tmp_path / "bad", spoilt("dataset", {"title": "a", "id": "b"}), "dataset")
    both = upload(tmp_path / "both", KERNEL, "kernel")
    (both / "dataset-metadata.json").write_text(json.dumps(DATASET))

    def run(*folders):
        monkeypatch.setattr(sys, "argv", ["kaggle_metadata.py", *map(str, folders)])
        with pytest.raises(SystemExit) as stop:
            km.main()
        return stop.value.code, capsys.readouterr().out.splitlines()

    assert run(good) == (0, [f"{good}: fine"])
    code, lines = run(bad, good, both, tmp_path / "nowhere")
    assert code == 1 and f"{good}: fine" in lines and len(lines) == 5
    for folder in (both, tmp_path / "nowhere"):
        either = "either dataset-metadata.json or kernel-metadata.json"
        assert f"{folder}: must be a folder with {either}" in lines


# Runs the real client in a process of its own, where every request ends before it is sent. Cases
# [[command, folder]] come as JSON, answers go as JSON: null where the client would have sent the
# request, else what it raised.
CLIENT = """
import contextlib, json, socket, sys, types

def offline(*args, **kwargs):
    attempts.append(str(args))
    raise OSError("this test has no network")

attempts = []
socket.socket.connect = socket.getaddrinfo = socket.create_connection = offline
import requests
from kaggle import api

class Sent(Exception):
    pass

def send(request):
    json.dumps(type(request).to_dict(request))
    raise Sent

def free(request):
    response = requests.Response()
    response.status_code = 404
    raise requests.HTTPError("no such dataset", response=response)

datasets = types.SimpleNamespace(
    get_dataset_status=free, create_dataset=send, create_dataset_version=send,
    create_dataset_version_by_id=send)
kernels = types.SimpleNamespace(save_kernel=send)
client = types.SimpleNamespace(
    datasets=types.SimpleNamespace(dataset_api_client=datasets),
    kernels=types.SimpleNamespace(kernels_api_client=kernels))
api.build_kaggle_client = lambda *args, **kwargs: contextlib.nullcontext(client)
api._upload_blob = lambda *args, **kwargs: "token"
commands = {
    "create": lambda folder: api.dataset_create_new(folder, quiet=True),
    "version": lambda folder: api.dataset_create_version(folder, "notes", quiet=True),
    "push": api.kernels_push,
}

def answer(command, argument):
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


def ask_client(cases, folder):
    """Answers of the real client. Its own folders and a made-up key: importing it sends nothing."""
    names = ("HOME", "KAGGLE_CONFIG_DIR", "TMPDIR")
    own = {name: str(folder / name) for name in names}
    for name in names:
        os.mkdir(own[name])
    own |= {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "none", "KAGGLE_API_ENVIRONMENT": "LOCALHOST"}
    other = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE_")}
    command = [sys.executable, "-c", CLIENT]
    done = subprocess.run(command, input=json.dumps(cases), env=other | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["attempts"] == []
    return result["answers"]


POOL = [None, True, 0, 1.5, 10**30, "", " ", "x", "true", "me/x", "me/abcde", "me/a-slug/1", [], {}]
POOL += ["a/b/c/d/1", "a/b/c/d/" + "1" * 5000, "\ud800", "nul\0", "größe", "INSERT_TITLE_HERE"]
POOL += ["sub", "script.py", "notebook", "python", "https://www.kaggle.com/me/x", [None], [3], [[]]]
POOL += [["x"], [""], ["me/x"], ["me/abcde/"], [{}], {"name": "other"}, [{"name": 3}]]
POOL += ["a" * length for length in (4, 5, 6, 50, 51)]


def mutated(metadata, rng):
    """The metadata with one or two fields dropped, replaced, repeated or cut."""
    metadata = copy.deepcopy(metadata)
    for field in rng.sample(list(metadata), rng.randint(1, 2)):
        change = rng.choice(["drop", "replace", "replace", "replace", "wrap", "cut"])
        if change == "drop":
            del metadata[field]
        elif change == "replace":
            metadata[field] = rng.choice(POOL)
        elif change == "wrap":
            metadata[field] = [metadata[field]] * rng.randint(1, 2)
        else:
            metadata[field] = str(metadata[field])[: rng.randint(0, 6)]
    return metadata


@pytest.mark.skipif(
    importlib.util.find_spec("kaggle") is None,
    reason="compares with Kaggle's own client: pip install kaggle six",
)
def test_whatever_the_real_client_refuses_or_crashes_on_is_refused_here(tmp_path):
    contents = [(what, spoilt(what, {field: value})) for what, field, values, _ in REFUSED for value in values]
    contents += [(what, spoilt(what, changes)) for what, changes in ACCEPTED]
    contents += [(what, raw) for raw, _ in NOT_JSON for what in BASES]
    rng = random.Random(7)
    contents += [(what, mutated(BASES[what], rng)) for _ in range(150) for what in BASES]
    cases = []  # command, folder, our problems
    for number, (what, metadata) in enumerate(contents):
        folder = upload(tmp_path / f"{number}" / "upload", metadata, what)
        for command in ("create", "version") if what == "dataset" else ("push",):
            cases.append((command, folder, km.folder_problems(folder)))
    for number, (raw, _) in enumerate(CODE):
        folder = upload(tmp_path / f"code{number}" / "upload", KERNEL, "kernel")
        (folder / "train.ipynb").write_bytes(raw)
        cases.append(("push", folder, km.folder_problems(folder)))
    answers = ask_client([(command, str(folder)) for command, folder, _ in cases], tmp_path)
    pairs = list(zip(cases, answers, strict=True))
    missed = [
        (command, answer, next(folder.glob("*-metadata.json")).read_bytes()[:500])
        for (command, folder, problems), answer in pairs
        if answer and not problems
    ]
    assert not missed
    fine = [command for (command, _, problems), _ in pairs if not problems]
    assert {*fine} == {"create", "version", "push"} and len(fine) > 15
    assert sum(answer is not None for answer in answers) > 150  # neither side refuses everything
