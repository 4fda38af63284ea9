"""Packing runs into a bundle, verifying it, and everything that must be refused."""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import bundle
import kernel_utils as ku
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, flip, tiny_config, train_frame, trained
from fake_kaggle import FakeKaggle

NAMES = ["--id", "me/my-bundle", "--title", "My bundle"]
MODEL = ["--model-source", "google/bert/transformers/tiny/1"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Function: the command line in this process -> what it printed; SystemExit where it fails."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bundle.py", *map(str, arguments)])
        bundle.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(call):
    """Function: the command line -> the message it is refused with."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        assert stop.value.code not in (0, None)
        return str(stop.value.code)

    return run


@pytest.fixture(scope="session")
def packed(runs, tmp_path_factory):
    """A bundle of the runs `one` and `two`; copy what you change."""
    target = tmp_path_factory.mktemp("dist") / "my-bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bundle.py", *map(str, (runs / "one", runs / "two", "-o", target)), *NAMES])
        bundle.main()
    return target


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture
def one(runs, tmp_path):
    """A copy of the run `one` that may be spoilt."""
    return Path(shutil.copytree(runs / "one", tmp_path / "one"))


def reseal(folder, change=lambda manifest: None):
    """Write the manifest again for the files as they are now: what only the golden rows can tell apart."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": ku._file_sha256(folder / name)}
    change(manifest)
    del manifest["sha256"]
    (folder / "manifest.json").write_bytes(ku._seal_manifest(manifest))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------
# What a bundle is


