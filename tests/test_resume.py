"""Runs that are killed, stopped or short of memory, and what becomes of them. tools/dev/stress.py really kills."""

import json
import linecache
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zlib
from pathlib import Path

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import Forked, Killed, flip, kill, little_gpu_memory, padded_mask, train_frame

NOISY = dict(epochs=3, backbone_dropout=0.1, head_dropout=0.1)  # random states matter


def start(cfg, test=None):
    train, _, _ = ku.read_competition(cfg)
    return ku.train(ku.make_folds(train, cfg), cfg, test)


def at_step(monkeypatch, number, act):
    """Call `act` before the optimiser step of this number, counted over all folds from now on."""
    step, count = ku.OptimizerStep.__call__, iter(range(1, 10**6))

    def counting(*arguments):
        if next(count) == number:
            act()
        return step(*arguments)

    monkeypatch.setattr(ku.OptimizerStep, "__call__", counting)


def content(run):
    """What must be equal in two runs, byte for byte; of the record what does not tell the time or the place."""
    record = json.loads((run / "record.json").read_text())
    files = [run / name for name in ("oof.csv", "golden.json", "log.jsonl")] + sorted(
        run.glob("fold*/model.safetensors")
    )
    return {str(path.relative_to(run)): path.read_bytes() for path in files} | {
        name: record[name] for name in ("status", "folds", "oof")
    }


@pytest.fixture
def often():
    """A checkpoint after each step."""
    return dict(checkpoint_minutes=1e-9)


@pytest.fixture(scope="module")
def whole():
    """Function: settings -> content of the uninterrupted run with them, trained once."""
    made = {}

    def run(tiny, **settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = content(start(tiny(run_name="whole", **settings)))
        return made[key]

    return run


VARIANTS = {  # each part of a run's state that is saved is in one of these
    "dropout": NOISY,
    "the best weights, padded rows": NOISY | dict(keep="best", evals_per_epoch=3, lr=0.02, attention="eager"),
    "adversarial weights and a running average in float16": NOISY
    | dict(awp=0.1, adversarial_start=1, ema=0.9, precision="fp16"),
    "noise and weights by standard error in bfloat16, small micro-batches": NOISY
    | dict(error_column="standard_error", label_noise=1.0, error_weights=True)
    | dict(precision="bf16", micro_batch_size=3),
    "a recurrent head, multi-sample dropout, decay, frozen and new layers": NOISY
    | dict(head="bilstm", rnn_size=8, dropout_samples=3, llrd=0.8)
    | dict(freeze_layers=1, reinit_layers=1, schedule="linear"),
    "static shapes": NOISY | dict(awp=0.1, adversarial_start=1, ema=0.9, micro_batch_size=3),
    "adversarial embeddings and an equal average": NOISY
    | dict(fgm=0.5, adversarial_start=0.5, swa_start=1, llrd=0.8)
    | dict(keep="best", evals_per_epoch=3),
    "two passes, mixed weights": NOISY | dict(rdrop=1.0, mixout=0.5, precision="fp16"),
    "8-bit moments": NOISY | dict(optimizer="adamw8bit"),
}


PLACES = [("dropout", step) for step in (1, 7)]  # of nine steps a fold: the first, inside
PLACES += [(variant, 14) for variant in VARIANTS]  # in the next fold


@pytest.mark.parametrize(("variant", "step"), PLACES)
def test_a_killed_run_goes_on_to_the_same_bytes(variant, step, tiny, often, whole, monkeypatch):
    settings = VARIANTS[variant]
    if variant == "static shapes":
        monkeypatch.setattr(ku.OptimizerStep, "has_static_shapes", property(lambda engine: engine.is_packed))
    if variant == "8-bit moments":
        pytest.importorskip("bitsandbytes")
    expected = whole(tiny, **settings)
    cfg = tiny(run_name="killed", **often, **settings)
    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            start(cfg)
    record = ku.RunFolder(ku.Path(cfg.output_dir) / "killed").read_record()
    saved = {1: "no fold is finished, no checkpoint is saved", 7: "fold 0 is saved up to step 6 of 9"}
    saved[14] = "fold 0 is finished, fold 1 is saved up to step 4 of 9"
    assert (record["status"], record["stopped"]) == ("stopped", f"cut off, or still running: {saved[step]}")
    random.seed(step), np.random.seed(step), torch.manual_seed(step)  # what a new process would not share
    steps = []
    with monkeypatch.context() as patch:
        at_step(patch, 0, kill)
        counting = ku.OptimizerStep.__call__
        patch.setattr(ku.OptimizerStep, "__call__", lambda *rest: steps.append(1) or counting(*rest))
        assert content(start(cfg)) == expected
    assert len(steps) == 2 * 9 - (step - 1)  # none is repeated: the killed one had not begun


@pytest.mark.parametrize("place", ["checkpoints/fold1-step4", "fold0"])
def test_what_was_damaged_since_it_was_saved_is_named_and_not_used(place, tiny, often, whole, monkeypatch, capsys):
    cfg = tiny(run_name="killed", **often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 14, kill)
        start(cfg)
    folder = ku.Path(cfg.output_dir) / "killed" / place
    flip(folder / "state.safetensors")
    capsys.readouterr()
    assert content(start(cfg)) == whole(tiny, **NOISY)
    assert f"{folder} is damaged and " in capsys.readouterr().out


def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes(tiny, often, whole, monkeypatch):
    expected, cfg = whole(tiny, **NOISY), tiny(run_name="killed", **often, **NOISY)
    for _ in range(6):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            at_step(patch, 3, kill)
            start(cfg)
    assert content(start(cfg)) == expected
    assert len(json.loads((ku.Path(cfg.output_dir) / "killed" / "record.json").read_text())["sessions"]) == 7


def test_without_checkpoints_finished_folds_are_kept_and_the_others_begin_anew(tiny, whole, monkeypatch, capsys):
    cfg = tiny(run_name="killed", checkpoint_minutes=0, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 12, kill)
        start(cfg)
    assert content(start(cfg)) == whole(tiny, **NOISY)
    assert "(its last session: cut off): fold 0 is finished" in capsys.readouterr().out


def test_the_last_two_checkpoints_are_kept_and_none_of_a_finished_fold_or_run(tiny, often, monkeypatch):
    cfg, seen = tiny(run_name="r", epochs=3, **often), []
    save = ku._Checkpoints.save

    def looking(checkpoints, step, parts):
        save(checkpoints, step, parts)
        seen.append(sorted(path.name for path in checkpoints.folder.iterdir()))

    monkeypatch.setattr(ku._Checkpoints, "save", looking)
    run = start(cfg)
    assert seen[:3] == [["fold0-step1"], ["fold0-step1", "fold0-step2"], ["fold0-step2", "fold0-step3"]]
    assert seen[9] == ["fold1-step1"] and seen[-1] == ["fold1-step8", "fold1-step9"]
    assert not (run / "checkpoints").exists() and not (run / ".lock").exists()


@pytest.mark.plots
def test_a_complete_run_is_not_trained_again(tiny, whole, monkeypatch, capsys):
    cfg = tiny(run_name="r", **NOISY)
    run = start(cfg)
    (run / "curves.png").unlink()  # as after a kill while it was drawn
    monkeypatch.setattr(ku.FoldTrainer, "train", lambda trainer: kill())
    assert content(start(cfg)) == whole(tiny, **NOISY) and (run / "curves.png").is_file()
    assert "is complete, nothing is trained" in capsys.readouterr().out


def test_folds_can_be_added_to_a_complete_run_and_not_taken_away(tiny, whole):
    start(tiny(run_name="r", run_folds="1", **NOISY))
    assert content(start(tiny(run_name="r", **NOISY))) == whole(tiny, **NOISY)
    with pytest.raises(ku.ConfigError, match="is complete with folds 0, 1: run_folds must ask for them too"):
        start(tiny(run_name="r", run_folds="1", **NOISY))


def spoil_weights(cfg, folder):
    backbone = shutil.copytree(cfg.backbone, folder / "other")
    tensors = ku.load_file(backbone / "model.safetensors")
    tensors[min(tensors)] += 1e-3
    ku.save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})
    return dict(backbone=str(backbone))


