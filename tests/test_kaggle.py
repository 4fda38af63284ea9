"""From a run to a submission on a made Kaggle root: every mount layout, inputs read-only, no way to the network."""

import contextlib
import copy
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import bundle
import kernel_utils as ku
import nbconvert
import nbformat
import pandas as pd
import pytest

from conftest import ROOT, flip, papermill, printed, train_frame

# where Kaggle mounts a dataset and a competition, and the output of a notebook
BUNDLES = {
    "new": "datasets/me/my-bundle",
    "old": "my-bundle",
    "old, name taken": "d/me/my-bundle",
    "model": "models/me/my-bundle/pytorch/default/1",
    "old model": "my-bundle/pytorch/default/1",
    "model, name taken": "m/me/my-bundle/pytorch/default/1",
    "notebook output": "notebooks/me/pack",
}
COMPETITIONS = {"new": "competitions/commonlit", "old": "commonlit"}

# Every process that Python starts reads this first: a connection to the outside is written down, and fails.
GUARD = """
import os, sys

def local(address):
    host = address[0] if isinstance(address, (tuple, list)) else address
    return host is None or str(host) in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "") or "/" in str(host)

def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        if not local(address):
            with open(os.environ["NETWORK_LOG"], "a") as log:
                log.write(f"{event} {address}\\n")
            raise OSError("no way out of this test")

sys.addaudithook(hook)
"""


# Runs notebooks one after the other as IPython does, or exported scripts, each as if its process were new.
RUN_CELLS = """
import contextlib, io, json, os, runpy, sys

kernels, results = json.load(open(sys.argv[1])), {}
path, environment = list(sys.path), dict(os.environ)

def run_notebook(file, settings):
    from IPython.core.interactiveshell import InteractiveShell

    cells = ["".join(c["source"]) for c in json.load(open(file))["cells"] if c["cell_type"] == "code"]
    settings = "# Parameters\\n" + "\\n".join(f"{k} = {v!r}" for k, v in settings.items())
    shell = InteractiveShell()
    for cell in [cells[0], settings, *cells[1:]]:
        ended = shell.run_cell(cell, store_history=True)
        if not ended.success:
            raise ended.error_before_exec or ended.error_in_exec
    return shell.user_ns

for name, kernel in kernels.items():
    sys.path[:] = path
    sys.modules.pop("kernel_utils", None)
    os.environ.clear()
    os.environ.update(environment | {"KAGGLE_ROOT": kernel["root"]})
    os.chdir(kernel["folder"])
    scope, error, printed = {}, None, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            if kernel["file"].endswith(".py"):
                sys.path[0] = kernel["folder"]
                scope = runpy.run_path(kernel["file"], run_name="__main__")
            else:
                scope = run_notebook(kernel["file"], kernel["settings"])
    except Exception as problem:
        error = str(problem)
    module = getattr(scope.get("ku"), "__file__", None)
    results[name] = {"printed": printed.getvalue(), "error": error, "module": module}
json.dump(results, open(sys.argv[2], "w"))
"""


