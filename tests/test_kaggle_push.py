"""tools/kaggle_push.py with the real client against the stand-in of fake_kaggle.py, and its parts alone."""

import hashlib
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
real_client = pytest.mark.skipif(  # importing kaggle would sign in to Kaggle, so look for its command instead
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
        folder = tmp_path / ref.partition("/")[2]
        folder.mkdir()
        metadata = {"id": ref, "title": ref.partition("/")[2].replace("-", " "), "code_file": "code.ipynb"}
        metadata |= {"language": "python", "kernel_type": "notebook", "enable_internet": False, **settings}
        cell = {"cell_type": "code", "source": [f"print('{ref}')"], "metadata": {}, "outputs": [], "execution_count": 1}
        (folder / "kernel-metadata.json").write_text(json.dumps(metadata))
        (folder / "code.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4}))
        return folder

    return make


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "dataset-metadata.json"}


def push(kaggle, *folders, wait=1, without=()):
    """Run the tool, and hold what it reports against what the server has."""
    home = folders[0].parent / "home"
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in kaggle.client_env(home).items() if key not in without}
    command = [sys.executable, str(TOOL), *map(str, folders), "-m", "a note", "--wait", str(wait)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert kaggle.count("FOREIGN") == 0
    assert not list(home.iterdir()), "no state of an upload is left for a later run"
    report = re.compile(r"(\S+) version (\d+): (\d+ files, .* MB, all there|pushed)")
    reports = [report.match(line) for line in done.stdout.splitlines()]
    assert all(reports) and (done.returncode == 0) == (len(reports) == len(folders)), done
    folder_of = {ref: folder for _, ref, folder in kaggle_push.plan(folders)}
    for ref, version, what in (found.groups() for found in reports):
        if what == "pushed":
            assert len(kaggle.kernels[ref]) == int(version) and ref in kaggle.kernels[ref][-1]["text"]
        else:
            assert kaggle.datasets[ref][int(version) - 1] == contents(folder_of[ref])
    return done


def old_version(kaggle, bundle):
    kaggle.datasets[BUNDLE] = [contents(bundle)]


# ---- what goes well


@real_client
def test_a_dataset_is_created_then_versioned_and_notebooks_that_attach_it_are_pushed_after_it(kaggle, bundle, notebook):
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
def test_hiccups_that_the_client_or_the_checks_repeat_end_well(kaggle, bundle):
    kaggle.absent = 404
    kaggle.dataset_status = ["BLOBS_RECEIVED", "READY"]
    for operation in ("StartBlobUpload", "PUT", "CreateDataset", "ListDatasetFiles"):
        kaggle.fail(operation, 429)
    kaggle.fail("GetDatasetStatus", 403, skip=2)  # after the one before the upload and the client's own: not shown yet
    assert push(kaggle, bundle, wait=10).returncode == 0
    assert kaggle.count("GetDatasetStatus") == 5 and kaggle.count("ListDatasetFiles") == 2


@real_client
@pytest.mark.slow
def test_broken_connections_and_a_half_taken_file_end_well(kaggle, bundle):
    old_version(kaggle, bundle)
    for operation in ("StartBlobUpload", "CreateDatasetVersion", "ListDatasetFiles"):
        kaggle.fail(operation, "reset")
    kaggle.fail("PUT", "reset", name="weights")
    kaggle.fail("PUT", 503, name="analysis")
    assert push(kaggle, bundle, wait=10).returncode == 0
    assert kaggle.count("PUT") == 5 and kaggle.count("QUERY") == 1


@real_client
@pytest.mark.slow
def test_a_dataset_that_was_made_although_the_answer_got_lost_is_found(kaggle, bundle):
    kaggle.fail("CreateDataset", "lost")  # the client repeats the call and is told that the name is taken
    done = push(kaggle, bundle)
    assert done.stdout == f"{BUNDLE} version 1: 3 files, 0.2 MB, all there, whatever the client said\n"
    assert "Dataset creation error" in done.stderr


@real_client
@pytest.mark.slow
def test_a_version_whose_answer_got_lost_is_made_twice_and_the_later_one_verified(kaggle, bundle):
    old_version(kaggle, bundle)
    kaggle.fail("CreateDatasetVersion", "lost")
    assert push(kaggle, bundle).stdout.startswith(f"{BUNDLE} version 3: 3 files")
    assert kaggle.datasets[BUNDLE] == [contents(bundle)] * 3


@real_client
@pytest.mark.slow
def test_the_stand_in_passes_nothing_on(kaggle, bundle, tmp_path):
    environment = {**kaggle.client_env(tmp_path), "KAGGLE_API_ENVIRONMENT": "PROD"}
    done = subprocess.run([sys.executable, str(TOOL), str(bundle)], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert [call["operation"] for call in kaggle.calls] == ["FOREIGN"] and "api.kaggle.com" in kaggle.calls[0]["name"]


# ---- before anything is uploaded


@real_client
@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "kind", "without", "message"),
    [
        ("GetDatasetStatus", 429, (), f"cannot tell whether {BUNDLE} exists.*429 Client Error"),
        ("GetDatasetStatus", 500, (), f"cannot tell whether {BUNDLE} exists.*500 Server Error"),
        ("GetDatasetStatus", "reset", (), f"cannot tell whether {BUNDLE} exists.*Connection reset"),
        ("GetDataset", 500, (), f"cannot tell whether {BUNDLE} exists.*500 Server Error"),
        ("GetDatasetStatus", 401, (), "Kaggle does not know you: run `kaggle auth login`"),
        ("none", 500, ("KAGGLE_USERNAME", "KAGGLE_KEY"), "Kaggle does not know you: run `kaggle auth login`"),
    ],
)
def test_nothing_is_uploaded_if_nobody_can_tell_whether_the_dataset_exists(
    operation, kind, without, message, kaggle, bundle
):
    old_version(kaggle, bundle)
    kaggle.fail(operation, kind)
    done = push(kaggle, bundle, without=without)
    assert done.returncode == 1 and re.search(message, done.stderr, re.S)
    assert kaggle.count("StartBlobUpload") == 0


