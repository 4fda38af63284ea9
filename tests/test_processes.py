"""Several processes: folds side by side, and runs whose steps the processes of torch.distributed.run share."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import kernel_utils as ku
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from conftest import train_frame
from test_resume import NOISY, Killed, at_step, content, kill, start

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


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """The module that other processes run has slow steps and saves after each; settings for that."""
    text, place = Path(ku.__file__).read_text(), "        self.rates.copy_(self.rates_to_come[step])\n"
    assert text.count(place) == text.count("SAVE_SHARE = 0.015") == 1
    text = text.replace(place, f"{place}        time.sleep(0.3)\n").replace(
        "SAVE_SHARE = 0.015", "SAVE_SHARE = math.inf"
    )
    path = tmp_path / "kernel_utils.py"
    path.write_text(text)
    monkeypatch.setattr(ku, "__file__", str(path))
    return dict(checkpoint_minutes=1e-9, fold_processes=2)


def saved_steps(run, fold):
    return [int(path.name.partition("step")[2]) for path in (run / "checkpoints").glob(f"fold{fold}-step*")]


def workers_of(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(pid).children()
        return [child for child in children if "train-folds" in child.cmdline()]
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
    settings = SETTINGS | dict(prefix="[new] ")  # a token that the backbone's own tokenizer has not
    expected = whole(tiny, **settings)
    capsys.readouterr()
    run = start(tiny(run_name="r", fold_processes=2, **settings))
    assert content(run) == expected
    out = capsys.readouterr().out
    assert "folds 0, 1, 2: 2 processes side by side" in out
    assert sorted(re.findall(r"^fold (\d): rmse", out, re.MULTILINE)) == ["0", "1", "2"]
    assert out.count("depth") == 1 and "%|" not in out  # the table of rates once, no bars
    assert {path.name for path in run.iterdir()} == {path.name for path in (run.parent / "whole").iterdir()}
    assert ku.RunFolder(run).read_record()["peak_memory_bytes"] > 10**7


def test_a_stopped_run_of_two_processes_goes_on_to_the_same_bytes(tiny, whole, slow):
    cfg = tiny(run_name="r", **SETTINGS, **slow)
    once_saved(run_of(cfg), (0, 1), lambda: os.kill(os.getpid(), signal.SIGTERM))
    told = r"SIGTERM: fold 0 is at step [2-9] of 12, fold 1 is at step [2-9] of 12, 0 folds are finished"
    with pytest.raises(ku.Stopped, match=told):
        start(cfg)
    run, before = run_of(cfg), [max(saved_steps(run_of(cfg), fold)) for fold in (0, 1)]
    record = ku.RunFolder(run).read_record()
    assert record["status"] == "stopped" and [fold["last"]["step"] for fold in record["folds"]] == before
    assert len(pd.read_csv(run / "oof.csv")) == 27 and not workers_of(os.getpid())
    assert content(start(cfg)) == whole(tiny, **SETTINGS)


def test_a_killed_process_is_one_error_and_the_next_calls_stop_in_time_and_finish(tiny, whole, slow):
    cfg = tiny(run_name="r", **SETTINGS, **slow)
    once_saved(run_of(cfg), (0, 1), lambda: workers_of(os.getpid())[0].kill())
    with pytest.raises(ku.KitError, match=r"process 0 of 2 ended with exit code -9; last lines:"):
        start(cfg)
    assert not workers_of(os.getpid()) and ku._finished_fold(run_of(cfg) / "fold1") is None
    other = max(saved_steps(run_of(cfg), 1))
    with ku._locked(run_of(cfg)):  # nobody holds it any more
        pass
    told = rf"max_minutes 1e-06, .*: fold 0 is at step \d+ of 12, fold 1 is at step {other} of 12, 0 folds are finished"
    with pytest.raises(ku.Stopped, match=told):
        start(ku.dataclasses.replace(cfg, max_minutes=1e-6))
    assert content(start(ku.dataclasses.replace(cfg, fold_processes=1))) == whole(tiny, **SETTINGS)


def test_a_problem_in_a_process_arrives_as_it_is_and_its_steps_are_in_the_log(tiny):
    cfg = tiny(run_name="r", fold_processes=2, **SETTINGS | dict(lr=1e36, head_lr=1e36, max_grad_norm=0))
    with pytest.raises(
        ku.NumericError, match=r"^the training went wrong:\n  fold \d, step \d+: .*: lower lr"
    ) as caught:
        start(cfg)
    assert "Traceback" not in str(caught.value) and not workers_of(os.getpid())
    assert (run_of(cfg) / "log.jsonl").read_text().count('"grad_norm"') > 1


def test_a_killed_parent_leaves_no_process_behind_and_the_folder_is_locked_until_then(tiny, whole, slow, tmp_path):
    cfg = tiny(run_name="r", **SETTINGS, **slow)
    ku._write_json(tmp_path / "run.json", cfg.to_dict())
    killed = threading.Event()
    once_saved(run_of(cfg), (0, 1), killed.set)
    command = [sys.executable, ku.__file__, "train", "--config", tmp_path / "run.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as parent:
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
    own = type("Own", (part,), {}) if isinstance(part, type) else ku.functools.wraps(part)(lambda *a: part(*a))
    own.__module__, own.__name__ = "__main__", "Own"
    monkeypatch.setitem(ku._REGISTRIES[field], "own", own)
    monkeypatch.setattr(ku, "_start_process", kill)
    run = start(tiny(run_name="own", fold_processes=2, **{field: "own"}))
    assert ku.RunFolder(run).read_record()["status"] == "complete"
    assert "1 process instead of 2: Own of the notebook cannot be read by others" in capsys.readouterr().out


def test_there_is_a_process_for_each_equal_gpu_unless_set_and_for_each_fold_at_most(tiny, tmp_path, monkeypatch):
    names = ["T4", "T4", "P100", "T4"]
    monkeypatch.setattr(ku.torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(ku.torch.cuda, "get_device_name", lambda i=0: names[i])
    monkeypatch.setattr(ku, "_device_name", lambda: "T4")
    data = ku._TrainingData(*[None] * 3, Path(tiny().backbone), *[None] * 3)

    def chosen(n_folds, **settings):
        return ku._choose_processes(data, n_folds, tiny(loss="mse", metric="rmse", **settings), tmp_path)

    assert [chosen(5), chosen(2), chosen(1), chosen(0)] == [3, 2, 1, 0]
    assert [chosen(5, fold_processes=n) for n in (1, 2, 4, 9)] == [1, 2, 4, 5]
    parameters = ku._num_parameters(ku._load_backbone(data.folder, tiny()))
    for more, count in ((-1, 1), (1, 2)):  # five folds of weights, two times two checkpoints of three as large
        monkeypatch.setattr(ku, "_free_bytes", lambda folder, more=more: 4 * parameters * (5 + 12) + more)
        assert chosen(5) == count
        assert chosen(5, checkpoint_minutes=0) == 3


@pytest.mark.parametrize(("rows", "typed"), [(40, True), (40, False), (1, True)])
def test_what_other_processes_read_of_the_data_is_what_was_told(rows, typed, tokenizer, tmp_path):
    tokenizer.model_input_names = ["input_ids", "attention_mask"] + ["token_type_ids"] * typed
    frame = train_frame(rows)
    frame = frame.assign(other=frame["excerpt"].iloc[::-1].to_numpy())
    tokens = ku._tokenize_frame(frame, tokenizer, ku.Config(pair_column="other", max_length=32))
    assert (tokens.types is not None) is typed
    data = ku._TrainingData(
        tokens, np.arange(len(frame)), np.arange(len(frame)) % 2, Path("b"), tokenizer, 7, frame["id"].to_numpy()
    )
    data = data._replace(errors=np.linspace(0, 1, len(frame)))
    ku._write_state(tmp_path, ku._describe_data(data))
    tokenizer.save_pretrained(tmp_path)
    got = ku._rebuild_data(ku._read_state(tmp_path), Path("b"), ku._load_tokenizer(tmp_path))
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
        ku._rebuild_data(ku._read_state(tmp_path), Path("b"), tokenizer)


# ---------------------------------------------------------------------------------------
# One run in several processes

FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def forkserver():
    """A process that has imported this module, and of which copies start at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(ku.__file__).parent}{os.pathsep}{Path(__file__).parent}")
        patch.setenv("OMP_NUM_THREADS", "1")
        FORKS.set_forkserver_preload(["test_processes"])
        multiprocessing.forkserver.ensure_running()