@contextlib.contextmanager
def kaggle_roots(folder):
    """Function: {mount below input: folder} and a name -> environment and working folder of a kernel that has these,
    read-only."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(GUARD)

    def mount(inputs, name="kaggle"):
        root = folder / name
        (root / "working").mkdir(parents=True, exist_ok=True)
        (root / "input").mkdir(exist_ok=True)
        for place, source in inputs.items():
            shutil.copytree(source, root / "input" / place)
        for path in [root / "input", *(root / "input").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        paths = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
        env = {"KAGGLE_ROOT": str(root), "KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_IS_COMPETITION_RERUN": "1"}
        return env | {"PYTHONPATH": paths, "NETWORK_LOG": str(folder / "network.log")}, root / "working"

    yield mount
    for path in folder.rglob("*"):
        path.chmod(0o755)


@pytest.fixture
def kaggle(tmp_path):
    with kaggle_roots(tmp_path) as mount:
        yield mount


def tree(folder):
    """Files and folders with size and time of change: nothing may be written there (root may, whatever the mode)."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def pack(target, *arguments):
    """Call tools/bundle.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bundle.py", *map(str, arguments), "-o", str(target)])
        bundle.main()


@pytest.fixture(scope="module")
def dist(runs, tmp_path_factory):
    """Function: runs -> a bundle of them."""
    made = {}

    def folder(*names):
        if names not in made:
            made[names] = tmp_path_factory.mktemp("dist") / "my-bundle"
            pack(made[names], *(runs / n for n in names), "--id", "me/my-bundle", "--title", "My bundle")
        return made[names]

    return folder


def submission(folder):
    return pd.read_csv(folder / "submission.csv", dtype={"id": str})


NEW, OLD = COMPETITIONS["new"], COMPETITIONS["old"]
DAMAGED = ["one.fold1.safetensors", "kernel_utils.py", "manifest.json"]
MOUNTS = {  # name -> {mount: what is there, see `kernels`}, for infer.ipynb
    **{f"bundle {layout}": {place: "one", NEW: "competition"} for layout, place in BUNDLES.items()},
    "competition old": {BUNDLES["new"]: "one", OLD: "competition"},
    "both old": {BUNDLES["old"]: "one", OLD: "competition"},
    "training output": {"notebooks/me/train/runs/one": "run", "datasets/me/kit": "module", NEW: "competition"},
    "run that has code": {"datasets/me/run": "run with code", "datasets/me/kit": "module", NEW: "competition"},
    "two runs": {BUNDLES["new"]: "two", NEW: "competition"},
    **{f"damaged {name}": {BUNDLES["new"]: name, NEW: "competition"} for name in DAMAGED},
}
OTHERS = {  # the same, of what else runs
    "exported script": {BUNDLES["old"]: "one", OLD: "competition"},
    "starter trains": {"datasets/me/my-kit": "my-kit", NEW: "competition"},
    "run trains": {BUNDLES["new"]: "my-bundle", "models/me/tiny/pytorch/default/1": "backbone", NEW: "competition"},
    "run infers": {BUNDLES["new"]: "my-bundle", NEW: "competition"},
}
SMALL = dict(n_folds=2, epochs=1, max_length=32)


def export(notebook, script):
    script.write_text(nbconvert.ScriptExporter().from_filename(notebook)[0])
    return script


def own_notebook(clone, settings):
    """The script of a copy of train.ipynb with other settings, in a folder inside a clone."""
    for folder in ("kernel_utils", "notebooks"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    inside = clone / "notebooks" / "mine"
    inside.mkdir()
    notebook = nbformat.read(clone / "notebooks" / "train.ipynb", 4)
    cell = next(cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    kept = [line for line in cell.source.splitlines() if line.split(":")[0] not in settings]
    cell.source = "\n".join([*kept, *(f"{name} = {value!r}" for name, value in settings.items())])
    nbformat.write(notebook, inside / "mine.ipynb")
    return export(inside / "mine.ipynb", inside / "mine.py")


def strangers(made, bundle_folder, run):
    """Folders from somebody else, {name: folder}, whose code writes the file RAN if it runs."""
    touch = f"open({str(made / 'RAN')!r}, 'w').write('x')\n"
    names = ("shadowed bundle", "own bundle", "run with code")
    folders = {name: made / name for name in names}
    for folder, source in zip(folders.values(), (bundle_folder, bundle_folder, run), strict=True):
        shutil.copytree(source, folder)
    shadowed, own, with_code = folders.values()
    for name in ("safetensors.py", "torch.py", "transformers.py", "kernel_utils_extra.py"):
        (shadowed / name).write_text(touch)
    (made / "theirs.py").write_text(touch)
    cached = shadowed / "__pycache__" / f"kernel_utils.{sys.implementation.cache_tag}.pyc"
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(made / "theirs.py", cached, str(shadowed / "kernel_utils.py"), invalidation_mode=unchecked)
    module = touch + Path(ku.__file__).read_text()
    for folder in (own, with_code):
        (folder / "kernel_utils.py").write_text(module)
    manifest = json.loads((own / "manifest.json").read_bytes())
    manifest["files"]["kernel_utils.py"] = ku._describe_file(own / "kernel_utils.py")
    del manifest["sha256"]
    (own / "manifest.json").write_bytes(ku._seal_manifest(manifest))
    return folders


@pytest.fixture(scope="module")
def kernels(dist, runs, backbone_folder, tmp_path_factory):
    """Function: name of MOUNTS, OTHERS, or of those below -> what became of the notebook or script there, and its
    working folder. All of them run in one process."""
    made, kernels, trees = tmp_path_factory.mktemp("kernels"), {}, {}
    folders = {"one": dist("one"), "two": dist("one", "two"), "run": runs / "one", "module": ROOT / "kernel_utils"}
    folders |= {"competition": runs.parent / "competition"} | {name: made / name for name in DAMAGED}
    folders |= {"backbone": backbone_folder("tiny"), "my-kit": made / "my-kit", "my-bundle": made / "my-bundle"}
    for name in DAMAGED:
        flip(Path(shutil.copytree(dist("one"), made / name)) / name)
    names = ["--competition", "commonlit", "--title", "My title", "--id"]
    starter = ["--starter", "--backbone", folders["backbone"], "--kernels", made / "starter"]
    pack(made / "my-kit", *names, "me/my-kit", *starter)
    model = ["--model-source", "me/tiny/pytorch/default/1", "--kernels", made / "kernels"]
    pack(made / "my-bundle", *names, "me/my-bundle", runs / "one", *model)
    files = {"starter trains": "starter/train/train.ipynb", "run trains": "kernels/train/train.ipynb"}
    files |= {"run infers": "kernels/infer/infer.ipynb", "exported script": "exported script kaggle/working/infer.py"}
    home = {"root": str(made / "none"), "folder": str(ROOT), "settings": {}}
    infer = home | {"file": str(ROOT / "notebooks" / "infer.ipynb")}
    theirs = strangers(made, dist("one"), runs / "one")
    for name, folder in theirs.items():  # first: what is imported once is not imported again
        kernels[name] = infer | {"settings": {"bundle_dir": str(folder), "output_dir": str(made / name)}}
    kernels["own bundle"]["settings"]["own_module"] = True
    for name, folder in {"pinned": dist("one"), "another one": theirs["own bundle"]}.items():
        settings = {"bundle_dir": str(folder), "bundle_sha256": bundle.bundle_sha256(dist("one"))}
        kernels[name] = infer | {"settings": settings | {"output_dir": str(made / name)}}
    folders["run with code"] = theirs["run with code"]
    with kaggle_roots(made) as mount:
        for name, inputs in (MOUNTS | OTHERS).items():
            env, work = mount({place: folders[what] for place, what in inputs.items()}, f"{name} kaggle")
            kernels[name] = {"root": env["KAGGLE_ROOT"], "folder": str(work), "settings": {}}
            kernels[name]["file"] = str(made / files.get(name, ROOT / "notebooks" / "infer.ipynb"))
            trees[name] = tree(work.parent / "input")
        kernels["starter trains"]["settings"] = SMALL
        export(ROOT / "notebooks" / "infer.ipynb", made / files["exported script"])
        settings = {"bundle_dir": str(dist("one")), "output_dir": str(made / "home")}
        kernels["home"] = infer | {"settings": settings}
        settings = {"heda": "conv1d", "head": "conv1", "epochs": 2.5}
        kernels["misspelt"] = home | {"settings": settings, "file": str(ROOT / "notebooks" / "train.ipynb")}
        settings = {"data_dir": str(folders["competition"]), "backbone": str(folders["backbone"]), "output_dir": "out"}
        script = own_notebook(made / "clone", settings | SMALL)
        kernels["own script"] = home | {"folder": str(script.parent), "file": str(script)}
        (made / "kernels.json").write_text(json.dumps(kernels))
        before, env = tree(dist("one")), env | {"IPYTHONDIR": str(made / "ipython"), "MPLBACKEND": "agg"}
        command = [sys.executable, "-c", RUN_CELLS, made / "kernels.json", made / "results.json"]
        done = subprocess.run(command, cwd=made, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not Path(env["NETWORK_LOG"]).exists(), Path(env["NETWORK_LOG"]).read_text()
        for name, expected in trees.items():
            assert tree(made / f"{name} kaggle" / "input") == expected
        assert tree(dist("one")) == before
        results = json.loads((made / "results.json").read_text())
        yield lambda name: (results[name], Path(kernels[name]["folder"]), made)


def alone(command, **options):
    """Run a command in a network namespace where only loopback is up; skips where none can be made."""
    inside = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no network namespaces (unshare, ip)")
    return subprocess.run([*inside, *command], capture_output=True, text=True, **options)


SOUND = [name for name in MOUNTS if not name.startswith("damaged")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_what_is_attached_under_any_mount_predicts_offline_what_training_predicted(name, kernels, runs):
    result, work, _ = kernels(name)
    assert result["error"] is None, result
    expected = submission(runs / "one")
    if name == "two runs":
        expected["target"] = (expected["target"] + submission(runs / "two")["target"]) / 2
    pd.testing.assert_frame_equal(submission(work), expected, rtol=0, atol=1e-5)
    out = result["printed"]
    assert Path(result["module"]).is_relative_to(work.parent / "input")
    assert "8 golden rows in float32" in out and "rows/s" in out and "1 process on" in out
    assert f"10 rows by {4 if name == 'two runs' else 2} models in" in out
    assert ("all as they were packed" in out) is (name not in ("training output", "run that has code"))
    assert ("datasets/me/kit" in result["module"]) is (name in ("training output", "run that has code"))


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_bundle_stops_the_notebook_names_the_file_and_writes_no_submission(name, kernels):
    result, work, _ = kernels(f"damaged {name}")
    assert name in result["error"] and not (work / "submission.csv").exists()


@pytest.mark.slow
def test_of_a_folder_from_somebody_else_no_code_runs_but_the_module_of_a_bundle(kernels):
    error = kernels("shadowed bundle")[0]["error"]
    assert all(f"{name}: not in manifest.json" in error for name in ("__pycache__", "safetensors.py", "torch.py"))
    for name, said in (("run with code", "a run folder, without checksums"), ("own bundle", "runs instead of the one")):
        result, _, made = kernels(name)
        assert result["error"] is None and said in result["printed"], result
        assert Path(result["module"]) == ROOT / "kernel_utils" / "kernel_utils.py"
        assert len(submission(made / name)) == 49
    assert not (made / "RAN").exists()


@pytest.mark.slow
def test_a_bundle_that_is_pinned_is_the_only_one_that_runs(kernels, dist):
    result, _, made = kernels("pinned")
    assert result["error"] is None and len(submission(made / "pinned")) == 49
    assert Path(result["module"]).parent == dist("one")
    error = kernels("another one")[0]["error"]
    assert "another one" not in error and "own bundle/manifest.json has not the SHA-256" in error
    assert not (made / "another one").exists() and not (made / "RAN").exists()


@pytest.mark.slow
def test_at_home_a_bundle_predicts_the_sample_with_its_own_module(kernels, dist):
    result, _, made = kernels("home")
    assert result["error"] is None and len(submission(made / "home")) == 49
    assert Path(result["module"]).parent == dist("one") and "all as they were packed" in result["printed"]


@pytest.fixture(scope="module")
def trained_sample(tmp_path_factory):
    """Folder of train.ipynb after papermill, with the run `reading` of the default backbone, whose weights are real."""
    folder = tmp_path_factory.mktemp("sample")
    small = [("max_rows", 40), ("n_folds", 2), ("epochs", 1), ("output_dir", folder / "runs"), ("run_name", "reading")]
    done, _ = papermill("train.ipynb", folder / "train.ipynb", ("head", "conv1d"), *small)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_papermill_trains_on_the_sample_and_shows_curves_and_predictions(trained_sample):
    executed = nbformat.read(trained_sample / "train.ipynb", 4)
    record = ku.RunFolder(trained_sample / "runs" / "reading").read_record()
    assert record["status"] == "complete" and record["settings"]["head"] == "conv1d"
    images = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 2 and "out-of-fold over 40 rows, 2 folds" in printed(executed)
    written = pd.read_csv(ROOT / "notebooks" / "sample" / "sample_submission.csv", dtype={"id": str})
    assert list(submission(trained_sample / "runs" / "reading")["id"]) == list(written["id"])


@pytest.mark.slow
def test_from_training_on_the_sample_to_a_submission_where_only_loopback_is_up(trained_sample, kaggle, tmp_path):
    """By the commands of the README."""
    options = ["--id", "me/reading-bundle", "--title", "Reading bundle", "--report", trained_sample / "train.ipynb"]
    options += ["--kernels", tmp_path / "kernels", "--competition", "commonlitreadabilityprize"]
    pack(tmp_path / "reading", trained_sample / "runs" / "reading", *options)
    assert "out-of-fold over 40 rows" in (tmp_path / "reading.html").read_text()
    sample = ROOT / "notebooks" / "sample"
    inputs = {"datasets/me/reading-bundle": tmp_path / "reading", "competitions/commonlitreadabilityprize": sample}
    env, work = kaggle(inputs)
    command = [sys.executable, "-m", "papermill", tmp_path / "kernels" / "infer" / "infer.ipynb", work / "out.ipynb"]
    done = alone(command, cwd=work, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    expected = submission(trained_sample / "runs" / "reading")
    pd.testing.assert_frame_equal(submission(work), expected, rtol=0, atol=1e-5)
    assert len(expected) == 49 and not Path(env["NETWORK_LOG"]).exists()


@pytest.mark.slow
def test_the_guard_of_these_tests_sees_an_attempt_to_leave(kaggle, tmp_path):
    env, _ = kaggle({})
    attempt = "import urllib.request; urllib.request.urlopen('http://example.com', timeout=1)"
    assert subprocess.run([sys.executable, "-c", attempt], env=os.environ | env, capture_output=True).returncode
    assert "example.com" in Path(env["NETWORK_LOG"]).read_text()


@pytest.mark.slow
def test_the_exported_script_of_infer_runs_as_well(kernels, runs):
    result, work, _ = kernels("exported script")
    assert result["error"] is None, result
    pd.testing.assert_frame_equal(submission(work), submission(runs / "one"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_exported_script_of_train_trains_from_a_folder_inside_the_clone(kernels):
    result, inside, made = kernels("own script")
    assert result["error"] is None, result
    (run,) = (inside / "out").iterdir()
    assert ku.RunFolder(run).read_record()["settings"]["n_folds"] == 2
    assert Path(result["module"]) == made / "clone" / "kernel_utils" / "kernel_utils.py"


@pytest.mark.slow
def test_a_misspelt_setting_and_a_bad_value_are_one_error(kernels):
    result, _, _ = kernels("misspelt")
    for part in (
        "there is no setting 'heda' (did you mean head?)",
        "head must be one of cls, mean, max",
        "got 'conv1' (did you mean conv1d?)",
        "epochs must be a whole number, got 2.5",
    ):
        assert part in result["error"]


@pytest.mark.slow
def test_the_kernels_of_a_starter_and_of_a_run_train_offline_and_infer(kernels, runs):
    """The notebooks of `--kernels`, here with fewer epochs and folds."""
    for name, run in (("starter trains", "commonlit-my-kit-mean-seed0"), ("run trains", "commonlit-tiny-conv1d-seed0")):
        result, work, _ = kernels(name)
        assert result["error"] is None, result
        assert [path.name for path in (work / "runs").iterdir()] == [run]
    score = ku.RunFolder(work / "runs" / run).read_record()["oof"]["last"]
    assert score == pytest.approx(ku.RunFolder(runs / "one").read_record()["oof"]["last"])
    result, work, _ = kernels("run infers")
    assert result["error"] is None, result
    pd.testing.assert_frame_equal(submission(work), submission(runs / "one"), rtol=0, atol=1e-5)


def rerun_inputs(folder, frame, columns=("id", "excerpt"), **more):
    """A competition's files as a hidden rerun has them."""
    folder.mkdir()
    frame[list(columns)].assign(**more).to_csv(folder / "test.csv", index=False)
    frame.assign(target=0.0)[["id", "target"]].iloc[::-1].to_csv(folder / "sample_submission.csv", index=False)
    return folder