@real_client
@pytest.mark.slow
def test_an_old_dataset_with_the_same_names_and_sizes_is_not_taken_for_the_upload(kaggle, bundle):
    old_version(kaggle, bundle)
    kaggle.datasets[BUNDLE][0]["weights.bin"] = bytes(256 * 800)
    kaggle.fail("GetDatasetStatus", 403)  # it does not show at first, so the client is asked to create it
    done = push(kaggle, bundle)
    assert done.returncode == 1 and f"{BUNDLE} was refused" in done.stderr and "already in use" in done.stderr


def test_folders_that_cannot_be_pushed_are_named_before_the_client_runs(bundle, notebook, monkeypatch):
    def refused(*folders):
        with pytest.raises(kaggle_push.PushError) as error:
            kaggle_push.push(folders, "a note", 1)
        return str(error.value)

    monkeypatch.setattr(kaggle_push, "client", None)
    train = notebook(TRAIN)
    (train / "dataset-metadata.json").write_text('{"id": "me/other-one"}')
    assert "must hold either dataset-metadata.json or kernel-metadata.json" in refused(bundle, train)
    assert "must hold either" in refused(bundle, bundle.parent)
    (bundle / "models").mkdir()
    assert "leaves out: models" in refused(bundle)
    (bundle / "models").rmdir()
    for text in ('\ufeff{"id": "me/my-bundle"}', "[]", "{}", ""):
        (bundle / "dataset-metadata.json").write_text(text)
        assert "has no id that can be read" in refused(bundle)
    for ref in ("my-bundle", "me/my-bundle/3", "me/my bundle", 7):
        (bundle / "dataset-metadata.json").write_text(json.dumps({"id": ref}))
        assert f"id must be owner/slug, got {ref!r}" in refused(bundle)
    for path in bundle.iterdir():
        path.unlink()
    (bundle / "dataset-metadata.json").write_text('{"id": "me/my-bundle"}')
    assert "has no file to upload" in refused(bundle)


