"""Folds side by side in several processes, and the command line."""

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import kernel_utils as ku
import numpy as np
import pandas as pd
import psutil
import pytest

from conftest import Forked, train_frame
from test_resume import NOISY, at_step, content, kill, start, stop_by

pytestmark = pytest.mark.slow

SETTINGS = dict(NOISY, n_folds=3)  # 13 or 14 rows a fold, four steps an epoch


@pytest.fixture(autouse=True)
def one_thread_in_other_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def whole():
    """Function: settings -> content of the run in one process with them, trained once."""
    made = {}

    def run(tiny, **settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = content(start(tiny(run_name="whole", fold_processes=1, **settings)))
        return made[key]

    return run


# ---------------------------------------------------------------------------------------
# Folds side by side


SLOW = dict(checkpoint_minutes=1e-9, fold_processes=2)


@pytest.fixture
def slow(monkeypatch, forked_module):
    """Context: with the settings SLOW, steps take long, and there is a checkpoint after each."""

    @contextlib.contextmanager
    def steps():
        step = ku.OptimizerStep.__call__
        with monkeypatch.context() as patch:
            patch.setattr(ku.OptimizerStep, "__call__", lambda *rest: time.sleep(0.3) or step(*rest))
            yield

    return steps


def saved_steps(run, fold):
    return [int(path.name.partition("step")[2]) for path in (run / "checkpoints").glob(f"fold{fold}-step*")]


def workers_of(pid):
    """Child processes that are forks of this one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children()
        return [child for child in children if child.cmdline() == psutil.Process().cmdline()]
    return []


def once_saved(run, folds, act):
    """Call `act` in a thread when these folds have checkpoints of their second step."""

    def wait():
        end = time.time() + 120
        while time.time() < end and not all(max(saved_steps(run, fold), default=0) >= 2 for fold in folds):
            time.sleep(0.05)
        act()

    threading.Thread(target=wait, daemon=True).start()


def run_of(cfg):
    return Path(cfg.output_dir) / cfg.run_name


def test_folds_side_by_side_give_the_bytes_of_folds_in_turn(tiny, whole, capsys):
    settings = SETTINGS | dict(template="[new] {excerpt}")  # a token that the backbone's own tokenizer has not
    expected = whole(tiny, **settings)
    capsys.readouterr()
    run = start(tiny(run_name="r", fold_processes=2, **settings))
    assert content(run) == expected
    out = capsys.readouterr().out
    assert "folds 0, 1, 2: 2 processes side by side" in out
    assert sorted(re.findall(r"^\[[01]\] fold (\d): rmse", out, re.MULTILINE)) == ["0", "1", "2"]
    assert out.count("depth") == 1 and "%|" not in out  # the table of rates once, no bars
    assert {path.name for path in run.iterdir()} == {path.name for path in (run.parent / "whole").iterdir()}
    assert ku.RunFolder(run).read_record()["peak_memory_bytes"] > 10**7


def test_a_run_of_two_processes_that_a_file_stops_goes_on_to_the_same_bytes(tiny, whole, slow):
    cfg = tiny(run_name="r", **SETTINGS, **SLOW)
    once_saved(run_of(cfg), (0, 1), (run_of(cfg) / "STOP").touch)
    told = r"the file .*/r/STOP: fold 0 is saved up to step [2-9] of 12, fold 1 is saved up to step [2-9] of 12\n"
    with slow(), pytest.raises(ku.Stopped, match=told):
        start(cfg)
    run, before = run_of(cfg), [max(saved_steps(run_of(cfg), fold)) for fold in (0, 1)]
    record = ku.RunFolder(run).read_record()
    assert record["status"] == "stopped" and [fold["last"]["step"] for fold in record["folds"]] == before
    assert len(pd.read_csv(run / "oof.csv")) == 27 and not workers_of(os.getpid())
    assert content(start(cfg)) == whole(tiny, **SETTINGS)


def test_a_killed_process_is_one_error_and_the_next_calls_stop_in_time_and_finish(tiny, whole, slow):
    cfg = tiny(run_name="r", **SETTINGS, **SLOW)
    once_saved(run_of(cfg), (0, 1), lambda: workers_of(os.getpid())[0].kill())
    with slow(), pytest.raises(ku.KitError, match=r"process 0 of 2 ended with exit code -9; last lines:"):
        start(cfg)
    assert not workers_of(os.getpid()) and ku._read_state(run_of(cfg) / "fold1")["stop_reason"]
    other = max(saved_steps(run_of(cfg), 1))
    with ku._locked(run_of(cfg)):  # nobody holds it any more
        pass
    told = rf"max_minutes 1e-06, .*: fold 0 is saved up to step \d+ of 12, fold 1 is saved up to step {other} of 12\n"
    with pytest.raises(ku.Stopped, match=told):
        start(ku.dataclasses.replace(cfg, max_minutes=1e-6))
    assert content(start(ku.dataclasses.replace(cfg, fold_processes=1))) == whole(tiny, **SETTINGS)


def test_a_problem_in_a_process_arrives_as_in_one_process_and_its_steps_are_in_the_log(tiny, forked_module):
    cfg = tiny(run_name="r", fold_processes=2, **SETTINGS | dict(lr=1e36, head_lr=1e36, max_grad_norm=0))
    message = r"^the training went wrong:\n  fold [01], step [12]: the .* is (nan|inf) \(rows .*: lower lr .*$"
    with pytest.raises(ku.NumericError, match=message):
        start(cfg)
    assert not workers_of(os.getpid())
    assert (run_of(cfg) / "log.jsonl").read_text().count('"grad_norm"') > 1


def test_what_an_earlier_session_left_of_a_fold_that_this_one_has_not_begun_is_not_of_this_one(tiny, monkeypatch):
    cfg = tiny(run_name="r", run_folds="2", **SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(ku.Stopped, match="fold 2 is saved up to step 5 of 12"):
        at_step(patch, 5, stop_by(signal.SIGTERM))
        start(cfg)
    read, reads, seconds, save = ku._read_fold, [], [], ku._TrainingRun.save
    monkeypatch.setattr(ku, "_read_fold", lambda folder, *rest: reads.append(folder.name) or read(folder, *rest))
    monkeypatch.setattr(
        ku._TrainingRun, "save", lambda run, results: seconds.append(run.budget.earlier_seconds) or save(run, results)
    )
    told = "fold 2 is saved up to step 5 of 12"
    with pytest.raises(ku.Stopped, match=f"max_minutes 1e-06, .*: {told}"):
        start(ku.dataclasses.replace(cfg, run_folds="all", fold_processes=2, max_minutes=1e-6))
    assert sorted(reads) == ["fold0", "fold0", "fold1", "fold1", "fold2"] and seconds == [0]


def test_a_killed_parent_leaves_no_process_behind_and_the_folder_is_locked_until_then(tiny, whole, slow, tmp_path):
    cfg = tiny(run_name="r", **SETTINGS, **SLOW)
    ku._write_json(tmp_path / "run.json", cfg.to_dict())
    killed = threading.Event()
    once_saved(run_of(cfg), (0, 1), killed.set)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = ["train", "--config", str(tmp_path / "run.json")]
    with slow(), Forked(lambda: ku.main(command), **streams) as parent:
        assert killed.wait(130)
        workers = workers_of(parent.pid)
        for worker in workers:
            worker.suspend()
        parent.kill()
        out = parent.stdout.read()
    assert len(workers) == 2, out
    try:
        with pytest.raises(ku.ConfigError, match=rf"in use by another process {parent.pid} "):
            start(cfg)
    finally:
        for worker in workers:
            worker.resume()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert [max(saved_steps(run_of(cfg), fold)) < 12 for fold in (0, 1)] == [True, True]
    assert content(start(ku.dataclasses.replace(cfg, fold_processes=1))) == whole(tiny, **SETTINGS)


@pytest.mark.parametrize(("field", "name"), [("head", "mean"), ("metric", "rmse")])
def test_with_parts_of_the_notebook_one_process_trains_and_says_so(field, name, tiny, capsys, monkeypatch):
    part = ku._REGISTRIES[field][name]
    own = type("Own", (part,), {}) if isinstance(part, type) else copy.copy(part)
    own.__module__, own.__name__ = "__main__", "Own"
    monkeypatch.setitem(ku._REGISTRIES[field], "own", own)
    monkeypatch.setattr(ku, "_Worker", kill)
    run = start(tiny(run_name="own", fold_processes=2, **{field: "own"}))
    assert ku.RunFolder(run).read_record()["status"] == "complete"
    assert "1 process instead of 2: Own of the notebook cannot be read by others" in capsys.readouterr().out


def test_there_is_a_process_for_each_equal_gpu_unless_set_and_for_each_fold_at_most(tiny, tmp_path, monkeypatch):
    names = ["T4", "T4", "P100", "T4"]
    monkeypatch.setattr(ku.torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(ku.torch.cuda, "get_device_name", lambda i=0: names[i])
    monkeypatch.setattr(ku, "_device_name", lambda: "T4")
    backbone = Path(tiny().backbone)

    def chosen(n_folds, **settings):
        cfg = tiny(loss="mse", metric="rmse", **settings)
        return ku._choose_processes(n_folds, cfg, ku._DiskSpace(tmp_path, backbone, cfg))

    assert [chosen(5), chosen(2), chosen(1), chosen(0)] == [3, 2, 1, 0]
    assert [chosen(5, fold_processes=n) for n in (1, 2, 4, 9)] == [1, 2, 4, 5]
    parameters = ku._num_parameters(ku._BackboneLoader(backbone, tiny()).load())
    for more, count in ((-1, 1), (1, 2)):  # five folds of weights, two times two checkpoints of three as large
        monkeypatch.setattr(ku, "_free_bytes", lambda folder, more=more: 4 * parameters * (5 + 12) + more)
        assert chosen(5) == count
        assert chosen(5, checkpoint_minutes=0) == 3


@pytest.mark.parametrize(("rows", "typed"), [(40, True), (40, False), (1, True)])
def test_what_other_processes_read_of_the_data_is_what_was_told(rows, typed, tokenizer, tmp_path):
    tokenizer.model_input_names = ["input_ids", "attention_mask"] + ["token_type_ids"] * typed
    frame = train_frame(rows)
    frame = frame.assign(other=frame["excerpt"].iloc[::-1].to_numpy())
    tokens = ku._tokenize(frame, tokenizer, ku.Config(text_columns="excerpt,other", max_length=32))
    assert (tokens.types is not None) is typed
    data = ku._TrainingData(
        tokens, np.arange(len(frame)), np.arange(len(frame)) % 2, Path("b"), tokenizer, 7, frame["id"].to_numpy()
    )
    data = data._replace(errors=np.linspace(0, 1, len(frame)))
    data.save(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    got = ku._TrainingData.load(tmp_path, ku._load_tokenizer(tmp_path))
    for name in ("ids", "types", "offsets", "lengths"):
        a, b = getattr(got.tokens, name), getattr(tokens, name)
        assert a is b is None or (np.array_equal(a, b) and a.dtype == b.dtype)
    assert got.tokens.pad_id == tokens.pad_id and got.n_outputs == 7 and list(got.ids) == list(frame["id"])
    assert (
        np.array_equal(got.errors, data.errors)
        and np.array_equal(got.targets, data.targets)
        and np.array_equal(got.folds, data.folds)
    )
    tokenizer.add_tokens(["new"])
    with pytest.raises(ku.KitError, match="set fold_processes 1"):
        ku._TrainingData.load(tmp_path, tokenizer)


# ---------------------------------------------------------------------------------------
# The command


def test_the_command_does_what_the_notebook_does(tiny, tmp_path, capsys):
    cfg = tiny(run_name="r", epochs=2, evals_per_epoch=2, lr=1e-3, head_lr=1e-2)
    ku._write_json(tmp_path / "run.json", cfg.to_dict())
    assert ku.main(["train", "--config", str(tmp_path / "run.json")]) == 0
    written = pd.read_csv(run_of(cfg) / "submission.csv", dtype={"id": str})
    assert len(written) == 10 and content(run_of(cfg)) == content(start(ku.dataclasses.replace(cfg, run_name="other")))


WRONG = {
    "no file": (None, r"^KitError: cannot go on:\n  .*run.json: not a JSON file \(.*No such file"),
    "no JSON": ("{'head': 1}", r"^KitError: cannot go on:\n  .*run.json: not a JSON file"),
    "a list": ("[]", r"run.json: expected an object, got \[\]"),
    "an unknown setting": (
        '{"heda": "mean", "epochs": 0}',
        r"'heda' \(did you mean head\?\)\n  epochs must be at least 1",
    ),
    "no data": (
        '{"data_dir": "nowhere"}',
        r"^DataError: the data have problems:\n  data_dir 'nowhere' is not a folder",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_file_is_one_message_and_exit_code_1(case, tmp_path, capsys):
    text, told = WRONG[case]
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert ku.main(["train", "--config", str(tmp_path / "run.json")]) == 1
    assert re.search(told, capsys.readouterr().err)


def test_a_command_that_is_none_shows_how_it_is_used(capsys):
    for arguments in ([], ["train"], ["other"], ["train", "--confi", "a", "b"]):
        with pytest.raises(SystemExit) as ended:
            ku.main(arguments)
        assert ended.value.code == 2
    assert "usage: kernel_utils.py" in capsys.readouterr().err