RERUNS = {
    "one row": train_frame(1, seed=7),
    "other rows": train_frame(25, seed=8),
    "empty texts": train_frame(12, seed=9).assign(excerpt=["", " ", "a cat"] * 4),
    "odd texts": train_frame(4, seed=9).assign(excerpt=["😀" * 50, "cat\n\n\"dog\", 'x'", "the " * 5000, "\u200b"]),
}


@pytest.mark.parametrize("case", RERUNS)
def test_a_hidden_rerun_has_a_row_for_every_id_of_its_own_sample(case, runs, tmp_path):
    folder = rerun_inputs(tmp_path / "data", RERUNS[case], new_column="?", another=1)
    loaded = ku.Bundle.open(runs / "one")
    with ku.warnings.catch_warnings():
        ku.warnings.simplefilter("ignore")
        test, sample = ku.read_test_set(loaded, str(folder))
    predictions = ku.predict_bundle(loaded, test)
    written = ku.write_submission(loaded, test, predictions, sample, tmp_path / "submission.csv")
    assert list(written["id"]) == list(RERUNS[case]["id"])[::-1] and written["target"].notna().all()
    alone = ku.predict_bundle(loaded, test.iloc[:1])
    assert predictions[0] == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.nightly
@pytest.mark.slow
def test_twenty_thousand_rows_are_predicted(runs, tmp_path):
    frame = train_frame(20_000, seed=3).assign(id=[f"{i:05d}" for i in range(20_000)])
    loaded = ku.Bundle.open(runs / "one")
    test, sample = ku.read_test_set(loaded, str(rerun_inputs(tmp_path / "data", frame)))
    predictions = ku.predict_bundle(loaded, test)
    ku.write_submission(loaded, test, predictions, sample, tmp_path / "submission.csv")
    assert len(submission(tmp_path)) == 20_000
    some = [0, 1, 777, 19_999]
    assert predictions[some] == pytest.approx(ku.predict_bundle(loaded, test.iloc[some]), abs=1e-5)