def test_what_kaggle_would_refuse_or_lose_and_what_was_damaged_is_refused_before_the_client_runs(
    bundle, notebook, monkeypatch
):
    monkeypatch.setattr(kaggle_push, "client", None)
    (bundle / "kernel_utils.py").write_text("pass")
    files = {name: {"sha256": hashlib.sha256(data).hexdigest()} for name, data in contents(bundle).items()}
    (bundle / "manifest.json").write_bytes(
        ku._dump_manifest(ku._with_checksum({"format": "kernel_utils bundle 1", "files": files}))
    )
    kaggle_push.check(bundle)
    manifest = (bundle / "manifest.json").read_text()
    for broken in (manifest.replace("bundle 1", "bundle 2"), manifest[:-9], "[]"):
        (bundle / "manifest.json").write_text(broken)
        assert kaggle_push.damage(bundle)[0].startswith("manifest.json is not what was packed")
    (bundle / "manifest.json").write_text(manifest)
    (bundle / "weights.bin").write_bytes(bytes(range(255, -1, -1)) * 800)
    (bundle / "a&b.txt").write_text("x")
    infer = notebook(INFER, title="Another one")
    metadata = json.loads((infer / "kernel-metadata.json").read_text())
    del metadata["enable_internet"]
    (infer / "kernel-metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(kaggle_push.PushError) as error:
        kaggle_push.push([bundle], "a note", 1)
    for name in ("weights.bin", "a&b.txt"):
        assert f"{name} is not what was packed" in str(error.value)
    with pytest.raises(kaggle_push.PushError) as error:
        kaggle_push.push([infer], "a note", 1)
    assert "enable_internet is missing" in str(error.value) and "title must become the slug" in str(error.value)


# ---- datasets that are not what they should be


@real_client
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("ignored", "missing: weights.bin", id="lost"),  # as client 2.2.4 does, with exit code 0
        pytest.param("cut", r"of another size: weights.bin \(204799 bytes instead of 204800\)", id="cut"),
    ],
)
def test_a_file_that_did_not_arrive_whole_is_named(kind, message, kaggle, bundle):
    kaggle.fail("PUT", kind, name="weights")
    done = push(kaggle, bundle)
    assert done.returncode == 1 and re.search(f"version 1 is not what the folder holds; {message}", done.stderr)


@real_client
@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 500])
def test_a_file_that_the_storage_does_not_take_is_named(status, kaggle, bundle):
    old_version(kaggle, bundle)
    kaggle.fail("PUT", status, name="weights")
    done = push(kaggle, bundle)
    assert done.returncode == 1 and "  | Upload unsuccessful: weights.bin" in done.stderr


@real_client
@pytest.mark.slow
def test_an_upload_that_expires_is_begun_again_or_fails(kaggle, bundle):
    kaggle.fail("PUT", 503, name="weights")
    kaggle.fail("QUERY", 404)
    done = push(kaggle, bundle)
    assert kaggle.count("QUERY") == 1
    assert done.returncode == 0 or "missing: weights.bin" in done.stderr  # client 2.2.5, and 2.2.4


@real_client
@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "versions", "fault", "message"),
    [
        ("StartBlobUpload", 0, {}, "does not exist, as before the upload.*StartBlobUpload"),
        ("CreateDataset", 0, {}, "does not exist, as before the upload.*500 Server Error.*CreateDataset"),
        ("CreateDatasetVersion", 1, {}, "is ready at version 1, as before the upload.*500 Server Error"),
        ("GetDatasetStatus", 0, {"skip": 2, "times": 0}, "cannot tell whether me/my-bundle exists.*500 Server Error"),
        ("ListDatasetFiles", 0, {"times": 0}, "cannot list the files of me/my-bundle version 1.*500 Server Error"),
    ],
)
def test_a_server_error_is_not_taken_for_an_upload(operation, versions, fault, message, kaggle, bundle):
    if versions:
        old_version(kaggle, bundle)
    kaggle.fail(operation, 500, **fault)
    done = push(kaggle, bundle)
    assert done.returncode == 1 and re.search(message, done.stderr, re.S)


@real_client
@pytest.mark.slow
@pytest.mark.parametrize("operation", ["CreateDataset", "CreateDatasetVersion"])
def test_what_kaggle_refuses_is_an_error_with_its_words(operation, kaggle, bundle):
    if operation == "CreateDatasetVersion":
        old_version(kaggle, bundle)
    kaggle.fail(operation, "refused")
    done = push(kaggle, bundle)
    assert done.returncode == 1 and f"{BUNDLE} was refused" in done.stderr
    assert "creation error: not allowed by the stand-in" in done.stderr.rpartition("was refused")[2]


