"""Every file of a stranger's folder, damaged or made to harm, is refused in one message or does no harm."""

import csv
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import blending
import bundle
import comparison
import kernel_utils as ku
import pandas as pd
import pretraining
import pseudo_label
import pytest
from safetensors.torch import load_file, save_file

from conftest import ROOT, Forked, Killed, kill, make_texts, save_backbone, tiny_config, trained
from conftest import BERT_LIKE, make_pieces, save_competition, transformers
from test_hostile import infer, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
PAGE = ROOT / "docs" / "development.md"
SECONDS, BYTES = int(os.environ.get('ATT_SECONDS', 60)), 2 * 2**30  # what one command may take more than it does of a sound folder
NAMES = ["--id", "me/my-bundle", "--title", "My bundle"]
STEP = "checkpoints/fold1-step2"

# ---------------------------------------------------------------------------------------
# Sound folders, and others of the same kind


def command(tool, *words):
    """Call the main function of a tool with a command line."""
    sys.argv = [f"{tool.__name__}.py", *map(str, words)]
    tool.main()


def tuned(place, backbone, run_name, **settings):
    """A quick run on the competition of `place`."""
    output = settings.pop("output_dir", place / "out")
    return trained(tiny_config(place / "competition", backbone, output, run_name=run_name, **settings))


def pretrained(place, backbone, run_name="p", **settings):
    base = dict(data_dir=place / "competition", backbone=backbone, output_dir=place / "out", run_name=run_name)
    base |= dict(max_length=16, epochs=2, batch_size=16, held_out=0.2)
    return pretraining.pretrain(pretraining.PretrainConfig.from_dict(base | settings))


def killed_in(function, *arguments, step, owner, **settings):
    """What a run leaves that is killed before a step, with a checkpoint after each step before."""
    real, count = vars(owner)["step" if owner is pretraining._Pretraining else "__call__"], iter(range(1, 10**6))
    name = real.__name__

    def counting(*words):
        if next(count) == step:
            kill()
        return real(*words)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ku, "_MAX_SAVE_FRACTION", math.inf)
        patch.setattr(owner, name, counting)
        function(*arguments, checkpoint_minutes=1e-9, **settings)