def test_a_sample_that_the_runs_cannot_fill_is_refused_before_anything_is_predicted(runs, tmp_path):
    folder = rerun_inputs(tmp_path / "data", train_frame(3))
    sample = pd.read_csv(folder / "sample_submission.csv", dtype=str).rename(columns={"target": "a"}).assign(b=0)
    sample.to_csv(folder / "sample_submission.csv", index=False)
    with pytest.raises(ku.DataError, match="has columns a, b; the settings predict target"):
        ku.read_test_set(ku.Bundle.open(runs / "one"), str(folder))


def test_rows_split_over_processes_are_predicted_as_by_one(runs, dist, capsys):
    loaded, frame = ku.load_bundle(dist("one", "two")), train_frame(7, seed=5)
    alone = ku.predict_bundle(loaded, frame)
    capsys.readouterr()
    assert ku.predict_bundle(loaded, frame, processes=2) == pytest.approx(alone, abs=1e-5)
    assert "2 processes, each on" in capsys.readouterr().out


def test_a_process_predicts_with_the_runs_that_it_is_given(dist, forked_module):
    loaded, frame = ku.load_bundle(dist("one", "two")), train_frame(5, seed=6)
    second = ku.dataclasses.replace(loaded, runs=loaded.runs[1:])
    expected = ku.predict_bundle(ku.Bundle.open(dist("two")), frame)
    assert ku.predict_bundle(second, frame, processes=2) == pytest.approx(expected, abs=1e-5)