@real_client
@pytest.mark.slow
@pytest.mark.parametrize(
    ("statuses", "ignored", "message"),
    [
        (["READY"], True, "is ready at version 1, as before the upload"),
        (["READY", "BLOBS_RECEIVED"], False, "is blobs_received at version 2: no new version is ready"),
        (["READY", "FAILED"], False, "Kaggle could not process me/my-bundle version 2: failed"),
        (["REPROCESSING"], False, "is reprocessing at version 1: push again when Kaggle is done with that"),
    ],
)
def test_a_version_that_never_becomes_ready_is_an_error(statuses, ignored, message, kaggle, bundle):
    old_version(kaggle, bundle)
    kaggle.dataset_status = statuses
    if ignored:
        kaggle.fail("CreateDatasetVersion", "ignored")
    done = push(kaggle, bundle)
    assert done.returncode == 1 and message in done.stderr


# ---- notebooks


@real_client
def test_a_notebook_that_lost_an_input_is_an_error_that_names_it(kaggle, notebook):
    done = push(kaggle, notebook(INFER, dataset_sources=["me/error-gone"], competition_sources=["no-such-one"]))
    message = "was pushed without its dataset sources ['me/error-gone']; competition sources ['no-such-one']"
    assert done.returncode == 1 and f"{INFER} version 1 {message}" in done.stderr


@real_client
@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "kind", "message"),
    [
        ("SaveKernel", 429, "was not pushed, or the answer got lost.*429 Client Error"),
        ("SaveKernel", 500, "was not pushed, or the answer got lost.*500 Server Error"),
        ("SaveKernel", "lost", "was not pushed, or the answer got lost: see kaggle kernels status me/my-infer"),
        ("SaveKernel", "refused", "was not pushed, or the answer got lost.*Kernel push error: not allowed"),
        ("GetKernelSessionStatus", 500, "version 1 was pushed, but cannot be seen.*500 Server Error"),
        ("status", "ERROR", "version 1 was pushed, but its run failed.*a cell failed"),
    ],
)
def test_a_push_of_a_notebook_that_is_not_confirmed_is_an_error(operation, kind, message, kaggle, notebook):
    if operation == "status":
        kaggle.kernel_status = [kind]
    else:
        kaggle.fail(operation, kind)
    done = push(kaggle, notebook(INFER))
    assert done.returncode == 1 and re.search(f"^{INFER} {message}", done.stderr, re.S | re.M)


@real_client
@pytest.mark.slow
def test_notebooks_are_not_pushed_after_a_dataset_that_failed(kaggle, bundle, notebook):
    kaggle.fail("CreateDataset", "refused")
    assert push(kaggle, notebook(TRAIN), bundle).returncode == 1
    assert not kaggle.kernels


# ---- parts


@pytest.fixture
def stub_client(tmp_path, monkeypatch):
    """Replaces the client by a script."""

    def make(script):
        path = tmp_path / "kaggle"
        path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(kaggle_push, "find_client", lambda: str(path))

    return make


def answers(monkeypatch, **outputs):
    """Replaces the client by these outputs, with code 0, for its sub-commands; a list is used up one by one."""

    def client(_, command, *arguments, **options):
        output = outputs[command]
        return 0, output.pop(0) if isinstance(output, list) else output

    monkeypatch.setattr(kaggle_push, "client", client)
    monkeypatch.setattr(kaggle_push, "find_client", lambda: "kaggle")


STATES = ['{"status": "ready", "current_version_number": 4}', '{"status": "ready", "current_version_number": 5}']
CREATED = "Dataset version is being created. Please check progress at https://www.kaggle.com/x/error\n"


def listing(folder):
    rows = [f'"{name}",{len(data)},2026-01-01' for name, data in contents(folder).items()]
    return "\n".join(["name,size,creationDate", *rows])


def test_a_file_that_the_client_says_it_lost_fails_even_where_kaggle_lists_one_like_it(bundle, monkeypatch):
    said = "Upload unsuccessful: weights.bin\n" + CREATED
    answers(monkeypatch, status=[STATES[0], *STATES[1:] * 2], version=said, files=listing(bundle))
    with pytest.raises(kaggle_push.PushError, match=r"5 cannot be right\n.*\n  \| Upload unsuccessful: weights"):
        kaggle_push.push([bundle], "a note", 1)


def test_a_keyword_that_kaggle_does_not_know_is_no_failure(bundle, monkeypatch, capsys):
    said = "The following are not valid tags and could not be added to the dataset: ['error']\n"
    answers(monkeypatch, status=list(STATES), version=said, files=listing(bundle))
    kaggle_push.push([bundle], "a note", 1)
    assert capsys.readouterr().out == f"{BUNDLE} version 5: 3 files, 0.2 MB, all there\n"