def split_weights(backbone, folder):
    """A copy of a backbone whose weights are in two files and an index."""
    shutil.copytree(backbone, folder)
    tensors = load_file(folder / "model.safetensors")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_folders(place, seed):
    """A folder of each kind in `place`; other ones with another seed."""
    save_competition(place / "competition")
    raw = save_backbone("tiny", place / "raw")
    make_pieces().save_pretrained(raw)
    pretrained(place, raw, seed=seed).rename(place / "backbone")
    split_weights(place / "backbone", place / "sharded")
    killed_in(pretrained, place, raw, step=4, owner=pretraining._Pretraining, seed=seed)
    (place / "out/p").rename(place / "pretraining")
    backbone = place / "backbone"
    killed_in(tuned, place, backbone, "unfinished", step=6, owner=ku.OptimizerStep, seed=seed)
    (place / "out/unfinished").rename(place / "unfinished")
    for number, name in enumerate(("one", "two")):
        tuned(place, raw, name, seed=seed + number, output_dir=place / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        (place / "blend").mkdir()
        blend(place)
        runs = (place / "runs/one", place / "runs/two")
        command(bundle, *runs, "-o", place / "bundle", *NAMES, "--blend", place / "blend/blend.json")
        texts = pd.DataFrame({"id": range(12), "excerpt": make_texts(12, seed=5 + seed)})
        texts.to_csv(place / "extra.csv", index=False)
        command(pseudo_label, *runs, "--texts", place / "extra.csv", "-o", place / "pseudo")


def blend(place):
    inputs = blending.align_members(comparison.read_records(place / "runs"))
    blending.write_blend(inputs, blending.fit_blends(inputs, "mean")[0], place / "blend")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function: seed -> what `make_folders` makes, once."""
    folders = {}

    def make(seed):
        if seed not in folders:
            folders[seed] = tmp_path_factory.mktemp(f"made{seed}")
            make_folders(folders[seed], seed)
        return folders[seed]

    return make



# ---------------------------------------------------------------------------------------
# The commands that read a folder: function(place) -> what must come out as from sound folders


def content_of(*paths):
    return {path.name: path.read_bytes().hex() for path in paths}


def go_on(place, **settings):
    run = tuned(place, place / "backbone", "unfinished", output_dir=place, **settings)
    return content_of(*(run / name for name in ("oof.csv", "golden.json", "submission.csv", "fold0/model.safetensors")))


def copy(place):
    run = tuned(place, place / "backbone", "unfinished", resume_from=str(place / "unfinished"))
    return content_of(run / "oof.csv", run / "golden.json", run / "submission.csv")


def again(place):
    run = tuned(place, place / "backbone", "one", output_dir=place / "runs")
    return content_of(run / "submission.csv")


def predict(place, folder):
    output = place / "out"
    infer(dict(bundle_dir=str(place / folder), data_dir=str(place / "competition"), output_dir=str(output)))
    return content_of(output / "submission.csv")


def pack(place, *options):
    command(bundle, place / "runs/one", place / "runs/two", "-o", place / "out/bundle", *NAMES, *options)


def label(place):
    runs = place / "runs/one", place / "runs/two"
    command(pseudo_label, *runs, "--texts", place / "extra.csv", "-o", place / "out/pseudo")


def compare(place):
    runs = comparison.align_runs(comparison.read_records(place / "runs"))
    comparison.compare_runs(runs)
    comparison.run_scores(runs)


def study(place):
    run = tuned(place, place / "backbone", "student", pseudo_dir=str(place / "pseudo"))
    return content_of(run / "oof.csv")


def tune(place, folder="backbone"):
    run = tuned(place, place / folder, "tuned", run_folds="0")
    return content_of(run / "oof.csv")


def starter(place, folder="backbone"):
    command(bundle, "--starter", "--backbone", place / folder, "-o", place / "out/starter", *NAMES)


def pretrain_more(place):
    return content_of(pretrained(place, place / "backbone") / "model.safetensors")


def pretrain_on(place):
    run = pretrained(place, place / "raw", "pretraining", output_dir=place)
    return content_of(run / "model.safetensors")


def named(function, *words):
    def call(place):
        return function(place, *words)

    call.__name__ = function.__name__
    return call


COMMANDS = {  # folder -> those that read it
    "unfinished": [go_on, copy],
    "runs/one": [named(predict, "runs/one"), pack, label, compare, again],
    "bundle": [named(predict, "bundle"), named(lambda place: command(bundle, "--check", place / "bundle"))],
    "blend": [named(pack, "--blend", "blend/blend.json")],
    "pseudo": [study],
    "backbone": [tune, starter, pretrain_more],
    "sharded": [named(tune, "sharded"), named(starter, "sharded")],
    "pretraining": [pretrain_on],
}
FILES = {  # folder -> its files, or those that a command writes there
    "unfinished": [
        "record.json",
        "log.jsonl",
        ".lock",
        ".record.json.tmp",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        *(f"fold0/{name}" for name in ("manifest.json", "state.json", "state.safetensors")),
        *(f"fold0/{name}" for name in ("model.safetensors", "config.json")),
        *(f"{STEP}/{name}" for name in ("manifest.json", "state.json", "state.safetensors")),
    ],
    "runs/one": [
        *("record.json", "golden.json", "oof.csv", "log.jsonl", "submission.csv", "curves.png", "oof.png"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *(f"fold0/{name}" for name in ("manifest.json", "state.json", "state.safetensors")),
        *(f"fold0/{name}" for name in ("model.safetensors", "config.json")),
    ],
    "bundle": [
        *("manifest.json", "dataset-metadata.json", "kernel_utils.py", "blend.json"),
        *("one.record.json", "one.config.json", "one.fold0.safetensors"),
        *("one.tokenizer.json", "one.tokenizer_config.json"),
    ],
    "blend": ["blend.json"],
    "pseudo": ["manifest.json", "pseudo.json", "pseudo.csv", "rows.csv"],
    "backbone": ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "pretrain.json"],
    "sharded": ["model.safetensors.index.json", "model-0.safetensors"],
    "pretraining": [
        *("pretrain.json", ".lock", "config.json", "model.safetensors", "tokenizer.json"),
        *(f"checkpoints/fold0-step3/{name}" for name in ("manifest.json", "state.json", "state.safetensors")),
    ],
}


# ---------------------------------------------------------------------------------------
# Attacks: column of the table -> {variant: function(path, same file of another folder, folder outside)}


def move_out(path, other, outside):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.move(path, outside / "moved")
    else:
        (outside / "moved").write_text("precious")


def as_link(path, other, outside):
    move_out(path, other, outside)
    path.symlink_to(outside / "moved")


def as_hard_link(path, other, outside):
    move_out(path, other, outside)
    os.link(outside / "moved", path)


def link_to(name):
    def spoil(path, other, outside):
        path.unlink(missing_ok=True)
        path.symlink_to(outside / name)

    return spoil


def folder_as_link(path, other, outside):
    as_link(path.parent, other, outside)


def cut(share):
    return lambda path, *_: os.truncate(path, int(path.stat().st_size * share))


def instead(make):
    def spoil(path, *_):
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def by_other(path, other, outside):
    shutil.copyfile(other, path)


def write(content):
    return lambda path, *_: path.write_bytes(content)


class Mark:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def as_pickle(path, other, outside):
    path.write_bytes(pickle.dumps(Mark(outside / "RAN"), 2))


def wrong(value):
    return {"a": "b"} if isinstance(value, (str, list)) else "word" if isinstance(value, (dict, bool)) else ["x"]


def with_numbers(value, number):
    if isinstance(value, dict):
        return {key: with_numbers(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [with_numbers(item, number) for item in value]
    return number if type(value) in (int, float) else value


def with_names(value, name):
    """The content with every name, which is a key or a text without a blank, in another folder."""
    if isinstance(value, dict):
        return {key: with_names(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [with_names(item, name) for item in value]
    return f"{name}{value}" if isinstance(value, str) and " " not in value else value


def with_keys(value, name):
    return {f"{name}{key}": item for key, item in value.items()} if isinstance(value, dict) else value


def edits(path, change):
    """{key: function} that write the JSON of a file with one value changed: one of the top, or one of theirs."""
    content, spoils = json.loads(path.read_text()), {}

    def edit(*keys):
        def spoil(path, *_):
            content = part = json.loads(path.read_text())
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = change(part[keys[-1]])
            path.write_text(json.dumps(content))

        return spoil

    for key, value in content.items():
        if change(value) != value:
            spoils[key] = edit(key)
        items = value.items() if isinstance(value, dict) else enumerate(value[:1] if isinstance(value, list) else [])
        items = [] if key in ("settings", "resolved", "versions") else items
        for inner, item in items:
            if change(item) != item and isinstance(value, (dict, list)):
                spoils[f"{key}.{inner}"] = edit(key, inner)
    return spoils


def is_json(path):
    return path.suffix == ".json" and path.is_file()


def huge_length(path, *_):
    """The header of a safetensors file that claims to be as long as the disk."""
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])


def variants_of(attack, path):
    """{name: function} of an attack on a file."""
    file = {"": lambda *_: None}
    if attack == "link":
        spoils = {"to a file": as_link, "dangling": link_to("nothing"), "to a folder": link_to("folder")}
        spoils |= {"hard": as_hard_link, "of its folder": folder_as_link}
        return spoils
    if attack == "cut":
        return {"half": cut(0.5), "empty": cut(0), "missing": Path.unlink and instead(lambda path: None)}
    if attack == "replaced":
        return {"by another": by_other, "by a folder": instead(Path.mkdir), "by a FIFO": instead(os.mkfifo)}
    if attack == "huge":
        spoils = {"50 GB": lambda path, *_: os.truncate(path, 50 * 10**9)}
        if is_json(path):
            for number in (10**400, float("inf")):
                changed = edits(path, lambda value: with_numbers(value, number))
                spoils |= {f"{key} {str(number)[:4]}": spoil for key, spoil in changed.items()}
        return spoils
    if attack == "wrong type":
        spoils = {"a pickle": as_pickle, "words": write(b"words, and more words"), "bytes": write(bytes(range(256)))}
        if is_json(path):
            spoils |= {"a list": write(b"[]"), "nothing in it": write(b"{}")} | edits(path, wrong)
        return spoils
    spoils = {}
    if is_json(path):
        for name in ("../", "../../outside/", "/"):
            for what, change in (("", with_names), (" keys", with_keys)):
                changed = edits(path, lambda value: change(value, name))
                spoils |= {f"{key}{what} {name}": spoil for key, spoil in changed.items()}
    return spoils


# ---------------------------------------------------------------------------------------
# One attack on one command


def memory(pid):
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 2 else 0


def outcome_of(function, place):
    """("harmless", what comes out), ("refused", the message) or what went wrong, in a process of its own."""
    report = place / "out/report.json"

    def child():
        try:
            result = "harmless", function(place)
        except (ku.KitError, SystemExit) as error:
            result = "refused", str(error)
        except BaseException as error:
            import traceback
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if "/kernel_utils/" in f.filename or "/tools/" in f.filename]
            result = "traceback", f"{type(error).__name__}: {str(error)[:150]} in {ours[-1].name if ours else '?'}"
        report.write_text(json.dumps(result))

    with open(place / "out/printed", "w") as printed:
        process = Forked(child, cwd=place / "cwd", stdout=printed, stderr=subprocess.STDOUT)
    began, at_first = time.monotonic(), memory(process.pid)
    while process.poll() is None:
        seconds, growth = time.monotonic() - began, memory(process.pid) - at_first
        if seconds > SECONDS or growth > BYTES:
            process.kill()
            process.wait()
            return "hang" if seconds > SECONDS else "memory", f"{seconds:.0f} s, {growth / 2**30:.1f} GB"
        time.sleep(0.005)
    if not report.is_file():
        return "died", f"{process.returncode} {(place / 'out/printed').read_text()[-300:]}"
    outcome, value = json.loads(report.read_text())
    report.unlink()
    return outcome, value


def prepare(made, place):
    """Copies of the sound folders, with an empty working folder, and precious files outside."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(made(0), place)
    for name in ("out", "cwd", "outside/folder/fold1-step9"):
        (place / name).mkdir(parents=True, exist_ok=True)
    for name in ("outside/file", "outside/folder/file", "outside/folder/fold1-step9/file"):
        (place / name).write_text("precious")
    return place


def others(place, folder):
    """All of a place but what a command may change: the folder that it goes on with, and its output."""
    return {name: content for name, content in snapshot(place).items() if not name.startswith((f"{place / folder}/", f"{place}/out/"))}


@pytest.fixture(scope="module")
def sound(made, tmp_path_factory):
    """Function: command -> what comes of sound folders, once."""
    values = {}

    def result(function, folder):
        if (function, folder) not in values:
            place = prepare(made, tmp_path_factory.mktemp("sound") / "place")
            outcome, values[function, folder] = outcome_of(function, place)
            assert outcome == "harmless", values[function, folder]
        return values[function, folder]

    return result


ATTACKS = ("link", "cut", "replaced", "huge", "wrong type", "..")
CELLS = [(folder, file, attack) for folder in FILES for file in FILES[folder] for attack in ATTACKS]
CELLS = [cell for cell in CELLS if cell[2] != ".." or cell[1].endswith(".json")]
CELLS = [cell for cell in CELLS if not (cell[1] == ".record.json.tmp" and cell[2] != "link")]


def seal(place, path):
    """The manifest of a sealed folder fits its files again; False where there is none."""
    folder, manifest = path.parent, path.parent / "manifest.json"
    if path == manifest:
        content = json.loads(manifest.read_text())
    elif manifest.is_file() and path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30:
        content = json.loads(manifest.read_text())
        content["files"][path.name] = ku._describe_file(path)
    else:
        return False
    content.pop("sha256", None)
    manifest.write_bytes(ku._seal_manifest(content))
    return True


def cell_id(cell):
    return "-".join(cell)


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_an_attack_on_a_file(cell, made, sound, tmp_path):
    folder, file, attack = cell
    place, failures, outcomes = tmp_path / "place", [], set()
    for name, spoil in variants_of(attack, made(0) / folder / file).items():
        for is_sealed in (False, True):
            for function in COMMANDS[folder]:
                prepare(made, place)
                path = place / folder / file
                try:
                    spoil(path, made(1) / folder / file, place / "outside")
                except FileNotFoundError:
                    continue
                try:
                    if is_sealed and not seal(place, path):
                        continue
                except (ValueError, AttributeError, TypeError):
                    continue
                before = others(place, folder)
                outcome, value = outcome_of(function, place)
                wrongs = []
                if outcome == "harmless" and value != sound(function, folder):
                    wrongs.append("another result")
                if outcome not in ("harmless", "refused"):
                    wrongs.append(f"{outcome}: {value}")
                if outcome == "refused" and not any(w in value for w in (path.name, path.parent.name, folder)):
                    wrongs.append(f"names no file: {value}")
                after = others(place, folder)
                changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
                if changed:
                    wrongs.append(f"CHANGED {sorted(changed)[:3]}")
                outcomes.add(outcome)
                line = f"{name}{', sealed' if is_sealed else ''} | {function.__name__} | {'; '.join(wrongs) or outcome}"
                with open("/tmp/att.log", "a") as log:
                    shown = value[:250].replace("\n", " / ") if outcome == "refused" else ""
                    print(f"{'FAIL' if wrongs else 'ok'} {folder}/{file} {attack} | {line} | {shown}", file=log, flush=True)
                if wrongs:
                    failures.append(line)
    assert not failures, "\n".join(failures)