def test_a_process_that_fails_fails_the_prediction_with_its_problem(dist, tmp_path, forked_module):
    copy = Path(shutil.copytree(dist("one"), tmp_path / "copy"))
    (copy / "one.record.json").unlink()
    lost = ku.dataclasses.replace(ku.Bundle.open(dist("one")), folder=copy)
    with pytest.raises(ku.KitError, match=r"^cannot go on:\n  .*one.record.json: not a JSON file"):
        ku.predict_bundle(lost, train_frame(4), processes=2)


def test_a_process_on_another_device_than_the_first_refuses_to_predict(dist, tmp_path):
    job = dict(bundle=str(dist("one")), runs=["one"], device="Tesla T4", cells={"excerpt": ["a cat"]})
    ku._write_json(tmp_path / "job.json", job | dict(batch_tokens=0))
    with pytest.raises(ku.KitError, match=r"this process has .* CPU, the one that started it Tesla T4"):
        ku._predict_job(tmp_path / "job.json")
    assert not (tmp_path / "job.npy").exists()


@pytest.mark.parametrize(("visible", "given"), [(None, ["1", "3"]), ("0,1,2,3", ["1", "3"]), ("5,7,8,9", ["7", "9"])])
def test_every_other_process_gets_an_equal_gpu_of_its_own(visible, given, dist, monkeypatch):
    started, loaded = [], ku.Bundle.open(dist("one"))

    class Process(subprocess.Popen):
        def __init__(self, command, env, **streams):
            started.append(env["CUDA_VISIBLE_DEVICES"])
            super().__init__([sys.executable, "-c", "raise SystemExit(3)"], **streams)

    names = ["T4", "T4", "P100", "T4"]
    monkeypatch.setattr(ku.torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(ku.torch.cuda, "get_device_name", lambda i=0: names[i])
    monkeypatch.setattr(ku, "_device_name", lambda: "T4")
    monkeypatch.setattr(ku.subprocess, "Popen", Process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ku.KitError, match="process 1 of 3 ended with exit code 3"):
        ku.predict_bundle(loaded, train_frame(6))
    assert started == given


@pytest.mark.parametrize(
    ("field", "name"), [("head", "mean"), ("loss", "mse"), ("metric", "rmse"), ("schedule", "linear")]
)
def test_with_parts_of_the_notebook_one_process_predicts_and_says_so(field, name, tiny, capsys, monkeypatch):
    part = ku._REGISTRIES[field][name]
    own = type("Own", (part,), {}) if isinstance(part, type) else ku.functools.wraps(part)(lambda *a: part(*a))
    own = copy.copy(part) if field == "metric" else own
    own.__module__, own.__name__ = "__main__", "Own"
    monkeypatch.setitem(ku._REGISTRIES[field], "own", own)
    train, _, _ = ku.read_competition(cfg := tiny(run_folds="0", run_name="own", **{field: "own"}))
    loaded = ku.Bundle.open(ku.train(ku.make_folds(train, cfg), cfg))
    capsys.readouterr()
    ku.predict_bundle(loaded, train_frame(4), processes=2)
    assert "1 GPU of 2: Own of the notebook" in (out := capsys.readouterr().out) and "1 process on" in out


def test_a_bundle_that_is_mounted_twice_is_one(kaggle, dist, monkeypatch):
    env, _ = kaggle({"datasets/me/my-bundle": dist("one"), "my-bundle": dist("one")})
    monkeypatch.setenv("KAGGLE_ROOT", env["KAGGLE_ROOT"])
    assert [run.name for run in ku.load_bundle().runs] == ["one"]


def test_a_run_that_is_mounted_twice_is_one_and_what_others_call_record_json_is_none(
    kaggle, runs, tmp_path, monkeypatch
):
    inputs = {"notebooks/me/train/runs/one": runs / "one", "train/runs/one": runs / "one"}
    for name, content in (("list", "[1]"), ("broken", "{"), ("other", '{"status": "running"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
        inputs[f"datasets/you/{name}"] = tmp_path / name
    env, _ = kaggle(inputs)
    monkeypatch.setenv("KAGGLE_ROOT", env["KAGGLE_ROOT"])
    assert [run.name for run in ku.load_bundle().runs] == ["one"]


@pytest.fixture
def attached(tmp_path, monkeypatch):
    """Function: files below /kaggle/input, then the folders that hold a marker, relative to it."""
    inputs = tmp_path / "kaggle" / "input"
    inputs.mkdir(parents=True)
    monkeypatch.setenv("KAGGLE_ROOT", str(inputs.parent))

    def find(marker, *files):
        for file in files:
            (inputs / file).parent.mkdir(parents=True, exist_ok=True)
            (inputs / file).touch()
        return [str(folder.relative_to(inputs)) for folder in ku._Kaggle().attached_folders(marker)]

    return find


@pytest.mark.parametrize("mount", [*BUNDLES.values(), *COMPETITIONS.values()])
def test_a_marker_is_found_in_every_mount_layout(mount, attached):
    assert attached("manifest.json", f"{mount}/manifest.json", "other/data.csv") == [mount]


def test_attached_folders_are_sorted_and_at_most_six_levels_deep(attached):
    deep = "a/b/c/d/e/f"
    files = ["m", f"{deep}/m", f"{deep}/g/m", "z/m", "a/m"]
    assert attached("m", *files) == ["a", deep, "z"]


def test_a_pattern_finds_folders_that_hold_a_file_it_fits(attached):
    assert attached("*.csv", "one/train.csv", "two/deep/test.csv", "three/train.parquet") == ["one", "two/deep"]


def test_a_folder_that_is_attached_by_a_link_too_is_one_and_a_link_to_itself_is_none(attached, tmp_path):
    inputs = tmp_path / "kaggle" / "input"
    assert attached("m", "datasets/me/one/m") == ["datasets/me/one"]
    (inputs / "a").symlink_to(inputs / "datasets" / "me" / "one")
    (inputs / "loop").symlink_to(inputs / "loop")
    (inputs / "gone").symlink_to(inputs / "nowhere")
    assert attached("m") == ["datasets/me/one"]


def test_the_search_lists_no_folder_below_one_with_more_than_100_entries(attached, tmp_path, monkeypatch):
    """A data set of images: 300 folders, each with one that holds the marker."""
    inputs, scandir, listed = tmp_path / "kaggle" / "input", os.scandir, []

    class Counted:
        """os.scandir of a folder, which notes the folder for each entry that is read of it."""

        def __init__(self, folder):
            self.entries, self.folder = scandir(folder), Path(folder).relative_to(inputs).as_posix()
            listed.append((self.folder, "listed"))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            return self

        def __next__(self):
            listed.append((self.folder, "read"))
            return next(self.entries)

    images = [f"images/{i}/{place}" for i in range(300) for place in ("m", "deep/m")]
    beside = ["small/m", "images/m", *(f"hundred/{i}/m" for i in range(100))]
    attached("m", *images, *beside)
    monkeypatch.setattr(os, "scandir", Counted)
    found = attached("m")
    assert found == sorted(["small", "images", *(f"hundred/{i}" for i in range(100))])
    assert listed.count(("images", "read")) == 101
    assert {folder for folder, _ in listed} == {
        ".",
        "small",
        "images",
        "hundred",
        *(f"hundred/{i}" for i in range(100)),
    }
    assert len([folder for folder, what in listed if what == "listed"]) == 104


def test_a_bundle_is_found_beside_a_data_set_of_images(attached, dist, tmp_path):
    attached("m", *(f"datasets/me/images/{i}/manifest.json" for i in range(150)))
    shutil.copytree(dist("one"), tmp_path / "kaggle/input/datasets/me/my-bundle")
    assert [run.name for run in ku.load_bundle().runs] == ["one"]


@pytest.mark.parametrize("part", ["golden.json", "fold1/model.safetensors", "fold0/config.json", "tokenizer"])
def test_a_run_folder_that_lacks_a_part_is_refused_by_its_name(part, runs, tmp_path):
    folder = Path(shutil.copytree(runs / "one", tmp_path / "one"))
    shutil.rmtree(folder / part) if part == "tokenizer" else (folder / part).unlink()
    with pytest.raises(ku.ConfigError, match=f"the run lacks .*{part}"):
        ku.load_bundle(folder)


@pytest.mark.parametrize("spoil", ["another", "removed", "foreign"])
def test_several_bundles_or_none_are_an_error_that_lists_what_is_attached(spoil, kaggle, dist, tmp_path, monkeypatch):
    inputs = {"datasets/me/my-bundle": dist("one")}
    if spoil == "another":
        inputs["datasets/me/more"] = dist("one", "two")
    else:
        inputs["datasets/me/my-bundle"] = Path(shutil.copytree(dist("one"), tmp_path / "spoilt"))
        manifest = tmp_path / "spoilt" / "manifest.json"
        manifest.unlink()
        if spoil == "foreign":  # somebody else's file of that name
            (tmp_path / "web").mkdir()
            (tmp_path / "web" / "manifest.json").write_text('{"name": "a web page"}')
            inputs["datasets/you/web"] = tmp_path / "web"
    env, _ = kaggle(inputs)
    monkeypatch.setenv("KAGGLE_ROOT", env["KAGGLE_ROOT"])
    count = 2 if spoil == "another" else 0
    with pytest.raises(ku.ConfigError, match=rf"there are {count} bundles \(manifest\.json\).*datasets/me/my-bundle"):
        ku.load_bundle()