def test_a_dataset_that_is_ready_in_its_old_version_or_in_none_is_asked_for_again(bundle, monkeypatch, capsys):
    states = [
        '{"status": "failed", "current_version_number": null}',
        '{"status": "ready", "current_version_number": 0}',
    ]
    monkeypatch.setattr(kaggle_push.time, "sleep", lambda seconds: None)
    answers(monkeypatch, status=[*states, STATES[1]], version=CREATED, files=listing(bundle))
    kaggle_push.push([bundle], "a note", 5)
    assert capsys.readouterr().out == f"{BUNDLE} version 5: 3 files, 0.2 MB, all there\n"


def test_a_listing_that_is_an_error_text_or_never_ends_is_no_listing(monkeypatch):
    for page in ("No such version\n", "Next Page Token = 2\nname,size,creationDate\na,1,2026-01-01\n"):
        answers(monkeypatch, files=page)
        with pytest.raises(kaggle_push.PushError, match="cannot list the files of me/my-bundle version 5"):
            kaggle_push.listed_files(BUNDLE, 5)


def test_every_file_that_differs_is_named():
    kaggle_push.compare(BUNDLE, 1, {"a": 1}, {"a": 1})
    message = r"missing: a, b; extra: d; of another size: c \(2 bytes instead of 1\)$"
    with pytest.raises(kaggle_push.PushError, match=message):
        kaggle_push.compare(BUNDLE, 1, {"a": 1, "b": 1, "c": 1, "e": 1}, {"c": 2, "d": 1, "e": 1})


def test_questions_are_repeated_ever_more_slowly_until_the_time_is_up(monkeypatch):
    clock, pauses = [0.0], []

    def question():
        raise kaggle_push.PushError("not yet")

    def sleep(seconds):
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(kaggle_push.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(kaggle_push.time, "sleep", sleep)
    with pytest.raises(kaggle_push.PushError, match="not yet"):
        kaggle_push.until_answered(600, question)
    assert pauses[:3] == [1, 1.5, 2.25] and max(pauses) == 30 and 570 < sum(pauses) <= 600


def test_each_run_of_the_client_has_a_temporary_folder_of_its_own_and_else_our_environment(stub_client, monkeypatch):
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "/somewhere")
    stub_client("open(os.path.join(os.environ['TMPDIR'], 'state'), 'x'); print(json.dumps(dict(os.environ)))")
    runs = [json.loads(kaggle_push.client("datasets", "list")[1]) for _ in range(2)]
    folders = {run["TMPDIR"] for run in runs}
    assert len(folders) == 2 and not any(map(os.path.exists, folders))
    for run in runs:
        assert all(run.get(key) == os.environ[key] for key in os.environ if key not in ("TMPDIR", "PYTHONUNBUFFERED"))


def test_a_client_that_hangs_at_a_question_is_stopped(stub_client, monkeypatch):
    monkeypatch.setattr(kaggle_push, "ANSWER", 0.5)
    stub_client("print('one moment', flush=True); time.sleep(20)")
    with pytest.raises(kaggle_push.PushError, match=r"(?s)cannot tell whether .*no answer within 0.5 s"):
        kaggle_push.dataset_state(BUNDLE)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit('kaggle: error: unrecognized arguments: --format json')", "2.2.4 is needed: pip install --upgrade"),
        ("import no_such_six", "it needs: pip install kaggle six"),
    ],
)
def test_a_client_that_is_too_old_or_broken_is_said_to_be(script, message, stub_client, bundle):
    stub_client(script)
    with pytest.raises(kaggle_push.PushError, match=re.escape(message)):
        kaggle_push.push([bundle], "a note", 1)


def test_without_a_client_the_command_that_installs_it_is_shown(bundle, monkeypatch):
    monkeypatch.setattr(kaggle_push.shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(kaggle_push.PushError, match="pip install kaggle six"):
        kaggle_push.push([bundle], "a note", 1)


def test_the_commands_by_hand_begin_with_the_datasets(bundle, notebook):
    assert kaggle_push.commands([notebook(TRAIN), bundle]) == [
        f"kaggle datasets create -p '{bundle}'  # the first time",
        f"kaggle datasets version -p '{bundle}' -m 'what is new'  # every other time",
        "kaggle datasets status me/my-bundle --format json",
        "kaggle datasets files me/my-bundle -v --page-size 200",
        f"kaggle kernels push -p {bundle.parent / 'my-train'}",
        "kaggle kernels status me/my-train",
    ]
