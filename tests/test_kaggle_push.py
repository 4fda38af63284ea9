"""tools/kaggle_push.py with the real client against the stand-in of fake_kaggle.py, and with
answers of that client (2.2.5) as it gave them there."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import kaggle_push
import kernel_utils as ku
import pytest

from fake_kaggle import FakeKaggle

TOOL = Path(kaggle_push.__file__)
BUNDLE, TRAIN, INFER = "me/my-bundle", "me/my-train", "me/my-infer"
real_client = pytest.mark.skipif(  # importing kaggle would sign in to Kaggle: look for its command
    not shutil.which("kaggle", path=os.path.dirname(sys.executable)),
    reason="the kaggle client is not installed beside this Python: pip install kaggle six",
)


@pytest.fixture
def kaggle():
    with FakeKaggle() as server:
        yield server


@pytest.fixture
def bundle(tmp_path):
    """A dataset folder; two names hold words by which the client tells of failures."""
    folder = tmp_path / "my bundle"
    folder.mkdir()
    metadata = {"id": BUNDLE, "title": "My bundle", "licenses": [{"name": "CC0-1.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata))
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 800)
    (folder / "error-analysis.csv").write_text("row\n")
    (folder / "Upload-unsuccessful.json").write_text("{}\n")
    return folder


@pytest.fixture
def notebook(tmp_path):
    def make(ref, **settings):
        slug = ref.partition("/")[2]
        folder = tmp_path / slug
        folder.mkdir()
        metadata = {"id": ref, "title": slug.replace("-", " "), "code_file": "code.ipynb"}
        metadata |= {"language": "python", "kernel_type": "notebook", "enable_internet": False}
        cell = {"cell_type": "code", "source": [f"print('{ref}')"], "metadata": {}, "outputs": []}
        cells = {"cells": [cell | {"execution_count": 1}], "metadata": {}, "nbformat": 4}
        (folder / "kernel-metadata.json").write_text(json.dumps(metadata | settings))
        (folder / "code.ipynb").write_text(json.dumps(cells))
        return folder

    return make


def contents(folder):
    files = [path for path in folder.iterdir() if path.name != "dataset-metadata.json"]
    return {path.name: path.read_bytes() for path in files}


# ---- the real client


def push(kaggle, *folders, wait=1):
    """Run the tool, and hold what it reports against what the server has."""
    home = folders[0].parent / "home"
    home.mkdir(exist_ok=True)
    command = [sys.executable, str(TOOL), *map(str, folders), "-m", "a note", "--wait", str(wait)]
    done = subprocess.run(command, env=kaggle.client_env(home), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert kaggle.count("FOREIGN") == 0
    assert not list(home.iterdir()), "no state of an upload is left for a later run"
    report = re.compile(r"(\S+) version (\d+): (\d+ files, .* MB, all there|pushed)")
    reports = [report.match(line) for line in done.stdout.splitlines()]
    assert all(reports) and (done.returncode == 0) == (len(reports) == len(folders)), done
    folder_of = {ref: folder for _, ref, folder in kaggle_push.plan(folders)}
    for ref, version, what in (match.groups() for match in reports):
        if what == "pushed":
            assert len(kaggle.kernels[ref]) == int(version)
            assert ref in kaggle.kernels[ref][-1]["text"]
        else:
            assert kaggle.datasets[ref][int(version) - 1] == contents(folder_of[ref])
    return done


@real_client
def test_a_dataset_is_created_then_versioned_and_notebooks_that_attach_it_follow(kaggle, bundle, notebook):
    kaggle.page_size = 2  # three files: the listing has two pages
    train = notebook(TRAIN, dataset_sources=[BUNDLE])
    infer = notebook(INFER, dataset_sources=[BUNDLE], kernel_sources=[TRAIN])
    done = push(kaggle, train, infer, bundle)  # the stand-in drops sources that do not exist yet
    assert done.stdout.splitlines() == [
        f"{BUNDLE} version 1: 3 files, 0.2 MB, all there",
        f"{TRAIN} version 1: pushed, queued",
        f"{INFER} version 1: pushed, queued",
    ]
    (bundle / "new.txt").write_text("new")
    assert push(kaggle, bundle).stdout == f"{BUNDLE} version 2: 4 files, 0.2 MB, all there\n"
    assert kaggle.count("CreateDataset") == kaggle.count("CreateDatasetVersion") == 1


@real_client
@pytest.mark.slow
def test_a_dataset_is_found_whole_although_connections_broke_and_the_answer_got_lost(kaggle, bundle):
    kaggle.dataset_status = ["BLOBS_RECEIVED", "READY"]
    kaggle.fail("PUT", "reset", name="weights")
    kaggle.fail("PUT", 503, name="analysis")  # takes half of the file
    kaggle.fail("CreateDataset", "lost")  # the client asks again, and is told the name is taken
    kaggle.fail("ListDatasetFiles", "reset")
    done = push(kaggle, bundle, wait=10)
    remark = "all there, whatever the client said"
    assert done.stdout == f"{BUNDLE} version 1: 3 files, 0.2 MB, {remark}\n"
    assert "Dataset creation error" in done.stderr
    assert kaggle.count("ListDatasetFiles") > 1


@real_client
def test_files_that_did_not_arrive_whole_are_named(kaggle, bundle):
    kaggle.fail("PUT", "ignored", name="analysis")  # as client 2.2.4 does, with exit code 0
    kaggle.fail("PUT", "cut", name="weights")
    done = push(kaggle, bundle)
    missing = "missing: error-analysis.csv"
    size = "of another size: weights.bin (204799 bytes instead of 204800)"
    assert f"version 1 is not what the folder holds; {missing}; {size}" in done.stderr


@real_client
def test_a_notebook_that_lost_an_input_is_an_error_that_names_it(kaggle, notebook):
    sources = {"dataset_sources": ["me/error-gone"], "competition_sources": ["no-such-one"]}
    done = push(kaggle, notebook(INFER, **sources))
    lost = "dataset sources ['me/error-gone']; competition sources ['no-such-one']"
    assert f"{INFER} version 1 was pushed without its {lost}" in done.stderr


# ---- answers of the client

URL = "https://www.kaggle.com/datasets/somewhere/error"
UPLOADED = """Starting upload for file weights.bin

  0%|          | 0.00/200k [00:00<?, ?B/s]\r100%|##########| 200k/200k [00:00<00:00, 157kB/s]