def other_train(change):
    def spoil(cfg, folder):
        other = shutil.copytree(cfg.data_dir, folder / "other")
        change(train_frame()).to_csv(other / "train.csv", index=False)
        return dict(data_dir=str(other))

    return spoil


def other_code(cfg, folder):
    path = folder / "kernel_utils.py"
    path.write_text(ku.Path(ku.__file__).read_text() + "# changed\n")
    return path


CHANGES = {
    "a setting": (lambda cfg, folder: dict(lr=0.5), "lr was 0.0001, now 0.5"),
    "two settings": (lambda cfg, folder: dict(seed=7, llrd=0.9), r"llrd was 1.0, now 0.9\n  seed was 0, now 7"),
    "the way of truncation": (
        lambda cfg, folder: dict(truncation="tail"),
        "truncation was \\['head'\\], now \\['tail'\\]",
    ),
    "the weights of the backbone": (spoil_weights, "the backbone: not as when the run began"),
    "a text": (
        other_train(lambda f: f.assign(excerpt=["a cat", *f["excerpt"][1:]])),
        "column excerpt of train.csv: not as when the run began",
    ),
    "a target": (other_train(lambda f: f.assign(target=[9.0, *f["target"][1:]])), "the targets: not as when"),
    "the order of the rows": (other_train(lambda f: f.iloc[::-1]), "column id of train.csv: not as when"),
    "the folds": (other_train(lambda f: f.assign(fold=[0, 1] * 20)), "the folds: not as when"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_something_else_and_says_what(change, tiny, often, tmp_path, monkeypatch, capsys):
    spoil, told = CHANGES[change]
    cfg = tiny(run_name="r", **often)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    run = ku.Path(cfg.output_dir) / "r"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changed = ku.dataclasses.replace(cfg, **spoil(cfg, tmp_path))
    with pytest.raises(ku.ConfigError, match=rf"run_name 'r': .*r exists and cannot go on(.|\n)*{told}"):
        start(changed)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_of_an_older_version_is_refused_and_the_version_named(tiny):
    cfg = tiny(run_name="r", run_folds="0")
    folder = ku.RunFolder(start(cfg))
    for version in ("0.7.0", "0.6", "unknown"):
        ku._write_json(folder.record, folder.read_record() | {"versions": {"kernel_utils": version}})
        told = f"choose another name or delete it\n  record.json: made by kernel_utils {version}: "
        with pytest.raises(ku.ConfigError, match=told):
            start(cfg)


def run_cell(source):
    """The namespace of a notebook cell that has run: its source is where IPython leaves it, in linecache."""
    name = f"/tmp/ipykernel_1/{zlib.crc32(source.encode())}.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"ku": ku, "torch": torch, "__name__": "__main__"}
    exec(compile(source, name, "exec"), scope)
    return scope


def test_a_run_does_not_go_on_with_other_code_of_the_module_or_of_a_head_in_the_notebook(
    tiny, often, tmp_path, monkeypatch
):
    def head(power):
        lines = (
            "class Own(ku.MeanHead):",
            "    def forward(self, states, mask):",
            f"        return states[-1][:, 0] ** {power}",
        )
        return run_cell("\n".join(lines))["Own"]

    cfg = tiny(run_name="r", head="mean", **often)
    monkeypatch.setitem(ku.HEADS, "mean", head(1))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 2, kill)
        start(cfg)
    monkeypatch.setitem(ku.HEADS, "mean", head(2))
    with pytest.raises(ku.ConfigError, match=r"the code of head mean: not as when the run began"):
        start(cfg)
    monkeypatch.setitem(ku.HEADS, "mean", head(1))
    with monkeypatch.context() as patch, pytest.raises(ku.ConfigError, match=r"kernel_utils.py\): not as when the run"):
        patch.setattr(ku, "__file__", str(other_code(cfg, tmp_path)))
        start(cfg)
    start(cfg)


PARTS = {  # a line of the head -> the same line, changed
    "a class attribute": "    power = {}",
    "a default": "    def raised(self, x, power={}):\n        return x",
    "a static method": "    @staticmethod\n    def raised(x):\n        return x * {}",
    "a property": "    @property\n    def raised(self):\n        return {}",
    "a base": "class Own(Own):\n    pass",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_complete_run_is_not_taken_for_that_of_a_head_of_which_anything_is_changed(part, tiny, monkeypatch):
    def head(value):
        source = f"class Own(ku.MeanHead):\n    def own(self):\n        return {{}}\n{PARTS[part]}\n"
        return run_cell(source.format(value if part == "a base" else 0, value))["Own"]

    folders = []
    for value in (1, 1, 2):
        monkeypatch.setitem(ku.HEADS, "mean", head(value))
        folders.append(start(tiny(head="mean", run_folds="0")).name)
    assert folders == [folders[0], folders[0], f"{folders[0]}-2"]


def test_functions_of_a_notebook_are_told_apart_by_their_source(monkeypatch):
    def prints(share):
        source = f"@ku.metric('gap', 'lower', ('regression',))\ndef gap(target, prediction):\n    return {share}\n"
        monkeypatch.setitem(ku.METRICS, "gap", run_cell(source)["gap"])
        parts = ku._foreign_parts(ku.Config(metric="gap", loss="mse"))
        return {name: ku._source_of(part) for name, part in parts.items()}

    monkeypatch.setitem(ku.METRICS, "gap", ku.METRICS["rmse"])
    del ku.METRICS["gap"]
    first, again, other = prints(0.5), prints(0.5), prints(0.25)
    assert first.keys() == {"metric gap"} and first == again != other


def test_a_part_without_source_is_recorded_by_its_name_and_the_run_says_so(tiny, monkeypatch, capsys):
    scope = {"ku": ku, "__name__": "__main__"}
    exec("class Own(ku.MeanHead):\n    def own(self):\n        return 1", scope)
    monkeypatch.setitem(ku.HEADS, "mean", scope["Own"])
    run = start(tiny(head="mean", run_folds="0"))
    assert ku.RunFolder(run).read_record()["fingerprint"]["the code of head mean"] == "no source: __main__.Own"
    told = "the code of head mean has no source here: a run that goes on cannot tell whether it has changed"
    assert told in capsys.readouterr().out


def test_a_mistake_met_by_a_run_that_goes_on_leaves_it_as_it_is(tiny, often, whole, monkeypatch):
    cfg = tiny(run_name="r", **often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)

    def unreadable(*_):
        raise ku.KitError("the backbone cannot be read")

    with monkeypatch.context() as patch, pytest.raises(ku.KitError, match="the backbone cannot be read"):
        patch.setattr(ku.TextModel, "build", unreadable)
        start(cfg)
    assert [path.name for path in ku._Checkpoints(ku.Path(cfg.output_dir) / "r", 0).paths()] == [
        "fold0-step4",
        "fold0-step3",
    ]
    assert content(start(cfg)) == whole(tiny, **NOISY)


def test_weights_that_are_not_contiguous_go_on_to_the_same_bytes(tiny, often, tmp_path, monkeypatch):
    """As a pickle may hold them; AdamW's moments come back contiguous."""
    cfg = tiny(run_name="whole", **NOISY)
    backbone = ku.Path(shutil.copytree(cfg.backbone, tmp_path / "backbone"))
    tensors = ku.load_file(backbone / "model.safetensors")
    (backbone / "model.safetensors").unlink()
    turned = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
    torch.save(turned, backbone / "pytorch_model.bin")
    cfg = ku.dataclasses.replace(cfg, backbone=str(backbone), lr=0.01)
    expected = content(start(cfg))
    cfg = ku.dataclasses.replace(cfg, run_name="killed", **often)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    assert content(start(cfg)) == expected


def test_a_stray_file_does_not_spoil_what_was_saved(tiny, often, whole, monkeypatch):
    cfg = tiny(run_name="r", **often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 14, kill)
        start(cfg)
    run, steps = ku.Path(cfg.output_dir) / "r", []
    for folder in (run / "fold0", run / "checkpoints" / "fold1-step4"):
        (folder / ".DS_Store").write_text("")
    (run / "checkpoints" / "fold1-step4.bak").mkdir()
    step = ku.OptimizerStep.__call__
    with monkeypatch.context() as patch:
        patch.setattr(ku.OptimizerStep, "__call__", lambda *rest: steps.append(1) or step(*rest))
        assert content(start(cfg)) == whole(tiny, **NOISY)
    assert len(steps) == 5


def test_checkpoints_are_used_where_no_more_are_asked_for(tiny, often, whole, monkeypatch):
    cfg = tiny(run_name="r", **often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    with monkeypatch.context() as patch:
        at_step(patch, 15, kill)  # fourteen are left
        assert content(start(ku.dataclasses.replace(cfg, checkpoint_minutes=0))) == whole(tiny, **NOISY)


def test_the_slow_first_step_of_a_session_is_no_measure_of_the_others(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        clock, step = Clock(patch), ku.OptimizerStep.__call__
        clock.step = 1.0

        def slow_at_first(*rest):
            clock.now += 200 if clock.now < 1 else 0
            return step(*rest)

        patch.setattr(ku.OptimizerStep, "__call__", slow_at_first)
        start(tiny(run_name="r", max_minutes=30, **NOISY), test=range(3000))


def test_what_does_not_shape_the_result_may_change(tiny, often, whole, tmp_path, monkeypatch, competition):
    cfg = tiny(run_name="r", **often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    other = dict(
        data_dir=str(shutil.copytree(competition, tmp_path / "mounted elsewhere")),
        backbone=str(shutil.copytree(cfg.backbone, tmp_path / "backbone")),
        max_minutes=60.0,
        predict_partial=True,
        checkpoint_minutes=5.0,
    )
    assert content(start(ku.dataclasses.replace(cfg, **other))) == whole(tiny, **NOISY)


def test_a_run_without_a_name_goes_on_too_and_other_settings_get_another_folder(tiny, often, whole, monkeypatch):
    cfg = tiny(**often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    other = start(tiny(**NOISY, seed=0, lr=0.01))
    run = start(cfg)
    assert content(run) == whole(tiny, **NOISY) and other.name == f"{run.name}-2"


def test_another_machine_is_told_and_recorded(tiny, often, monkeypatch, capsys):
    cfg = tiny(run_name="r", **often)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    monkeypatch.setattr(ku, "_device_name", lambda: "Tesla T4")
    torch.set_num_threads(2)
    try:
        record = ku.RunFolder(start(cfg)).read_record()
    finally:
        torch.set_num_threads(1)
    out = capsys.readouterr().out
    assert "CPU, now Tesla T4; threads 1, now 2: the last digits may differ" in out
    assert [session["threads"] for session in record["sessions"]] == [1, 2] and record["threads"] == 1


def test_a_run_goes_on_from_the_read_only_output_of_another_kernel(tiny, often, whole, tmp_path, monkeypatch):
    cfg = tiny(run_name="r", **often, **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 12, kill)
        start(cfg)
    attached = tmp_path / "input" / "train-output"
    shutil.move(cfg.output_dir, attached / "runs")
    for path in [*attached.rglob("*"), attached]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.read_bytes() for path in attached.rglob("*") if path.is_file()}
    with pytest.raises(ku.ConfigError, match=r"resume_from .* cannot go on as this run\n  lr was"):
        start(ku.dataclasses.replace(cfg, resume_from=str(attached), lr=0.1))
    assert not ku.Path(cfg.output_dir).exists() or not any(ku.Path(cfg.output_dir).iterdir())
    cfg = ku.dataclasses.replace(cfg, resume_from=str(attached))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 4, kill)
        start(cfg)
    assert content(start(cfg)) == whole(tiny, **NOISY)  # the copy goes on; it is not copied anew
    assert before == {path: path.read_bytes() for path in attached.rglob("*") if path.is_file()}


@pytest.mark.parametrize("runs", [[], ["a", "b"]])
def test_a_resume_from_that_is_not_one_run_is_refused(runs, tiny, tmp_path):
    for name in runs:
        (tmp_path / "old" / name).mkdir(parents=True)
        (tmp_path / "old" / name / "record.json").write_text("{}")
    with pytest.raises(ku.ConfigError, match=r"resume_from .* must be or hold one run folder \(record.json\): "):
        start(tiny(resume_from=str(tmp_path / "old")))


# ---------------------------------------------------------------------------------------
# Stops: time, signals


@pytest.fixture(autouse=True)
def attentive():
    """Ctrl-C is heard even where the tests run in the background of a shell, which ignores it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def stop_by(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 4), (signal.SIGTERM, 9), (signal.SIGINT, 13)])
def test_a_signal_ends_the_step_saves_evaluates_and_the_run_goes_on_to_the_same_bytes(
    step, number, tiny, whole, monkeypatch
):
    cfg, handler = tiny(run_name="r", **NOISY), signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, stop_by(number))
        with pytest.raises(ku.Stopped, match=rf"{number.name}: fold . is (finished|saved up to step . of 9)"):
            start(cfg)
    assert signal.getsignal(number) is handler
    run = ku.Path(cfg.output_dir) / "r"
    record, oof = ku.RunFolder(run).read_record(), pd.read_csv(run / "oof.csv")
    assert record["status"] == "stopped" and [fold["fold"] for fold in record["folds"]] == [0]
    assert record["oof"]["rows"] == len(oof) == 20
    assert record["oof"]["last"] == pytest.approx(math.sqrt(((oof["target"] - oof["prediction"]) ** 2).mean()))
    assert record["folds"][0]["last"]["step"] == min(step, 9)
    with pytest.raises(ku.ConfigError, match="did not finish"):
        ku._Run.load(run)
    assert content(start(cfg)) == whole(tiny, **NOISY)


def test_a_signal_that_was_ignored_stays_ignored(tiny, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup has it
    at_step(monkeypatch, 2, stop_by(signal.SIGINT))
    assert ku.RunFolder(start(tiny(run_name="r"))).read_record()["status"] == "complete"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("second", "end"), [(signal.SIGTERM, ku.Stopped), (signal.SIGINT, KeyboardInterrupt)], ids=["SIGTERM", "SIGINT"]
)
def test_after_the_first_signal_only_ctrl_c_acts_at_once(first, second, end, tiny, monkeypatch):
    """Papermill sends SIGTERM after Ctrl-C, while there are seconds left to save."""

    def send():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)

    at_step(monkeypatch, 2, send)
    with pytest.raises(end):
        start(tiny(run_name="r"))


def make_link(path):
    path.symlink_to("nowhere")


def make_read_only(path):
    path.touch(0o400)


@pytest.mark.parametrize("make", [ku.Path.touch, make_link, make_read_only])
def test_a_file_stop_in_the_run_folder_ends_it_well_and_a_forgotten_one_or_a_folder_does_not(
    make, tiny, whole, monkeypatch, capsys
):
    cfg = tiny(run_name="r", **NOISY)
    file = ku.RunFolder(ku.Path(cfg.output_dir) / "r").stop
    with (
        monkeypatch.context() as patch,
        pytest.raises(ku.Stopped, match=r"file .*/r/STOP: fold 0 is saved up to step 4 "),
    ):
        at_step(patch, 4, lambda: make(file))
        start(cfg)
    make(file)
    assert capsys.readouterr().out.count("STOP is removed") == 1
    at_step(monkeypatch, 2, file.mkdir)
    assert content(start(cfg)) == whole(tiny, **NOISY)
    file.rmdir()


@pytest.mark.parametrize("text", [None, "", "[]\n", '{"fold": 0, "step": 1e999}\n', "\0\n"])
def test_a_run_that_goes_on_says_what_is_lost_by_its_log_unless_that_is_damaged(text, tiny, whole, monkeypatch, capsys):
    cfg = tiny(run_name="r", **NOISY)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 8, kill)
        start(cfg)
    log, lost = ku.Path(cfg.output_dir) / "r" / "log.jsonl", ", steps 2 to 6 of fold 0 are lost"
    if text is not None:
        log.write_text(text)
    capsys.readouterr()
    start(cfg)
    told = "(its last session: cut off): fold 0 is saved up to step 1 of 9" + (lost if text is None else "")
    assert f"{told}\n" in capsys.readouterr().out


@pytest.mark.parametrize("act", [kill, stop_by(signal.SIGINT)])
def test_an_evaluation_that_is_interrupted_is_made_again(act, tiny, often, whole, monkeypatch):
    cfg = tiny(run_name="r", **often, **NOISY)
    evaluate, count = ku.FoldTrainer.evaluate, iter(range(1, 100))
    with monkeypatch.context() as patch, pytest.raises((Killed, ku.Stopped)):
        patch.setattr(ku.FoldTrainer, "evaluate", lambda fold: (next(count) == 2 and act(), evaluate(fold))[1])
        start(cfg)
    assert next(iter(ku._Checkpoints(ku.Path(cfg.output_dir) / "r", 0).paths().values())) == 6
    assert content(start(cfg)) == whole(tiny, **NOISY)


class Clock:
    """A clock of which every optimiser step takes a minute, and nothing else any time."""

    def __init__(self, monkeypatch):
        self.now, self.step, step = 0.0, 60.0, ku.OptimizerStep.__call__
        monkeypatch.setattr(ku.time, "perf_counter", lambda: self.now)

        def stepping(*arguments):
            self.now += self.step
            return step(*arguments)

        monkeypatch.setattr(ku.OptimizerStep, "__call__", stepping)


@pytest.mark.parametrize(("minutes", "steps"), [(3, 2), (8, 7), (14.5, 14), (100, 18)])
def test_a_run_stops_in_time_for_max_minutes_and_goes_on_to_the_same_bytes(minutes, steps, tiny, whole, monkeypatch):
    """A minute for a step, at first half as much for as many rows of an evaluation, and a margin of a fifth."""
    expected, cfg = whole(tiny, **NOISY), tiny(run_name="r", max_minutes=minutes, **NOISY)
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        if steps < 18:
            fold, step = divmod(steps, 9)
            with pytest.raises(ku.Stopped, match=rf"max_minutes {minutes}, .*fold {fold} is saved up to step {step} "):
                start(cfg)
            assert clock.now == 60 * steps
    assert content(start(ku.dataclasses.replace(cfg, max_minutes=0))) == expected


def test_time_for_the_evaluation_the_checkpoint_and_the_test_set_is_left():
    watch = ku.TimeBudget(ku.Config(max_minutes=10), test_rows=1000)
    watch.step_seconds, watch.row_seconds, watch.save_seconds, watch.models = 2.0, 0.1, 5.0, 3
    watch.build_seconds = 4.0
    needed = 1.2 * (4 + 2 + 0.1 * (100 + 3000) + 10) + ku._FINISH_SECONDS
    for spare in (1, -1):
        watch.began = time.perf_counter() - 600 + needed + spare
        reason = watch.stop_reason(100)
        assert reason is None if spare > 0 else reason.startswith("max_minutes 10, ")
    assert "min left" in watch.remaining_text()
    unlimited = ku.TimeBudget(ku.Config())
    assert unlimited.remaining_text() == "" and unlimited.stop_reason(10**9) is None


def test_checkpoints_come_after_the_first_step_and_so_many_minutes_and_after_evaluations_where_they_cost_little():
    watch = ku.TimeBudget(ku.Config(checkpoint_minutes=10))
    assert watch.should_save(False)
    for ago, cost, evaluated, due in (
        (601, 1.0, False, True),
        (599, 1.0, False, False),
        (100, 1.0, True, True),
        (60, 1.0, True, False),  # a second in 60 is more than 1.5 %
        (601, 100.0, False, True),
    ):
        watch.last_save, watch.save_seconds = time.perf_counter() - ago, cost
        assert watch.should_save(evaluated) is due, (ago, cost, evaluated)
    assert not ku.TimeBudget(ku.Config(checkpoint_minutes=0)).should_save(True)


@pytest.mark.plots
@pytest.mark.parametrize(("step", "folds"), [(4, [0]), (13, [0])])
def test_a_stopped_run_predicts_with_what_is_trained_where_that_is_asked_for(step, folds, tiny, whole, monkeypatch):
    """With a fold that is finished, by that alone; else by the one that was stopped."""
    cfg = tiny(run_name="r", predict_partial=True, **NOISY)
    _, test, sample = ku.read_competition(cfg)
    with monkeypatch.context() as patch:
        at_step(patch, step, stop_by(signal.SIGTERM))
        run = start(cfg, test)
    submission = ku.predict_test(run, test, sample)
    assert [fold["fold"] for fold in ku.RunFolder(run).read_record()["folds"]] == folds
    assert len(submission) == 10 and np.isfinite(submission["target"]).all()
    assert content(start(cfg)) == whole(tiny, **NOISY)


def test_a_run_that_was_stopped_can_be_finished_with_the_folds_that_it_has(tiny, monkeypatch):
    cfg = tiny(run_name="r", **NOISY)
    with monkeypatch.context() as patch, pytest.raises(ku.Stopped):
        at_step(patch, 13, stop_by(signal.SIGTERM))
        start(cfg)
    run = start(ku.dataclasses.replace(cfg, run_folds="0"))
    assert ku._Run.load(run).weights.keys() == {0} and len(pd.read_csv(run / "oof.csv")) == 20


def test_a_stop_before_the_first_step_is_told_and_the_run_goes_on(tiny, whole):
    with pytest.raises(ku.Stopped, match=r"max_minutes 1e-06, .*: no fold is finished, no checkpoint is saved"):
        start(tiny(run_name="r", max_minutes=1e-6, predict_partial=True, **NOISY))
    assert content(start(tiny(run_name="r", **NOISY))) == whole(tiny, **NOISY)


# ---------------------------------------------------------------------------------------
# Memory and numbers


def out_of_memory_above(monkeypatch, rows, failures):
    forward = ku.TextModel.forward

    def limited(model, **inputs):
        if model.training and len(padded_mask(inputs)) > rows:
            torch.rand(1)  # as dropout before the layer that does not fit
            failures.append(len(padded_mask(inputs)))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(model, **inputs)

    monkeypatch.setattr(ku.TextModel, "forward", limited)


def test_a_batch_that_does_not_fit_is_halved_and_the_step_is_that_of_the_whole_batch(tiny, often, monkeypatch, capsys):
    settings = NOISY | dict(run_name="r", evals_per_epoch=2)
    expected = content(start(tiny(**settings | dict(run_name="small", micro_batch_size=2))))
    capsys.readouterr()
    failures, cfg = [], tiny(**settings, **often)
    out_of_memory_above(monkeypatch, 3, failures)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 12, kill)
        start(cfg)
    run = start(cfg)
    assert content(run) == expected
    assert failures == [8, 4]  # never again in this fold, the next, or after a kill
    assert [fold["micro_batch_size"] for fold in ku.RunFolder(run).read_record()["folds"]] == [2, 2]
    told = [line for line in re.split("[\r\n]+", capsys.readouterr().out) if line.startswith("out of memory")]
    assert told == [
        "out of memory with 8 rows of 32 tokens: on with 4 at a time; the same step again",
        "out of memory with 4 rows of 32 tokens: on with 2 at a time; the same step again",
    ]


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_what_helps(tiny, monkeypatch):
    out_of_memory_above(monkeypatch, 0, [])
    with pytest.raises(ku.KitError, match=r"a row of 32 tokens does not fit .* gradient_checkpointing"):
        start(tiny(run_name="r"))


def test_an_optimiser_that_does_not_fit_is_an_error_that_says_what_helps(tiny, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(
        ku.KitError, match=r"weights and optimiser do not fit .*freeze_layers.* Tried to allocate 1 GiB"
    ):
        start(tiny(run_name="r"))


def wrong_from(monkeypatch, step, value=math.nan, until=math.inf):
    """Make the loss of the steps from this one on not finite."""
    loss, count = ku.MseLoss.__call__, iter(range(-1, 10**6))  # the trial of a new model calls it twice

    def spoilt(self, raw, target):
        good = loss(self, raw, target)
        return good * value if step <= next(count) < until else good

    monkeypatch.setattr(ku.MseLoss, "__call__", spoilt)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_names_the_step_its_rows_and_rates_and_leaves_good_checkpoints(
    precision, tiny, often, monkeypatch
):
    cfg = tiny(run_name="r", precision=precision, **often, **NOISY)
    rows, step = [], ku.OptimizerStep.__call__
    monkeypatch.setattr(ku.OptimizerStep, "__call__", lambda *rest: rows.append(rest[-1]) or step(*rest))
    wrong_from(monkeypatch, 5)
    with pytest.raises(ku.NumericError, match=r"fold 0, step 5: the loss is nan \(rows .*; learning rates ") as caught:
        start(cfg)
    frame = train_frame()
    assert ", ".join(frame["id"].iloc[rows[4][:5]]) in str(caught.value)
    assert ("precision fp32" in str(caught.value)) is (precision == "bf16")
    saved = ku._Checkpoints(ku.Path(cfg.output_dir) / "r", 0).paths()
    assert [path.name for path in saved] == ["fold0-step4", "fold0-step3"]
    assert all(not ku._SealedFolder(path).problems() for path in saved)


def test_a_gradient_that_is_not_finite_is_named_too(tiny, monkeypatch):
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    loss = ku.MseLoss.__call__
    monkeypatch.setattr(ku.MseLoss, "__call__", lambda self, raw, target: loss(self, Spike.apply(raw), target))
    with pytest.raises(ku.NumericError, match=r"fold 0, step 1: the norm of the gradient is (nan|inf)"):
        start(tiny(run_name="r"))


@pytest.mark.plots
def test_steps_that_float16_skips_are_counted_and_do_not_end_a_run(tiny, monkeypatch):
    wrong_from(monkeypatch, 3, until=5)
    record = ku.RunFolder(start(tiny(run_name="r", precision="fp16", **NOISY))).read_record()
    assert [fold["skipped_steps"] for fold in record["folds"]] == [2, 0]
    log = pd.read_json(ku.Path(record["settings"]["output_dir"]) / "r" / "log.jsonl", lines=True)
    assert len(log[log["loss"].isna() & log["rmse"].isna()]) == 2


def test_float16_that_skips_too_many_steps_in_a_row_stops_with_advice(tiny, monkeypatch):
    wrong_from(monkeypatch, 3)
    monkeypatch.setattr(ku, "_MAX_SKIPPED_STEPS", 4)
    told = r"fold 0, step 6: no finite gradient in 4 steps \(rows .*; loss scale 4096\): .*set precision bf16, or fp32"
    with pytest.raises(ku.NumericError, match=told):
        start(tiny(run_name="r", precision="fp16", **NOISY))


# ---------------------------------------------------------------------------------------
# The disk


@pytest.mark.disk
@pytest.mark.parametrize(
    ("call", "code"),
    [("fsync", ku.errno.EIO), ("replace", ku.errno.ENOSPC), ("mkdir", ku.errno.EROFS)],
)
def test_a_disk_that_fails_is_an_error_with_the_path_and_the_run_goes_on_later(
    call, code, tiny, often, whole, monkeypatch
):
    cfg = tiny(run_name="r", **often, **NOISY)
    with monkeypatch.context() as patch:
        function = getattr(os, call)

        def failing(path, *rest, **options):
            if "checkpoints" in os.readlink(f"/proc/self/fd/{path}" if isinstance(path, int) else "/proc/self/cwd") or (
                "checkpoints" in str(path)
            ):
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *rest, **options)

        at_step(patch, 4, lambda: patch.setattr(os, call, failing))
        with pytest.raises(ku.KitError, match=rf"checkpoints.*could not be written: {os.strerror(code)}"):
            start(cfg)
    found = ku._Checkpoints(ku.Path(cfg.output_dir) / "r", 0).paths()
    assert [path.name for path in found] == ["fold0-step3", "fold0-step2"]
    assert not any(ku._SealedFolder(path).problems() or list(path.parent.glob(".*")) for path in found)
    assert content(start(cfg)) == whole(tiny, **NOISY)


def test_where_room_is_short_one_checkpoint_at_a_time_is_kept(tiny, often, monkeypatch):
    seen, save = [], ku._SealedFolder.save

    def looking(folder, write):
        if folder.path.parent.name == "checkpoints":
            seen.append(len(list(folder.path.parent.glob("fold*"))))
        save(folder, write)

    monkeypatch.setattr(ku._SealedFolder, "save", looking)
    monkeypatch.setattr(ku._DiskSpace, "check", lambda *rest: None)
    monkeypatch.setattr(ku, "_free_bytes", lambda folder: 10**4)
    start(tiny(run_name="r", epochs=2, run_folds="0", **often))
    assert seen == [0, 1, 1, 1, 1, 1]


def test_a_second_run_into_one_folder_is_refused_until_the_first_is_dead(tiny, often, whole, tmp_path):
    cfg = tiny(run_name="r", **often, **NOISY)
    save = ku._Checkpoints.save

    def train_slowly():
        def slow(*arguments):
            save(*arguments)
            print("saved", flush=True)
            time.sleep(60)

        ku._Checkpoints.save = slow
        start(cfg)

    with Forked(train_slowly, stdout=subprocess.PIPE, text=True) as other:
        while "saved" not in (line := other.stdout.readline()):
            assert line, "the other process has ended"
        with pytest.raises(ku.ConfigError, match=rf"in use by another process {other.pid} on "):
            start(cfg)
        other.kill()
    assert content(start(cfg)) == whole(tiny, **NOISY)


def test_what_a_checkpoint_writes_is_read_as_it_was(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "numbers": {0: 1, 7: 2.5, "x": None, "flag": True},
        "tuple": (1, (2.0, "three"), [4]),
        "empty": [{}, [], (), ""],
        "infinite": [math.inf, -math.inf],
        "tensors": [shared, shared, shared.t(), torch.tensor(3), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)],
        "arrays": {"words": np.arange(5, dtype=np.uint32), "rows": np.arange(3), "floats": np.array([[0.1], [1 / 3]])},
    }
    ku._write_state(tmp_path, state)
    got = ku._read_state(tmp_path)
    for name in ("numbers", "tuple", "empty", "infinite"):
        assert got[name] == state[name] and repr(got[name]) == repr(state[name])
    for a, b in zip(got["tensors"], state["tensors"], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    for name, array in state["arrays"].items():
        np.testing.assert_array_equal(got["arrays"][name], array)
        assert got["arrays"][name].dtype == array.dtype
    assert len(ku.load_file(tmp_path / "state.safetensors")) == 8  # the shared one once


def test_random_states_come_back():
    states = ku._RandomStates()
    before = states.state_dict()

    def drawn():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    first = drawn()
    states.load_state_dict(before)
    assert drawn() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_run_goes_on_from_its_checkpoint_with_its_random_state(tiny, often, monkeypatch):
    cfg = tiny(run_name="r", precision="fp16", **often, **NOISY)
    expected = pd.read_csv(start(ku.dataclasses.replace(cfg, run_name="whole")) / "oof.csv")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(cfg)
    torch.cuda.manual_seed(7)
    got = pd.read_csv(start(cfg) / "oof.csv")
    np.testing.assert_allclose(got["prediction"], expected["prediction"], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_runs_out_of_memory_trains_with_smaller_micro_batches(tiny, capsys):
    cfg = tiny(run_name="r", batch_size=2000, attention="eager", precision="fp32")
    train_frame(4000).to_csv(Path(cfg.data_dir) / "train.csv", index=False)  # 250 MB of activations
    with little_gpu_memory(2**27):
        run = start(cfg)
    assert "out of memory with 2000 rows" in capsys.readouterr().out
    assert ku.RunFolder(run).read_record()["status"] == "complete"