def member(number, count, port, out, settings, prepare):
    """A process of a run, begun as torch.distributed.run does, in a folder of its own; it prints to a file."""
    folder = Path(f"{out}-folder")
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    where = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in where.items()}
    torch.set_num_threads(1)
    with open(out, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            prepare(number)
            ku._write_json("run.json", settings[number])
            code = ku.main(["train", "--config", "run.json"])
        except Killed:
            code = 9
    os._exit(code)


def as_it_is(number):
    pass


def share(tmp_path, cfg, prepare=as_it_is, count=2, **others):
    """Train in `count` processes; their exit codes and what they printed. `others`: settings of all but the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [cfg.to_dict()] + [cfg.to_dict() | others] * (count - 1)
    outs = [tmp_path / f"member{number}" for number in range(count)]
    processes = [FORKS.Process(target=member, args=(i, count, port, outs[i], settings, prepare)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert not process.is_alive()
    return [process.exitcode for process in processes], [out.read_text() for out in outs]


def predictions(run):
    return pd.read_csv(run / "oof.csv")[["prediction_best", "prediction_last"]].to_numpy()


QUIET = dict(epochs=2, evals_per_epoch=2, lr=1e-3, head_lr=1e-2)
SHARED = {  # 20 rows to train on: of two batches one is of a single row, which is too few for two processes
    "an odd batch, one of a single row, several micro-batches, a loss with an outer part": (
        2,
        dict(batch_size=19, micro_batch_size=3, loss="rmse", max_grad_norm=0.5),
    ),
    "padded rows, frozen layers, more processes than rows of a batch": (
        3,
        dict(batch_size=2, attention="eager", freeze_layers=1, epochs=1),
    ),
    "the best weights": (2, dict(keep="best", lr=0.02)),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_run_equals_the_run_of_one_process(case, tiny, tmp_path):
    count, settings = SHARED[case]
    cfg = tiny(run_name="shared", **QUIET | settings)
    codes, outs = share(tmp_path, cfg, count=count)
    assert codes == [0] * count, outs
    alone = start(ku.dataclasses.replace(cfg, run_name="alone"))
    np.testing.assert_allclose(predictions(run_of(cfg)), predictions(alone), rtol=0, atol=1e-5)
    logs = [pd.read_json(run / "log.jsonl", lines=True) for run in (run_of(cfg), alone)]
    np.testing.assert_allclose(logs[0]["loss"].astype(float), logs[1]["loss"].astype(float), atol=1e-5)
    np.testing.assert_allclose(logs[0]["grad_norm"].astype(float), logs[1]["grad_norm"].astype(float), rtol=1e-3)
    assert [out.count("fold 0: rmse") for out in outs] == [1] + [0] * (count - 1)  # one prints, and one writes
    assert "2 processes share every step" in outs[0] or count == 3
    record = ku.RunFolder(run_of(cfg)).read_record()
    assert (record["sessions"][0]["world_size"], ku.RunFolder(alone).read_record()["world_size"]) == (count, 1)
    assert len(pd.read_csv(run_of(cfg) / "submission.csv")) == 10


def often(number):
    ku._MAX_SAVE_FRACTION = math.inf


def killed(number):
    """All processes end abruptly before the eighth step, in the second fold."""
    often(number)
    at_step(Patch, 8, kill)


def stopped(number):
    """The second process alone is told to stop."""
    often(number)
    if number:
        at_step(Patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))


class Patch:
    """As monkeypatch, for a process that ends anyway."""

    setattr = staticmethod(setattr)


def test_a_shared_run_that_was_killed_or_stopped_goes_on_to_the_same_bytes(tiny, tmp_path):
    cfg = tiny(run_name="whole", checkpoint_minutes=1e-9, **NOISY | dict(epochs=2))
    assert share(tmp_path, cfg)[0] == [0, 0]
    expected = content(run_of(cfg))
    for prepare, codes in ((killed, [9, 9]), (stopped, [1, 0])):
        again = ku.dataclasses.replace(cfg, run_name=prepare.__name__)
        ended, outs = share(tmp_path, again, prepare)
        assert ended == codes, outs
        steps = saved_steps(run_of(again), 1)
        assert max(steps) == (1 if prepare is killed else 2)
        if prepare is stopped:
            assert "another process has to stop: fold 1 is at step 2 of 6, 1 folds are finished" in outs[0]
        ended, outs = share(tmp_path, again, often)
        assert ended == [0, 0] and f"fold 1 goes on after step {max(steps)} of 6" in outs[0], outs
        assert content(run_of(again)) == expected


def test_a_shared_run_can_go_on_in_one_process_which_is_told(tiny, tmp_path, capsys):
    cfg = tiny(run_name="r", checkpoint_minutes=1e-9, **QUIET)
    assert share(tmp_path, cfg, killed)[0] == [9, 9]
    run = start(cfg)
    assert "world_size 2, now 1" in capsys.readouterr().out
    assert [session["world_size"] for session in ku.RunFolder(run).read_record()["sessions"]] == [2, 1]
    alone = start(ku.dataclasses.replace(cfg, run_name="alone"))
    np.testing.assert_allclose(predictions(run), predictions(alone), rtol=0, atol=1e-5)


def strays(number):
    """The weights of one process change by themselves."""
    step = ku.OptimizerStep.optimizer_step

    def straying(engine, *rest):
        told = step(engine, *rest)
        if number:
            with torch.no_grad():
                next(engine.model.parameters())[0, 0] += 1e-6
        return told

    ku.OptimizerStep.optimizer_step = straying


def unlucky(number):
    """A row does not fit into the memory of one process."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if number:
        ku.OptimizerStep.accumulate = full


def test_processes_that_come_apart_are_an_error(tiny, tmp_path):
    codes, outs = share(tmp_path, tiny(run_name="r", **QUIET), strays)
    assert codes == [1, 1]
    for out in outs:
        assert "the 2 processes of the run have come to other weights (fold 0, step 2): their machines differ" in out
        assert "Traceback" not in out


def test_an_error_of_one_process_is_told_and_ends_the_others(tiny, tmp_path):
    codes, outs = share(tmp_path, tiny(run_name="r", **QUIET), unlucky)
    assert codes == [1, 1] and not any("Traceback" in out for out in outs), outs
    assert "process 0 cannot go on: another process of the run has ended" in outs[0]
    assert "does not fit into the memory" in outs[1]


def test_machines_without_a_common_disk_or_with_other_data_are_refused(tiny, competition, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    train_frame(seed=5).to_csv(other / "train.csv", index=False)
    cfg = tiny(run_name="r", **QUIET)
    refused = {
        "differ in data, backbone, versions or devices": (cfg, dict(data_dir=str(other))),
        "do not all see runs/r/record.json: output_dir must be": (ku.dataclasses.replace(cfg, output_dir="runs"), {}),
    }
    for told, (settings, others) in refused.items():
        codes, outs = share(tmp_path, settings, **others)
        assert codes == [1, 1] and all(told in out for out in outs), outs
    assert not list(tmp_path.rglob("record.json"))  # nothing was trained, nothing is left


def test_weights_without_a_gradient_in_a_process_get_that_of_the_others_and_those_without_any_none(tiny, tmp_path):
    """As a head that leaves some weights out for some rows. Independent sums, by one process."""
    codes, outs = share(tmp_path, tiny(run_name="r", **QUIET), gradients)
    assert codes == [9, 9] and all("[None, 0.0, 2.0, 3.0] 7.0" in out for out in outs), outs


def gradients(number):
    """Print the gradients that an engine has after it has added them up, then end."""

    def adding(engine, *rest):
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
        engine.model = torch.nn.ParameterList(weights)
        engine.mean += 3 + number
        given = [{1: 0.0, 2: 2.0}, {1: 0.0, 3: 3.0}][number]
        for i, value in given.items():
            weights[i].grad = torch.full((2,), value)
        engine.add_up()
        print([None if w.grad is None else w.grad.mean().item() for w in weights], engine.mean.item(), file=sys.stderr)
        raise Killed

    ku.OptimizerStep.optimizer_step = adding


# ---------------------------------------------------------------------------------------
# The command


def test_the_command_shares_a_run_between_the_processes_of_torch_distributed_run(tiny, tmp_path):
    cfg = tiny(run_name="shared", **QUIET)
    given = cfg.to_dict()
    ku._write_json(
        tmp_path / "run.json", {name: given[name] for name in given if given[name] != vars(ku.Config())[name]}
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, ku.__file__, "train", "--config", tmp_path / "run.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fold 1: rmse") == 1 and "Warning" not in done.stderr
    alone = start(ku.dataclasses.replace(cfg, run_name="alone"))
    np.testing.assert_allclose(predictions(run_of(cfg)), predictions(alone), rtol=0, atol=1e-5)


def test_the_command_does_what_the_notebook_does(tiny, tmp_path, capsys):
    cfg = tiny(run_name="r", **QUIET)
    ku._write_json(tmp_path / "run.json", cfg.to_dict())
    assert ku.main(["train", "--config", str(tmp_path / "run.json")]) == 0
    written = pd.read_csv(run_of(cfg) / "submission.csv", dtype={"id": str})
    assert len(written) == 10 and content(run_of(cfg)) == content(start(ku.dataclasses.replace(cfg, run_name="other")))


WRONG = {
    "no file": (None, r"^KitError: cannot go on:\n  .*run.json: not a JSON file \(.*No such file"),
    "no JSON": ("{'head': 1}", r"^KitError: cannot go on:\n  .*run.json: not a JSON file"),
    "a list": ("[]", "run.json: expected a JSON object, got list"),
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