Upload successful: weights.bin (200KB)
"""
CREATED = f"{UPLOADED}Your private Dataset is being created. Please check progress at {URL}\n"
VERSIONED = f"{UPLOADED}Dataset version is being created. Please check progress at {URL}\n"
REFUSED = "Dataset creation error: The requested slug is already in use by a dataset.\n"
RETRIED = """Request failed: HTTPConnectionPool(host='127.0.0.1', port=44555): Max retries exceeded
with url: http://localhost/api/v1/datasets.DatasetApiService/CreateDataset. Will retry in 0.8 s
"""
FORBIDDEN = """403 Client Error: Forbidden for url: http://localhost/api/v1/GetDatasetStatus

You don't have access to this resource.
"""
SERVER = """500 Server Error: Internal Server Error for url: http://localhost/api/v1/Method

This is a problem on Kaggle's side, not with your command. Please try again later.
"""
PUSHED = "Kernel version 4 successfully pushed.  Please check progress at https://www.kaggle.com/x\n"


def state(version, status="ready"):
    return 0, json.dumps({"status": status, "current_version_number": version})


def listing(folder):
    rows = [f"{name},{len(data)},2026-01-01" for name, data in contents(folder).items()]
    return 0, "\n".join(["name,size,creationDate", *rows]) + "\n"


@pytest.fixture
def answers(monkeypatch):
    """Function: (sub-command, (exit code, output)) in the order in which the client is run. The
    last answer to a question is given again if it is asked again."""
    script, clock, given = [], [0.0], {}

    def client(_, command, *arguments, **options):
        if script and script[0][0] == command:
            given[command] = script.pop(0)[1]
        return given[command] if command in ("status", "files") else given.pop(command)

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(kaggle_push, "client", client)
    monkeypatch.setattr(kaggle_push, "find_client", lambda: "kaggle")
    monkeypatch.setattr(kaggle_push.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(kaggle_push.time, "sleep", sleep)
    return lambda *steps: script.extend(steps)


def refusal(*folders):
    with pytest.raises(kaggle_push.PushError) as error:
        kaggle_push.push(folders, "a note", 60)
    return str(error.value)


ALL_THERE = f"{BUNDLE} version 5: 3 files, 0.2 MB, all there"


def test_a_version_that_takes_its_time_and_questions_that_fail_end_well(bundle, answers, capsys):
    processing = ("status", state(5, "blobs_received"))
    before, broken = ("status", state(4)), ("status", (1, SERVER))
    listed = ("files", listing(bundle))
    answers(before, ("version", (0, VERSIONED)), before, broken, processing)
    answers(("status", state(5)), ("files", (1, SERVER)), listed)
    kaggle_push.push([bundle], "a note", 60)
    assert capsys.readouterr().out == ALL_THERE + "\n"


def test_a_keyword_that_kaggle_does_not_know_is_no_failure(bundle, answers, capsys):
    said = "The following are not valid tags and could not be added to the dataset: ['error']\n"
    answers(("status", state(4)), ("version", (0, said)), ("status", state(5)))
    answers(("files", listing(bundle)))
    kaggle_push.push([bundle], "a note", 60)
    assert capsys.readouterr().out == ALL_THERE + "\n"


def test_a_version_that_was_made_although_the_client_failed_is_verified(bundle, answers, capsys):
    ready_in_none = ("status", state(0))  # not to be taken for the new version
    answers(("status", state(None, "failed")), ("version", (1, SERVER)))
    answers(ready_in_none, ready_in_none, ("status", state(5)), ("files", listing(bundle)))
    kaggle_push.push([bundle], "a note", 60)
    assert capsys.readouterr().out == f"{ALL_THERE}, whatever the client said\n"


def test_an_old_dataset_with_the_same_names_and_sizes_is_not_taken_for_the_upload(bundle, answers):
    answers(("status", (1, FORBIDDEN)), ("create", (0, UPLOADED + REFUSED)))  # it did not show yet
    said = refusal(bundle)
    assert f"{BUNDLE} was refused" in said and "already in use" in said


def test_a_refusal_that_answers_a_repeated_call_leaves_the_verdict_to_the_files(bundle, answers, capsys):
    answers(("status", (1, FORBIDDEN)), ("create", (0, UPLOADED + RETRIED + REFUSED)))
    answers(("status", state(5)), ("files", listing(bundle)))
    kaggle_push.push([bundle], "a note", 60)
    assert capsys.readouterr().out == f"{ALL_THERE}, whatever the client said\n"


def test_a_file_that_the_client_says_it_lost_fails_even_where_kaggle_lists_one_like_it(bundle, answers):
    said = "Upload unsuccessful: weights.bin\n" + VERSIONED
    answers(("status", state(4)), ("version", (0, said)), ("status", state(5)))
    answers(("files", listing(bundle)))
    message = r"5 cannot be right\n.*\n  \| Upload unsuccessful: weights"
    assert re.search(message, refusal(bundle))


NEVER = [  # answers after the upload of version 5 | the message
    ([("status", state(4))], "nothing new came: me/my-bundle is ready at version 4, as before"),
    ([("status", state(5, "blobs_received"))], "is blobs_received at version 5: no new version is"),
    ([("status", state(5, "failed"))], "Kaggle could not process me/my-bundle version 5: failed"),
    ([("status", (1, SERVER))], "cannot tell whether me/my-bundle exists\nThe client said:\n  | 500"),
    ([("status", state(5)), ("files", (1, SERVER))], "cannot list the files of me/my-bundle version"),
    ([("status", state(5)), ("files", (0, "name,size,creationDate\n"))], "cannot list the files"),
]


@pytest.mark.parametrize("said", [(0, VERSIONED), (1, SERVER)])
@pytest.mark.parametrize(("after", "message"), NEVER)
def test_what_is_not_seen_on_kaggle_in_time_is_an_error(after, message, said, bundle, answers):
    answers(("status", state(4)), ("version", said), *after)
    assert message in refusal(bundle)


BEFORE = [
    ((1, SERVER), "cannot tell whether me/my-bundle exists\nThe client said:\n  | 500 Server Error"),
    ((0, "no JSON"), "cannot tell whether me/my-bundle exists"),
    (state(4, "reprocessing"), "is reprocessing at version 4: push again when Kaggle is done with"),
]


@pytest.mark.parametrize(("answer", "message"), BEFORE)
def test_nothing_is_uploaded_where_the_state_of_the_dataset_is_not_known(answer, message, bundle, notebook, answers):
    answers(("status", answer))  # an upload would be another sub-command
    assert message in refusal(notebook(TRAIN), bundle)


def test_a_listing_that_is_an_error_text_or_never_ends_is_no_listing(answers, bundle):
    for page in ("No such version\n", "Next Page Token = 2\nname,size,creationDate\na,1,2026-01-01\n"):
        answers(("files", (0, page)))
        with pytest.raises(kaggle_push.PushError, match="cannot list the files of me/my-bundle"):
            kaggle_push.listed_files(BUNDLE, 5)


def test_every_file_that_differs_is_named():
    kaggle_push.compare(BUNDLE, 1, {"a": 1}, {"a": 1})
    message = r"missing: a; missing: b; of another size: c \(2 bytes instead of 1\); extra: d$"
    with pytest.raises(kaggle_push.PushError, match=message):
        here = {"a": 1, "b": 1, "c": 1, "e": 1}
        kaggle_push.compare(BUNDLE, 1, here, {"c": 2, "d": 1, "e": 1})


STATUS = 'me/my-infer has status "KernelWorkerStatus.{}"\n'
KERNELS = [
    ([("push", (1, SERVER))], f"{INFER} was not pushed, or the answer got lost: see kaggle kernels"),
    ([("push", (0, "Kernel push error: not allowed"))], "or the answer got lost.*push error: not"),
    ([("push", (0, PUSHED)), ("status", (1, SERVER))], "version 4 was pushed, but cannot be seen"),
    (
        [("push", (0, PUSHED)), ("status", (0, STATUS.format("ERROR") + "Failure: a cell failed"))],
        "version 4 was pushed, but its run failed.*a cell failed",
    ),
]


@pytest.mark.parametrize(("steps", "message"), KERNELS)
def test_a_push_of_a_notebook_that_is_not_confirmed_is_an_error(steps, message, notebook, answers):
    answers(*steps)
    assert re.search(message, refusal(notebook(INFER)), re.S)


def test_notebooks_are_not_pushed_after_a_dataset_that_failed(bundle, notebook, answers):
    answers(("status", (1, FORBIDDEN)), ("create", (0, REFUSED)))  # a push would have no answer
    assert f"{BUNDLE} was refused" in refusal(notebook(TRAIN), bundle)


# ---- before anything is uploaded


def test_what_kaggle_would_refuse_or_lose_is_named_before_the_client_runs(bundle, notebook, monkeypatch):
    monkeypatch.setattr(kaggle_push, "client", None)
    train = notebook(TRAIN)
    (train / "dataset-metadata.json").write_text('{"id": "me/other-one"}')
    either = "must be a folder with either dataset-metadata.json or kernel-metadata.json"
    assert either in refusal(bundle, train) and either in refusal(bundle.parent)
    (bundle / "models").mkdir()
    (bundle / "a&b.txt").write_text("x")
    said = refusal(bundle)
    assert "folder 'models' is a sub-folder" in said and "'a&b.txt' must have a name" in said
    infer = notebook(INFER, title="Another one", enable_internet="false")
    said = refusal(infer)
    assert "enable_internet must be true or false" in said and "title must become the slug" in said


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def swap_bytes(path):
    path.write_bytes(path.read_bytes()[::-1])


DAMAGE = {
    "a changed file": lambda folder: swap_bytes(folder / "weights.bin"),
    "a removed file": lambda folder: (folder / "weights.bin").unlink(),
    "a file too many": lambda folder: (folder / "notes.txt").write_text("x"),
    "a removed module": lambda folder: (folder / "kernel_utils.py").unlink(),
    "a cut manifest": lambda folder: cut(folder / "manifest.json"),
    "a manifest of something else": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_bundle_that_was_damaged_since_it_was_packed_is_never_uploaded(how, bundle, answers):
    (bundle / "kernel_utils.py").write_text("pass")
    files = {
        name: {"bytes": len(data), "sha256": ku._file_sha256(bundle / name)} for name, data in contents(bundle).items()
    }
    manifest = {"format": "kernel_utils bundle 1", "version": "1", "runs": {}, "files": files}
    manifest |= {"dataset": {"id": BUNDLE}}
    (bundle / "manifest.json").write_bytes(ku._seal_manifest(manifest))
    kaggle_push.check(bundle)
    DAMAGE[how](bundle)
    said = refusal(bundle)  # `answers` are empty: a run of the client would be a KeyError
    expected = {"a removed module": "kernel_utils.py", "a file too many": "notes.txt: not in"}
    default = "manifest.json" if "manifest" in how else "weights.bin"
    assert expected.get(how, default) in said


def test_a_manifest_of_something_else_is_no_bundle(bundle):
    (bundle / "manifest.json").write_text('{"name": "a web page"}')
    kaggle_push.check(bundle)


# ---- the client's process


@pytest.fixture
def stub_client(tmp_path, monkeypatch):
    """Replaces the client by a script."""

    def make(script):
        path = tmp_path / "kaggle"
        path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(kaggle_push, "find_client", lambda: str(path))

    return make


def test_each_run_of_the_client_has_a_temporary_folder_of_its_own_and_else_our_environment(stub_client, monkeypatch):
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "/somewhere")
    keep = "open(os.path.join(os.environ['TMPDIR'], 'state'), 'x')"
    stub_client(f"{keep}; print(json.dumps(dict(os.environ)))")
    runs = [json.loads(kaggle_push.client("x", upload=upload)[1]) for upload in (False, True)]
    folders = {run["TMPDIR"] for run in runs}
    assert len(folders) == 2 and not any(map(os.path.exists, folders))
    ours = os.environ.keys() - {"TMPDIR", "PYTHONUNBUFFERED"}
    assert all(run.get(key) == os.environ[key] for run in runs for key in ours)


def test_an_upload_is_shown_as_it_goes_with_its_progress_in_place(stub_client, capsys):
    stub_client(r"print('10%\r20%', 'ü'); sys.exit(3)")
    assert kaggle_push.client("x", upload=True) == (3, "10%\r20% ü\n")
    assert capsys.readouterr().err == "10%\r20% ü\n"


def test_a_client_that_hangs_at_a_question_is_stopped(stub_client, monkeypatch):
    monkeypatch.setattr(kaggle_push, "ANSWER", 0.5)
    stub_client("print('one moment', flush=True); time.sleep(20)")
    message = r"(?s)cannot tell whether .*one moment.*no answer within 0.5 s"
    with pytest.raises(kaggle_push.PushError, match=message):
        kaggle_push.dataset_state(BUNDLE)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit('kaggle: error: unrecognized arguments: --format json')", "2.2.4 is needed: pip"),
        ("import no_such_six", "it needs: pip install kaggle six"),
        ("sys.exit('Authentication required to call the Kaggle API.')", "run `kaggle auth login`"),
    ],
)
def test_a_client_that_cannot_work_is_an_error_with_the_remedy(script, message, stub_client, bundle):
    stub_client(script)
    assert message in refusal(bundle)


def test_without_a_client_the_command_that_installs_it_is_shown(bundle, monkeypatch):
    monkeypatch.setattr(kaggle_push.shutil, "which", lambda *arguments, **options: None)
    assert "pip install kaggle six" in refusal(bundle)


def test_the_commands_by_hand_begin_with_the_datasets(bundle, notebook):
    assert kaggle_push.commands([notebook(TRAIN), bundle]) == [
        f"kaggle datasets create -p '{bundle}'  # the first time",
        f"kaggle datasets version -p '{bundle}' -m 'what is new'  # every other time",
        "kaggle datasets status me/my-bundle --format json",
        "kaggle datasets files me/my-bundle -v --page-size 200",
        f"kaggle kernels push -p {bundle.parent / 'my-train'}",
        "kaggle kernels status me/my-train",
    ]