def test_a_bundle_is_flat_and_its_manifest_tells_size_hash_versions_settings_golden_rows_and_scores(packed, runs):
    manifest = json.loads((packed / "manifest.json").read_text())
    names = {path.name for path in packed.iterdir()}
    assert all(path.is_file() for path in packed.iterdir())
    assert names - set(manifest["files"]) == {"manifest.json", "dataset-metadata.json"}
    for name in (
        "one.record.json",
        "one.config.json",
        "two.fold1.safetensors",
        "two.tokenizer.json",
        "kernel_utils.py",
    ):
        data = (packed / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": ku.hashlib.sha256(data).hexdigest()}
    assert (packed / "kernel_utils.py").read_bytes() == (ROOT / "kernel_utils" / "kernel_utils.py").read_bytes()
    assert manifest["version"] == ku.__version__ and manifest["versions"]["torch"] == torch.__version__
    oof = pd.read_csv(runs / "two" / "oof.csv", dtype={"id": str}).set_index("id")
    told = manifest["runs"]["two"]
    record = json.loads((runs / "two" / "record.json").read_text())
    assert told["oof"] == record["oof"] and told["settings"] == record["settings"]
    assert len(told["golden"]["token_ids"]) == 5 and len(told["golden"]["rows"]) == 8
    for row in told["golden"]["rows"]:
        assert row["fold"] == oof["fold"][row["id"]]
        assert row["prediction"] == pytest.approx([oof["prediction"][row["id"]]], abs=1e-5)


def test_golden_rows_go_from_the_shortest_to_the_longest_text_of_each_fold(runs):
    golden = json.loads((runs / "one" / "golden.json").read_text())
    frame = pd.read_csv(runs.parent / "competition" / "train.csv", dtype={"id": str})
    oof = pd.read_csv(runs / "one" / "oof.csv", dtype={"id": str})
    words = frame.set_index("id")["excerpt"].str.split().str.len().clip(upper=30)  # 32 tokens with the special ones
    for fold in (0, 1):
        lengths = words[oof["id"][oof["fold"] == fold]]
        chosen = [words[row["id"]] for row in golden["rows"] if row["fold"] == fold]
        assert chosen == sorted(chosen) and (chosen[0], chosen[-1]) == (lengths.min(), lengths.max())


def test_the_same_runs_make_the_same_bytes_and_replace_a_bundle_that_is_there(call, packed, runs, tmp_path):
    for _ in range(2):
        call(runs / "one", runs / "two", "-o", tmp_path / "again", *NAMES)
        assert contents(tmp_path / "again") == contents(packed)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_fp16_weights_halve_the_bundle_stay_the_same_bytes_and_say_how_far_predictions_move(call, runs, tmp_path):
    out = call(runs / "one", "-o", tmp_path / "a", *NAMES, "--half")
    call(runs / "one", "-o", tmp_path / "b", *NAMES, "--half")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    full, half = (load_file(f) for f in (runs / "one/fold0/model.safetensors", tmp_path / "a/one.fold0.safetensors"))
    scale = {"target_mean", "target_spread"}  # these stay as they are
    assert full.keys() == half.keys() and all(torch.equal(full[name], half[name]) for name in scale)
    assert {half[name].dtype for name in half.keys() - scale if half[name].is_floating_point()} == {torch.float16}
    told = json.loads((tmp_path / "a" / "manifest.json").read_text())["runs"]["one"]
    trained_rows = json.loads((runs / "one" / "golden.json").read_text())["rows"]
    pairs = [
        (a["prediction"][0], b["prediction"][0]) for a, b in zip(trained_rows, told["golden"]["rows"], strict=True)
    ]
    spread = json.loads((runs / "one" / "record.json").read_text())["oof"]["target_sd"][0]
    moved = max(abs(a - b) for a, b in pairs) / spread
    assert 0 < moved < 1e-2 and told["golden_moved_by_half"] == pytest.approx(moved, abs=1e-5)
    assert "fp16 weights move the golden predictions by" in out
    ku.check_golden(ku.load_bundle(tmp_path / "a"))


def test_a_bundle_that_cannot_be_finished_leaves_what_was_there(call, packed, runs, tmp_path, monkeypatch):
    target = Path(shutil.copytree(packed, tmp_path / "my-bundle"))
    before, real, calls = contents(target), shutil.copyfile, []

    def full(source, name):
        calls.append(name)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        return real(source, name)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        call(runs / "one", runs / "two", "-o", target, *NAMES)
    assert contents(target) == before and [path.name for path in tmp_path.iterdir()] == ["my-bundle"]


def test_what_was_there_comes_back_where_the_new_cannot_take_its_place(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    (tmp_path / "staging").mkdir()
    with pytest.raises(OSError):
        bundle.put_in_place(tmp_path / "staging" / "nothing", tmp_path / "target")
    assert (tmp_path / "target" / "old").exists()


def test_a_folder_that_is_no_bundle_is_never_replaced(refused, runs, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("ten years of work")
    message = refused(runs / "one", "-o", tmp_path / "thesis", *NAMES)
    assert "exists and is not what this tool made" in message
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "ten years of work"


def test_what_this_tool_made_is_replaced_unless_somebody_added_to_it(packed, tmp_path):
    target = Path(shutil.copytree(packed, tmp_path / "target"))
    assert bundle.target_problems(target) == bundle.target_problems(tmp_path / "none") == []
    (target / "notes.txt").write_text("mine")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "infer").mkdir()
    for name in ("kernel-metadata.json", "infer.ipynb"):
        (tmp_path / "infer" / name).write_text('{"id": "me/x-infer"}')
    (tmp_path / "file").write_text("x")
    assert bundle.target_problems(tmp_path / "infer", "me/x-infer") == []
    assert bundle.target_problems(tmp_path / "infer", "me/y-infer") != []
    (tmp_path / "infer" / "mine.py").write_text("x")
    for name in ("target", "web", "infer", "file"):
        assert "exists and is not what this tool made" in bundle.target_problems(tmp_path / name, "me/x-infer")[0]


@pytest.mark.parametrize(("target", "kernels"), [("dist/infer", "dist"), ("dist", "dist/kernels"), ("dist", "dist")])
def test_a_bundle_and_its_kernels_do_not_lie_in_each_other(target, kernels, refused, runs, tmp_path):
    arguments = ["-o", tmp_path / target, *NAMES, "--kernels", tmp_path / kernels, "--competition", "commonlit"]
    assert "must not lie in each other" in refused(runs / "one", *arguments)


def test_a_kernel_that_cannot_take_its_place_leaves_the_old_bundle(call, packed, runs, tmp_path, monkeypatch):
    target, real = Path(shutil.copytree(packed, tmp_path / "my-bundle")), bundle.put_in_place
    before = contents(target)

    def fail(built, place):
        if place.name == "train":
            raise OSError("no room for a kernel")
        real(built, place)

    monkeypatch.setattr(bundle, "put_in_place", fail)
    with pytest.raises(SystemExit, match="no room for a kernel"):
        call(
            runs / "two", "-o", target, *NAMES, "--kernels", tmp_path / "kernels", "--competition", "commonlit", *MODEL
        )
    assert contents(target) == before and not list(tmp_path.glob(".bundle*"))


def table(name):
    """A training table that a task of that name has."""
    frame = train_frame(60).assign(genre=["prose", "verse", "news"] * 20, answer="the cat sat")
    rank = frame["target"].rank(method="first")
    labels = {
        "binary": np.where(rank > 30, "yes", "no"),
        "multiclass": np.select([rank <= 20, rank <= 40], list("ab"), "c"),
    }
    two = {"a": (rank > 30).astype(int), "b": (rank % 2 == 0).astype(int)}
    return frame.assign(target=labels.get(name, frame["target"]), other=-frame["target"], **two)


TASKS = {
    "pairs": dict(text_columns="excerpt,answer", truncation="head,tail", keep_newlines=True),
    "a template": dict(text_columns="excerpt,answer", template="[{genre}] {excerpt} [ANSWER] {answer}"),
    "several targets": dict(target_columns="target,other"),
    "binary": dict(task="binary"),
    "multiclass": dict(task="multiclass"),
    "multilabel": dict(task="multilabel", target_columns="a,b"),
    "best of one fold": dict(keep="best", evals_per_epoch=3, run_folds="1", lr=0.02, epochs=2),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_every_kind_of_task_predicts_the_same_from_its_bundle(task, call, tiny, competition, tmp_path):
    frame = table(task)
    frame.to_csv(competition / "train.csv", index=False)
    frame[:9].drop(columns=["target", "other", "a", "b"]).to_csv(competition / "test.csv", index=False)
    (competition / "sample_submission.csv").unlink()
    expected = pd.read_csv(trained(tiny(run_name="run", **TASKS[task])) / "submission.csv", dtype={"id": str})
    call(tmp_path / "runs" / "run", "-o", tmp_path / "dist", *NAMES)
    loaded = ku.load_bundle(tmp_path / "dist")
    ku.check_golden(loaded)
    test, sample = ku.read_test_set(loaded, str(competition))
    path = tmp_path / "submission.csv"
    ku.write_submission(loaded, test, ku.predict_bundle(loaded, test), sample, path)
    pd.testing.assert_frame_equal(pd.read_csv(path, dtype={"id": str}), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------
# Damage


DAMAGE = {
    "one flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": Path.unlink,
}
PARTS = "record.json config.json tokenizer.json tokenizer_config.json fold0.safetensors fold1.safetensors".split()
EVERY = ["kernel_utils.py", "manifest.json", "dataset-metadata.json"]
EVERY += [f"{run}.{part}" for run in ("one", "two") for part in PARTS]


def test_the_damage_below_reaches_every_file_of_a_bundle(packed):
    assert {path.name for path in packed.iterdir()} == set(EVERY)


@pytest.mark.parametrize(("name", "how"), zip(EVERY, itertools.cycle(DAMAGE), strict=False))
def test_every_damaged_file_is_refused_by_name(how, name, copy, refused):
    DAMAGE[how](copy / name)
    assert name in refused("--check", copy)
    if name != "dataset-metadata.json":  # Kaggle keeps it
        with pytest.raises(ku.KitError, match=name.replace(".", r"\.")):
            ku.load_bundle(copy)


@pytest.mark.parametrize("bit", range(0, 4000, 347))
def test_no_bit_of_a_manifest_can_flip_unseen(bit, copy):
    data = bytearray((copy / "manifest.json").read_bytes())
    spot = bit * (len(data) - 1) // 4000
    data[spot] ^= 1 << bit % 8
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(ku.BundleError, match=r"manifest\.json"):
        ku.load_bundle(copy)


@pytest.mark.parametrize("names", [["manifest.json"], [name for name in EVERY if name != "manifest.json"], ["x"]])
def test_links_to_the_very_bytes_of_a_bundle_are_refused_by_name(names, copy, packed, refused):
    for name in names:
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(packed / name)
    said = refused("--check", copy)
    with pytest.raises(ku.BundleError) as error:
        ku.load_bundle(copy)
    assert [name for name in names if name not in said or name not in str(error.value)] == []


def test_a_bundle_whose_manifest_or_weights_are_a_pipe_is_refused_without_waiting_for_it(copy):
    replace_by_fifo(copy / "one.fold0.safetensors")
    with pytest.raises(ku.BundleError, match=r"one\.fold0\.safetensors: a pipe or a device"):
        ku.load_bundle(copy)
    replace_by_fifo(copy / "manifest.json")
    with pytest.raises(ku.KitError, match=r"manifest\.json"):
        ku.load_bundle(copy)


def test_a_file_too_many_is_refused_by_name(copy, refused):
    (copy / "helper.py").write_text("print('hello')")
    assert "helper.py: not in manifest.json" in refused("--check", copy)
    with pytest.raises(ku.BundleError, match=r"helper\.py: not in manifest\.json"):
        ku.load_bundle(copy)


def swap(folder, a, b):
    (folder / a).rename(folder / "aside")
    (folder / b).rename(folder / a)
    (folder / "aside").rename(folder / b)


def test_swapped_folds_are_refused_by_name_and_by_their_predictions_where_the_manifest_was_made_to_fit(copy, refused):
    swap(copy, "one.fold0.safetensors", "one.fold1.safetensors")
    with pytest.raises(ku.BundleError, match=r"one\.fold0\.safetensors: its SHA-256"):
        ku.load_bundle(copy)
    reseal(copy)
    with pytest.raises(
        ku.BundleError, match=r"one, fold \d, id \d+: in float32 the prediction is .* off that of training"
    ):
        ku.check_golden(ku.load_bundle(copy))
    assert "one, fold" in refused("--check", copy)


def test_a_swapped_tokenizer_is_refused_by_name_and_by_its_token_ids_where_the_manifest_was_made_to_fit(copy):
    tokenizer = json.loads((copy / "two.tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (copy / "two.tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ku.BundleError, match=r"two\.tokenizer\.json"):
        ku.load_bundle(copy)
    reseal(copy)
    with pytest.raises(ku.BundleError, match="two: the tokenizer gives other token ids than in training"):
        ku.check_golden(ku.load_bundle(copy))


def test_an_older_module_is_refused_by_name(copy, call):
    source = (copy / "kernel_utils.py").read_text()
    (copy / "kernel_utils.py").write_text(source.replace(f'"{ku.__version__}"', '"0.1.0"'))
    with pytest.raises(ku.BundleError, match=r"kernel_utils\.py"):
        ku.load_bundle(copy)
    reseal(copy)  # a bundle that an older clone made: sound, but not to be predicted with this module
    with pytest.raises(
        ku.BundleError, match=rf"kernel_utils\.py: .* version {ku.__version__}, runs instead of the one"
    ):
        ku.load_bundle(copy)
    assert "predictions not checked" in (out := call("--check", copy)) and "files and metadata are sound" in out


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_weights_that_predict_otherwise_are_refused_with_fold_and_row(value, copy):
    tensors = load_file(copy / "two.fold1.safetensors")
    tensors["output.bias"] += value
    save_file(tensors, copy / "two.fold1.safetensors")
    reseal(copy)
    with pytest.raises(ku.BundleError, match="two, fold 1, id"):
        ku.check_golden(ku.load_bundle(copy))


# ---------------------------------------------------------------------------------------
# Runs that are not packed


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_record(change):
    return lambda run: edit(run / "record.json", change)


def spoil_weights(value):
    def change(run):
        tensors = load_file(run / "fold1" / "model.safetensors")
        tensors["output.weight"][0, 0] = value
        save_file(tensors, run / "fold1" / "model.safetensors")

    return change


def replace_by_link(path):
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def replace_by_fifo(path):
    path.unlink()
    ku.os.mkfifo(path)


def config_key(key, value="x", name="fold{}/config.json"):
    return lambda run: [edit(run / name.format(fold), lambda c: c.update({key: value})) for fold in (0, 1)]


HOSTILE = {  # what is done to a run, and what the message must name
    "still running": (edit_record(lambda r: r.update(status="running")), "one: the run did not finish"),
    "no status": (edit_record(lambda r: r.pop("status")), "one: the run did not finish"),
    "no record": (lambda run: (run / "record.json").unlink(), "record.json: missing"),
    "record is no JSON": (lambda run: (run / "record.json").write_text("{"), "record.json: not a JSON file"),
    "record is a list": (lambda run: (run / "record.json").write_text("[1]"), "record.json: expected an object"),
    "record nests too deep": (
        lambda run: (run / "record.json").write_text("[" * 10**5),
        "record.json: not a JSON file",
    ),
    "record without settings": (
        edit_record(lambda r: r.pop("settings")),
        "record.json: settings: expected an object, got nothing",
    ),
    "record without scores": (edit_record(lambda r: r.pop("oof")), "record.json: oof: expected an object"),
    "fold is a path": (
        edit_record(lambda r: r["folds"][0].update(fold="../../etc")),
        "record.json: folds[0].fold: expected a whole",
    ),
    "fold that is not there": (edit_record(lambda r: r["folds"][0].update(fold=7)), "fold7/model.safetensors: missing"),
    "unknown setting": (edit_record(lambda r: r["settings"].update(evil=1)), "there is no setting 'evil'"),
    "setting out of bounds": (
        edit_record(lambda r: r["settings"].update(max_length=0)),
        "max_length must be at least 8",
    ),
    "head of a cell": (
        edit_record(lambda r: r["settings"].update(head="median")),
        "head 'median' was defined in a notebook",
    ),
    "loss of a cell": (
        edit_record(lambda r: r["resolved"].update(loss="mine")),
        "loss 'mine' was defined in a notebook cell",
    ),
    "preprocess of a cell": (
        edit_record(lambda r: r["settings"].update(preprocess="clean")),
        "preprocess 'clean' was defined in a notebook cell; put it into",
    ),
    "no golden rows": (lambda run: (run / "golden.json").unlink(), "golden.json: missing"),
    "golden rows are no JSON": (lambda run: (run / "golden.json").write_text("no"), "golden.json: not a JSON file"),
    "no tokenizer": (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer/tokenizer_config.json: missing"),
    "no vocabulary": (
        lambda run: (run / "tokenizer/tokenizer.json").unlink(),
        "tokenizer: no vocabulary; expected one of tokenizer.json",
    ),
    "empty vocabulary": (
        lambda run: (run / "tokenizer/tokenizer.json").write_text(""),
        "tokenizer/tokenizer.json: empty",
    ),
    "no tokenizer config": (
        lambda run: (run / "tokenizer/tokenizer_config.json").unlink(),
        "tokenizer/tokenizer_config.json: missing",
    ),
    "no weights": (lambda run: (run / "fold1/model.safetensors").unlink(), "fold1/model.safetensors: missing"),
    "empty weights": (lambda run: (run / "fold1/model.safetensors").write_bytes(b""), "fold1/model.safetensors: empty"),
    "cut weights": (
        lambda run: DAMAGE["truncated"](run / "fold0/model.safetensors"),
        "fold0/model.safetensors: not a sound",
    ),
    "a pickle as weights": (
        lambda run: torch.save({}, run / "fold0/model.safetensors"),
        "fold0/model.safetensors: not a sound safetensors file",
    ),
    "NaN weights": (
        spoil_weights(float("nan")),
        "fold1/model.safetensors: values that are not finite in output.weight",
    ),
    "infinite weights": (spoil_weights(float("-inf")), "fold1/model.safetensors: values that are not finite"),
    "weights of another run": (spoil_weights(9.0), "one, fold 1, id"),
    "a tensor too few": (
        lambda run: save_file({"output.bias": torch.zeros(1)}, run / "fold0/model.safetensors"),
        "one: does not predict what training predicted",
    ),
    "linked weights": (
        lambda run: replace_by_link(run / "fold0/model.safetensors"),
        "model.safetensors: a symbolic link",
    ),
    "linked record": (lambda run: replace_by_link(run / "record.json"), "record.json: a symbolic link"),
    "linked fold": (lambda run: replace_by_link(run / "fold0"), "one/fold0: a symbolic link"),
    "linked tokenizer": (lambda run: replace_by_link(run / "tokenizer"), "one/tokenizer: a symbolic link"),
    "a link that nobody reads": (lambda run: (run / "notes").symlink_to("gone"), "one/notes: a symbolic link"),
    "a pipe as weights": (
        lambda run: replace_by_fifo(run / "fold0/model.safetensors"),
        "model.safetensors: a pipe or a device",
    ),
    "no folds": (edit_record(lambda r: r.update(folds=[])), "one: the run did not finish"),
    "golden rows of no fold": (
        lambda run: edit(run / "golden.json", lambda g: g.update(rows=[r for r in g["rows"] if r["fold"]])),
        "one: golden rows: expected some of every fold: 0, 1",
    ),
    "golden rows without texts": (
        lambda run: edit(run / "golden.json", lambda g: [r.pop("cells") for r in g["rows"]]),
        "one: golden rows: rows[0].cells: expected an object, got nothing",
    ),
    "a hidden file": (lambda run: (run / "tokenizer/.env").write_text("KEY=1"), "tokenizer/.env: expected .json"),
    "an archive": (lambda run: (run / "tokenizer/vocab.zip").write_text("x"), "tokenizer/vocab.zip: expected"),
    "an ampersand": (lambda run: (run / "tokenizer/a&b.txt").write_text("x"), "one.a&b.txt"),
    "case collision": (
        lambda run: [(run / "tokenizer" / name).write_text("x") for name in ("a.txt", "A.txt")],
        "one.A.txt",
    ),
    "two files of one name": (
        lambda run: (run / "tokenizer/record.json").write_text("{}"),
        "one.record.json: two files",
    ),
    "code of one's own": (
        lambda run: (run / "tokenizer/tokenization_x.py").write_text("1"),
        "tokenization_x.py: expected .json",
    ),
    "a pickle": (
        lambda run: (run / "tokenizer/training_args.bin").write_text("x"),
        "training_args.bin: expected .json",
    ),
    "configs that differ": (
        lambda run: edit(run / "fold1/config.json", lambda c: c.update(layer_norm_eps=0.1)),
        "fold1/config.json: expected the content of fold0/config.json",
    ),
    "auto_map": (
        config_key("auto_map", {"AutoModel": "x.Y"}),
        "config.json: auto_map could make transformers run code",
    ),
    "auto_map of the tokenizer": (
        config_key("auto_map", name="tokenizer/tokenizer_config.json"),
        "tokenizer_config.json: auto_map",
    ),
    "internal attention": (config_key("_attn_implementation_internal", "evil/kernel"), "_attn_implementation_internal"),
    "internal experts": (config_key("_experts_implementation_internal", "evil/x"), "_experts_implementation_internal"),
    "attention from the hub": (config_key("attn_implementation", "evil/kernel"), "attn_implementation could"),
    "auto_map below": (config_key("text_config", {"auto_map": {}}), "auto_map could make transformers run code"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_spoilt_run_is_refused_by_name_and_nothing_is_written(case, one, refused, tmp_path):
    spoil, message = HOSTILE[case]
    spoil(one)
    said = refused(one, "-o", tmp_path / "dist", *NAMES)
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "dist").exists() and not list(tmp_path.glob(".bundle*"))


def test_weights_too_large_for_fp16_are_refused_with_half_alone(one, refused, call, tmp_path):
    def large(tensors):
        tensors["backbone.embeddings.word_embeddings.weight"][0, 0] = 1e5  # the pad token's, which no text has
        return tensors

    save_file(large(load_file(one / "fold0/model.safetensors")), one / "fold0/model.safetensors")
    assert "fold0/model.safetensors: values that are not finite in fp16" in refused(
        one, "-o", tmp_path / "dist", *NAMES, "--half"
    )
    call(one, "-o", tmp_path / "dist", *NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_infinite_weight_is_found_in_every_precision(dtype, tmp_path):
    save_file({"a": torch.tensor([1.0, torch.inf], dtype=dtype), "b": torch.tensor([1])}, tmp_path / "w")
    assert bundle.weight_problems(tmp_path / "w") == [f"{tmp_path / 'w'}: values that are not finite in a"]
    save_file({"a": torch.tensor([1.0, -6e4], dtype=dtype)}, tmp_path / "w")
    assert bundle.weight_problems(tmp_path / "w", half=True) == []


def test_all_problems_come_in_one_message(one, refused, tmp_path):
    spoil_weights(float("nan"))(one)
    (one / "golden.json").write_text("[]")
    names = ["--id", "me/x_y", "--title", "Too", "--license", "MIT"]
    message = refused(
        one, "-o", tmp_path / "dist", *names, "--kernels", tmp_path / "k", "--report", tmp_path / "no.ipynb"
    )
    for part in (
        "id",
        "title",
        "license",
        "golden.json",
        "not finite",
        "--competition",
        "no.ipynb: expected an executed notebook",
    ):
        assert part in message, part
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give runs, or --starter"),
        (["run", "--starter"], "give runs, or --starter"),
        (["run", "--backbone", "x"], "--backbone goes with --starter"),
        (["run", "-o", "x"], "--id and --title must be given"),
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_code_2(arguments, message, call, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_runs_that_predict_other_things_are_not_packed_together(runs, one, refused, tmp_path):
    edit(one / "record.json", lambda r: r["settings"].update(target_columns=["other"]))
    one.rename(tmp_path / "three")
    message = refused(runs / "two", tmp_path / "three", "-o", tmp_path / "dist", *NAMES)
    assert "three: target_columns must be as in" in message and "got ['other']" in message


def test_a_run_that_a_t4_could_not_predict_with_in_float16_is_warned_of(one, call, tmp_path):
    assert "warning" not in call(one, "-o", tmp_path / "sound", *NAMES)
    for fold in (0, 1):  # a unit of the backbone beyond what float16 holds, which the head does not see
        path = one / f"fold{fold}" / "model.safetensors"
        tensors = load_file(path)
        tensors["backbone.encoder.layer.0.intermediate.dense.bias"][0] = 1e5
        tensors["backbone.encoder.layer.0.output.dense.weight"][:, 0] = 0
        save_file(tensors, path)
    golden = ku._Run.load(one)
    (predictions,) = golden.predict_golden(*golden.open(), ["fp32"]).values()
    rows = zip(golden.golden["rows"], predictions.tolist(), strict=True)
    rows = [row | {"prediction": prediction} for row, prediction in rows]
    (one / "golden.json").write_text(json.dumps(golden.golden | {"rows": rows}))
    assert "warning: a T4 will refuse one, train it with precision fp32" in call(one, "-o", tmp_path / "dist", *NAMES)


def test_a_run_that_is_given_twice_is_refused(runs, refused, tmp_path):
    assert "one: given twice" in refused(runs / "one", runs / "one", "-o", tmp_path / "dist", *NAMES)


def test_the_parts_of_a_notebook_cell_are_named_with_kernels_too(one, refused, tmp_path):
    HOSTILE["head of a cell"][0](one)
    arguments = ["-o", tmp_path / "dist", *NAMES, "--kernels", tmp_path / "k", "--competition", "commonlit"]
    assert "head 'median' was defined in a notebook cell; put it into" in refused(one, *arguments)


def test_two_runs_of_one_name_are_not_packed_together(runs, one, refused, tmp_path):
    said = refused(runs / "one", one, "-o", tmp_path / "dist", *NAMES)
    assert said == f"nothing was written:\n  {one}: two runs are called one; rename one folder"


# ---------------------------------------------------------------------------------------
# Hostile bundles: sealed by whoever made them, so that only what they say is wrong


def rename_in_manifest(old, new):
    def change(manifest):
        manifest["files"][new] = manifest["files"].pop(old)

    return change


MANIFESTS = {
    "another format": (lambda m: m.update(format="kernel_utils bundle 9"), "format: expected text like"),
    "a file outside": (
        lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": "0"}}),
        "files.../secret: expected the name of a file",
    ),
    "an absolute file": (
        lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0"}}),
        "files./etc/passwd: expected the name of a file",
    ),
    "a file in a folder": (
        lambda m: m["files"].update({"a/b": {"bytes": 1, "sha256": "0"}}),
        "a/b: expected the name of a file",
    ),
    "the folder itself": (
        lambda m: m["files"].update({".": {"bytes": 1, "sha256": "0"}}),
        "files..: expected the name of a file",
    ),
    "a record outside": (
        lambda m: m["runs"]["one"].update(record="../one.json"),
        "runs.one.record: expected the name of a file",
    ),
    "weights outside": (
        lambda m: m["runs"]["one"]["weights"].update({"0": "/tmp/w"}),
        "runs.one.weights.0: expected the name of a file",
    ),
    "a tokenizer file outside": (
        lambda m: m["runs"]["one"]["tokenizer"].update({"../../x": "one.tokenizer.json"}),
        "expected the name of a file, got '../../x'",
    ),
    "no module": (lambda m: m["files"].pop("kernel_utils.py"), "kernel_utils.py"),
    "files are a list": (lambda m: m.update(files=[]), "manifest.json"),
    "no runs": (lambda m: m.pop("runs"), "manifest.json"),
    "a run is a text": (lambda m: m["runs"].update(one="x"), "manifest.json"),
    "no dataset": (lambda m: m.pop("dataset"), "dataset: expected an object, got nothing"),
    "no golden rows": (
        lambda m: m["runs"]["one"]["golden"].update(rows=[]),
        "golden rows: rows: expected a list of one or more",
    ),
    "nothing golden": (lambda m: m["runs"]["one"].pop("golden"), "runs.one.golden: expected an object, got nothing"),
    "a size is missing": (lambda m: m["files"]["kernel_utils.py"].pop("bytes"), "manifest.json"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(case, copy, refused):
    change, message = MANIFESTS[case]
    reseal(copy, change)
    with pytest.raises(ku.KitError) as error:
        ku.load_bundle(copy)
    assert message in str(error.value)
    assert message in refused("--check", copy)


# ---------------------------------------------------------------------------------------
# Starter, kernels, report, wheels

MODULES = ("kernel_utils.py", "pretraining.py", "comparison.py", "blending.py", "openvino_engine.py")


def test_a_starter_is_a_backbone_that_training_finds_by_the_slug(call, backbone_folder, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path / "kaggle"))
    mount = tmp_path / "kaggle" / "input" / "datasets" / "me" / "my-bundle"
    mount.parent.mkdir(parents=True)
    call("--starter", "--backbone", backbone_folder("tiny"), "-o", mount, *NAMES)
    assert {*MODULES, "config.json", "model.safetensors", "tokenizer.json"} <= set(contents(mount))
    assert ku._find_backbone("my-bundle") == mount
    trained(tiny_config(runs.parent / "competition", "my-bundle", tmp_path / "runs", run_folds="0"))
    with pytest.raises(ku.ConfigError, match="there are 0 bundles"):
        ku.load_bundle()
    assert "my-bundle: sound" in call("--check", mount)


def test_a_starter_takes_a_backbone_by_name_and_leaves_what_is_not_needed(call, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path / "none"))
    call("--starter", "--backbone", "all-MiniLM-L6-v2", "-o", tmp_path / "dist", *NAMES)
    names = set(contents(tmp_path / "dist"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= names
    assert not {"README.md", "modules.json"} & names


def test_a_starter_without_a_backbone_is_the_five_modules(call, tmp_path):
    call("--starter", "-o", tmp_path / "dist", *NAMES)
    assert set(contents(tmp_path / "dist")) == {*MODULES, "manifest.json", "dataset-metadata.json"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "no *.safetensors; pickles",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no vocabulary; expected one of tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 9), "model.safetensors: not a sound"),
        (lambda folder: edit(folder / "config.json", lambda c: c.update(auto_map={})), "config.json: auto_map could"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-2.safetensors"}}'
            ),
            "model-2.safetensors: missing, though model.safetensors.index.json names it",
        ),
    ],
)
def test_a_backbone_that_kaggle_could_not_load_is_refused(spoil, message, backbone_folder, refused, tmp_path):
    folder = Path(shutil.copytree(backbone_folder("tiny"), tmp_path / "backbone"))
    spoil(folder)
    assert message in refused("--starter", "--backbone", folder, "-o", tmp_path / "dist", *NAMES)


def test_a_backbone_in_a_cache_of_a_hub_is_packed_through_its_links_and_no_link_leads_out(
    call, refused, backbone_folder, tmp_path
):
    snapshot, blobs = tmp_path / "models--me--tiny/snapshots/1", tmp_path / "models--me--tiny/blobs"
    shutil.copytree(backbone_folder("tiny"), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    target = tmp_path / "dist"
    call("--starter", "--backbone", snapshot, "-o", target, *NAMES)
    assert not (target / "config.json").is_symlink()
    assert (target / "model.safetensors").read_bytes() == (blobs / "model.safetensors").read_bytes()

    keys = tmp_path / "keys.json"
    shutil.copyfile(blobs / "config.json", keys)
    (blobs / "config.json").unlink()
    (blobs / "config.json").symlink_to(keys)  # two links on the way
    command = ["-o", tmp_path / "other", *NAMES, "--starter", "--backbone"]
    assert f"{snapshot}/config.json: a symbolic link" in refused(*command, snapshot)
    plain = Path(shutil.copytree(backbone_folder("tiny"), tmp_path / "plain"))
    replace_by_link(plain / "tokenizer.json")
    (tmp_path / "link").symlink_to(plain)
    said = refused(*command, tmp_path / "link")
    assert "tokenizer.json: a symbolic link" in said and "config.json" not in said
    assert not (tmp_path / "other").exists()


def test_a_linked_blend_is_refused_by_name(runs, refused, tmp_path):
    (tmp_path / "aside.json").write_text("{}")
    (tmp_path / "blend.json").symlink_to("aside.json")
    command = [runs / "one", "-o", tmp_path / "dist", *NAMES, "--blend", tmp_path / "blend.json"]
    assert "blend.json: a symbolic link" in refused(*command)


def settings_of(notebook):
    cell = next(cell for cell in nbformat.read(notebook, 4).cells if cell.metadata.get("tags") == ["parameters"])
    scope = {}
    exec(cell.source, scope)
    return {name: value for name, value in scope.items() if not name.startswith("__")}


def test_kernels_are_ready_to_push_with_internet_off_and_the_settings_of_the_run(call, runs, tmp_path):
    target, competition = tmp_path / "the bundle's", ["--competition", "commonlit"]
    kernels = ["--kernels", tmp_path / "kernels", *competition, *MODEL]
    printed = call(runs / "one", "-o", target, *NAMES, *kernels)
    lines = [line for line in printed.splitlines() if line.startswith("  kaggle ")]
    commands = [shlex.split(line, comments=True) for line in lines]
    uploads = [command[4] for command in commands if command[3:4] == ["-p"]]
    assert uploads == [str(target)] * 2 + [str(tmp_path / "kernels" / "infer")]
    submit = "kaggle competitions submit commonlit -k me/my-bundle-infer -f submission.csv -v 1 -m"
    assert commands[-1] == [*submit.split(), "a note"]
    infer, train = (
        json.loads((tmp_path / "kernels" / k / "kernel-metadata.json").read_text()) for k in ("infer", "train")
    )
    assert (
        infer["enable_internet"] is False and infer["machine_shape"] == "NvidiaTeslaT4" and infer["is_private"] is True
    )
    assert (infer["dataset_sources"], infer["competition_sources"]) == (["me/my-bundle"], ["commonlit"])
    assert infer["id"] == "me/my-bundle-infer" and infer["model_sources"] == []
    assert train["enable_internet"] is False and train["model_sources"] == ["google/bert/transformers/tiny/1"]
    settings = settings_of(tmp_path / "kernels" / "train" / "train.ipynb")
    assert settings["backbone"] == "bert" and settings["head"] == "conv1d" and settings["max_length"] == 32
    assert (settings["data_dir"], settings["output_dir"], settings["run_name"]) == ("", "runs", "")
    assert ku.InferConfig.from_dict(settings_of(tmp_path / "kernels" / "infer" / "infer.ipynb")) == ku.InferConfig()


def test_a_setting_that_the_cell_lacks_becomes_a_line_and_a_text_with_quotes_stays_whole():
    notebook = bundle.notebook_with(
        "train", {"head": "gem", "template": 'it\'s "{genre}"  # {excerpt}', "conv_kernels": (3, 3)}
    )
    scope = {}
    exec(notebook.cells[2].source, scope)
    assert (scope["head"], scope["template"], scope["conv_kernels"]) == ("gem", 'it\'s "{genre}"  # {excerpt}', (3, 3))
    assert "\nhead: str = 'gem'  # " in notebook.cells[2].source


def test_a_train_kernel_without_its_backbone_is_refused(refused, runs, tmp_path):
    arguments = ["-o", tmp_path / "dist", *NAMES, "--kernels", tmp_path / "kernels", "--competition", "commonlit"]
    assert "is in no hub; attach it with --model-source" in refused(runs / "one", *arguments)
    assert "--model-source [0] must be owner/model" in refused(runs / "one", *arguments, "--model-source", "bert")
    assert not (tmp_path / "dist").exists() and not (tmp_path / "kernels").exists()


def test_an_ensemble_gets_a_train_kernel_for_each_run_with_the_source_of_its_name_and_a_starter_one(
    call, refused, runs, one, backbone_folder, tmp_path
):
    edit(one / "record.json", lambda r: r["settings"].update(backbone="microsoft/DeBERTa_v3-base"))
    one.rename(tmp_path / "deberta")
    backbone = backbone_folder("tiny").name
    sources = [f"me/{backbone}/transformers/tiny/1", "microsoft/deberta-v3-base/pytorch/default/2"]
    more = ["--competition", "commonlit", "--kernels", tmp_path / "kernels"]
    both = [runs / "two", tmp_path / "deberta", "-o", tmp_path / "a", *NAMES, *more]
    assert "0 of the --model-source have the name of its backbone" in refused(*both, "--model-source", sources[0])
    call(*both, "--model-source", sources[1], "--model-source", sources[0])
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == {"infer", "train-1", "train-2"}
    for name, source in zip(("train-1", "train-2"), sources, strict=True):
        metadata = json.loads((tmp_path / "kernels" / name / "kernel-metadata.json").read_text())
        assert metadata["model_sources"] == [source] and metadata["enable_internet"] is False
        assert settings_of(tmp_path / "kernels" / name / f"{name}.ipynb")["backbone"] == source.split("/")[1]
    assert settings_of(tmp_path / "kernels/train-1/train-1.ipynb")["seed"] == 1
    call("--starter", "--backbone", backbone_folder("tiny"), "-o", tmp_path / "b", *NAMES, *more)
    metadata = json.loads((tmp_path / "kernels/train/kernel-metadata.json").read_text())
    assert metadata["enable_internet"] is False
    assert settings_of(tmp_path / "kernels/train/train.ipynb")["backbone"] == "my-bundle"


def test_a_run_on_a_hub_backbone_trains_again_with_the_internet(call, one, tmp_path):
    edit(one / "record.json", lambda r: r["settings"].update(backbone="google-bert/bert-base-cased"))
    call(one, "-o", tmp_path / "dist", *NAMES, "--competition", "commonlit", "--kernels", tmp_path / "kernels")
    for name, internet in (("infer", False), ("train", True)):
        metadata = json.loads((tmp_path / "kernels" / name / "kernel-metadata.json").read_text())
        assert metadata["enable_internet"] is internet


def test_the_report_opens_without_internet_and_holds_its_images(call, runs, tmp_path):
    image = nbformat.v4.new_output("display_data", {"image/png": "aVZCT1J3MEtHZ28="})
    cells = [nbformat.v4.new_markdown_cell("# Report $x^2$"), nbformat.v4.new_code_cell("1", outputs=[image])]
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": widgets}), tmp_path / "out.ipynb")
    call(runs / "one", "-o", tmp_path / "dist", *NAMES, "--report", tmp_path / "out.ipynb")
    page = (tmp_path / "dist.html").read_text()
    assert "aVZCT1J3MEtHZ28=" in page and "Report" in page
    loads = re.findall(
        r"""(?:src|href)\s*=\s*["'](?:https?:)?//[^"']+|import[^;]*["']https?://[^"']+|url\(["']?https?://""", page
    )
    assert loads == [] and not re.search("unpkg|cdnjs|jsdelivr|googleapis", page)


def wheel(folder, version, tag):
    """The smallest wheel that pip takes, of the package rarepackage."""
    info = f"rarepackage-{version}.dist-info"
    with zipfile.ZipFile(folder / f"rarepackage-{version}-{tag}.whl", "w") as file:
        file.writestr("rarepackage.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: rarepackage\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """pip finds these wheels and nothing else; 1.2 is the newest that fits Kaggle's image."""
    (tmp_path / "wheels").mkdir()
    for version, tag in (
        ("1.0", "py3-none-any"),
        ("1.1", "cp312-cp312-manylinux2014_x86_64"),
        ("1.2", "py3-none-manylinux_2_24_x86_64"),
        ("1.3", "cp313-cp313-manylinux2014_x86_64"),
        ("1.4", "py3-none-macosx_11_0_arm64"),
        ("1.5", "py3-none-manylinux_2_39_x86_64"),
    ):
        wheel(tmp_path / "wheels", version, tag)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


def test_wheels_that_are_named_are_packed_with_the_line_that_installs_them(call, runs, wheels, tmp_path):
    more = ["--kernels", tmp_path / "k", "--competition", "commonlit", *MODEL]
    out = call(runs / "two", "-o", tmp_path / "dist", *NAMES, *more, "--wheels", "rarepackage")
    assert bundle.INSTALL in out
    manifest = json.loads((tmp_path / "dist" / "manifest.json").read_text())
    assert manifest["wheels"] == ["rarepackage-1.2-py3-none-manylinux_2_24_x86_64.whl"]
    assert manifest["wheels"][0] in manifest["files"]
    assert "sound" in call("--check", tmp_path / "dist")
    for name in ("infer", "train"):
        notebook = nbformat.read(tmp_path / "k" / name / f"{name}.ipynb", 4)
        cells = [cell.source for cell in notebook.cells]
        position = cells.index(manifest["install"])
        assert cells[position - 1].startswith("# Settings")
        assert "kernel_utils" in "".join(cells[position + 1 :])


@pytest.mark.parametrize("mount", ["my-bundle", "d/me/my-bundle", "datasets/me/my-bundle"])
def test_the_line_installs_wheels_from_any_mount_point_of_a_dataset_once(mount, tmp_path, monkeypatch):
    for folder in (mount, "datasets/me/same"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rarepackage-1.0-py3-none-any.whl").touch()
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(bundle.INSTALL.replace("/kaggle/input", str(tmp_path)), {})
    ((python, *words, path),) = commands
    assert python == sys.executable
    assert words == "-m pip install --no-index --no-deps".split()
    assert Path(path).is_file() and path.endswith("rarepackage-1.0-py3-none-any.whl")


def test_wheels_that_cannot_be_had_are_said(refused, runs, wheels, tmp_path):
    arguments = ["--starter", "-o", tmp_path / "dist", *NAMES, "--wheels"]
    assert "no wheels of rarepackage==7: ERROR: No matching" in refused(*arguments, "rarepackage==7")
    said = refused(*arguments, "rarepackage", runs / "one")
    assert f"--wheels {runs / 'one'}: expected packages as name or name==version" in said
    assert not (tmp_path / "dist").exists()


# Packages of Kaggle's GPU image (as of August 2026) that the module may import
IMAGE = "IPython matplotlib numpy pandas peft psutil requests safetensors scipy sentencepiece sklearn tokenizers torch"
IMAGE += " tqdm transformers triton wandb huggingface_hub accelerate"


def test_the_module_imports_nothing_that_the_image_of_kaggle_lacks():
    nodes = list(ast.walk(ast.parse((ROOT / "kernel_utils" / "kernel_utils.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert {"torch", "transformers"} <= packages
    assert packages - {*IMAGE.split()} <= {"bitsandbytes"}  # the optimiser adamw8bit asks for it


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("kaggle", path=os.path.dirname(sys.executable)), reason="needs the client: pip install kaggle six"
)
def test_push_uploads_a_bundle_with_its_infer_kernel_and_a_starter_with_its_train_kernel(
    runs, backbone_folder, tmp_path
):
    (tmp_path / "home").mkdir()
    more = ["--competition", "commonlitreadabilityprize", "--push"]
    model = ["--model-source", "google/bert/transformers/tiny/1"]
    kit = ["--starter", "--backbone", backbone_folder("tiny"), "--id", "me/my-kit", "--title", "My kit"]
    with FakeKaggle() as kaggle:

        def call(target, *arguments):
            command = [sys.executable, bundle.__file__, "-o", tmp_path / target, *arguments, *more]
            command += ["--kernels", tmp_path / f"{target}-kernels"]
            env = kaggle.client_env(tmp_path / "home")
            return subprocess.run(command, env=env, capture_output=True, text=True)

        for done in (
            call("kit", *kit),
            call("dist", runs / "one", *NAMES, *model),
            call("dist", runs / "two", *NAMES, *model),
        ):
            assert done.returncode == 0, done.stderr
        assert "me/my-bundle version 2: 8 files" in done.stdout and "all there" in done.stdout
        uploaded = {name: data for name, data in contents(tmp_path / "dist").items() if name != "dataset-metadata.json"}
        assert kaggle.datasets["me/my-bundle"][-1] == uploaded and len(kaggle.datasets["me/my-kit"]) == 1
        assert kaggle.kernels.keys() == {"me/my-kit-train", "me/my-bundle-infer"} and kaggle.count("FOREIGN") == 0
        sent = kaggle.kernels["me/my-bundle-infer"][-1]
        assert sent["enableInternet"] is False and sent["datasetDataSources"] == ["me/my-bundle"]
        kaggle.fail("PUT", "ignored", name="two.fold1")
        done = call("dist", runs / "two", *NAMES, *model)
        assert done.returncode == 1 and "two.fold1.safetensors" in done.stderr
        assert len(kaggle.kernels["me/my-bundle-infer"]) == 2
