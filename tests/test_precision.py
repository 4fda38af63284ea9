"""What `precision auto` means on a CPU: float32, or bf16 where the CPU computes it and a trial is for it.

Tests need no such CPU: they say that there is one, and how long the passes took.
"""

import platform
import shutil

import kernel_utils as ku
import numpy as np
import pytest
import torch

from conftest import Killed, is_bf16_cpu, kill
from test_resume import at_step, content, start

SETTINGS = dict(backbone_dropout=0.1, run_folds="0")  # three steps, whose random states matter


@pytest.fixture(scope="module")
def whole():
    """Function: a precision -> content of the run with it, trained once."""
    made = {}

    def run(tiny, precision):
        if precision not in made:
            made[precision] = content(start(tiny(run_name=precision, precision=precision, **SETTINGS)))
        return made[precision]

    return run


@pytest.fixture
def often():
    """A checkpoint after each step."""
    return dict(checkpoint_minutes=1e-9)


@pytest.fixture
def cpu(monkeypatch):
    """Function: how many times as fast as float32 bf16 is in a trial -> the list of the trials that were made."""

    def compute_bf16(speedup=2.0):
        trials, time_passes = [], ku._PrecisionTrial.time_passes

        def timed(trial):
            trials.append(trial)
            results, seconds = time_passes(trial)
            assert {name: len(passes) for name, passes in seconds.items()} == {"fp32": 3, "bf16": 3}
            return results, {"fp32": [speedup, speedup, 99.0], "bf16": [1.0, 1.0, 99.0]}

        monkeypatch.setattr(ku, "_is_bf16_cpu", lambda: True)
        monkeypatch.setattr(ku._PrecisionTrial, "time_passes", timed)
        return trials

    return compute_bf16


def precisions(folder):
    record = ku.RunFolder(folder).read_record()
    return record["precision"], *[session["precision"] for session in record["sessions"]]


# ---------------------------------------------------------------------------------------
# Which CPU


@pytest.mark.parametrize(
    ("machine", "onednn", "avx512", "amx", "expected"),
    [
        ("x86_64", True, True, False, True),
        ("x86_64", True, False, True, True),
        ("x86_64", True, False, False, False),  # AVX-512 alone: oneDNN emulates bf16
        ("x86_64", False, True, True, False),
        ("aarch64", True, False, False, True),
        ("arm64", False, False, False, False),
    ],
)
def test_a_cpu_computes_bf16_with_avx512_bf16_amx_or_arms_bf16(machine, onednn, avx512, amx, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert is_bf16_cpu() is expected


def test_a_pytorch_that_cannot_tell_means_float32(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not is_bf16_cpu()


def test_a_cpu_without_bf16_has_no_trial_and_says_that_a_forced_bf16_is_slow(tiny, cpu, monkeypatch, capsys):
    trials = cpu()
    monkeypatch.setattr(ku, "_is_bf16_cpu", lambda: False)
    plain, forced = start(tiny(run_name="plain", **SETTINGS)), start(tiny(run_name="f", precision="bf16", **SETTINGS))
    ku.load_bundle(plain), ku.load_bundle(plain, "bf16")
    slow = "precision bf16: this CPU only emulates it, fp32 is many times as fast"
    assert not trials and capsys.readouterr().out.count(slow) == 2
    assert (precisions(plain), precisions(forced)) == (("float32",) * 2, ("bfloat16",) * 2)


# ---------------------------------------------------------------------------------------
# Training


def test_a_run_takes_bf16_where_it_is_quicker_and_agrees_as_if_it_had_been_set(tiny, cpu, whole, capsys):
    expected, trials = whole(tiny, "bf16"), cpu(speedup=1.2)
    capsys.readouterr()
    run = start(tiny(run_name="auto", **SETTINGS))
    out = capsys.readouterr().out
    assert "precision auto: bfloat16 (1.00 s a pass, 1.20 s in float32)" in out and "CPU float32" not in out
    assert len(trials) == 1 and precisions(run) == ("bfloat16",) * 2 and content(run) == expected
    assert ku.RunFolder(run).read_record()["settings"]["precision"] == "auto"
    test = ku.read_competition(tiny())[1]
    ku.predict_test(run, test)
    assert ", bfloat16" in capsys.readouterr().out and len(trials) == 1  # predicts as it was trained


def raise_fault(trial, precision):
    if precision == "bf16":
        raise NotImplementedError("no kernel for bf16")
    return trial.real_pass(precision)


def give_wrong_states(trial, precision):
    states, gradient = trial.real_pass(precision)
    return [state * (1.5 if precision == "bf16" else 1) for state in states], gradient


def give_no_numbers(trial, precision):
    states, gradient = trial.real_pass(precision)
    return states, [part * (torch.nan if precision == "bf16" else 1) for part in gradient]


REFUSED = [
    (1.05, None, r"\(1.00 s a pass, 1.05 s in float32\): it is not clearly quicker"),
    (2.0, raise_fault, r"\(not measured\): NotImplementedError: no kernel for bf16"),
    (2.0, give_wrong_states, r"\(1.00 s a pass, 2.00 s in float32\): hidden states differ by 5.*e-01, 0.3 is allowed"),
    (2.0, give_no_numbers, r"\(1.00 s a pass, 2.00 s in float32\): gradients differ by nan, 0.3 is allowed"),
]


@pytest.mark.parametrize(("speedup", "run_pass", "reason"), REFUSED, ids=["slow", "fault", "states", "nan"])
def test_a_run_stays_in_float32_aloud_where_bf16_fails_its_trial(
    speedup, run_pass, reason, tiny, cpu, whole, monkeypatch, capsys
):
    cpu(speedup)
    if run_pass:
        monkeypatch.setattr(ku._TrainingTrial, "real_pass", ku._TrainingTrial.run_pass, raising=False)
        monkeypatch.setattr(ku._TrainingTrial, "run_pass", run_pass)
    run = start(tiny(run_name="auto", **SETTINGS))
    assert ku.re.search("precision auto: float32, not bfloat16 " + reason, capsys.readouterr().out)
    assert precisions(run) == ("float32",) * 2 and content(run) == whole(tiny, "fp32")


def test_a_wrong_setting_is_an_error_as_ever_and_leaves_no_run_behind(tiny, cpu):
    cpu()
    cfg = tiny(run_name="r", reinit_layers=9)
    with pytest.raises(ku.ConfigError, match="reinit_layers must be at most"):
        start(cfg)
    assert not (ku.Path(cfg.output_dir) / "r").exists()


@pytest.mark.parametrize("head", ["conv1d", "bilstm"])
def test_the_trial_of_real_passes_finds_bf16_near_float32(head, tiny):
    cfg = tiny(head=head, rnn_size=8)
    frame = ku.make_folds(ku.read_competition(cfg)[0], cfg)
    run = ku._TrainingRun(frame, cfg, ku.TimeBudget(cfg, 0))
    run.prepare_data()
    trial = ku._TrainingTrial(run.data, run.cfg)
    results, seconds = trial.time_passes()
    (exact_states,), exact_gradient = results["fp32"]
    (rough_states,), rough_gradient = results["bf16"]
    assert 1e-5 < (exact_states - rough_states).std() / exact_states.std() < 0.02
    exact, rough = (torch.cat([part.flatten() for part in gradient]) for gradient in (exact_gradient, rough_gradient))
    assert 0 < (exact - rough).norm() < 0.05 * exact.norm()
    assert trial.difference_error(results["fp32"], results["bf16"]) is None
    assert min(seconds["fp32"] + seconds["bf16"]) > 0


# ---------------------------------------------------------------------------------------
# The decision is made once


def killed(cfg, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, kill)
        with pytest.raises(Killed):
            start(cfg)
    return cfg


def test_a_run_that_goes_on_keeps_its_bf16_without_another_trial(tiny, often, cpu, whole, monkeypatch, capsys):
    trials = cpu()
    cfg = killed(tiny(run_name="r", **often, **SETTINGS), monkeypatch)
    capsys.readouterr()
    run = start(cfg)
    assert content(run) == whole(tiny, "bf16") and len(trials) == 1
    assert precisions(run) == ("bfloat16",) * 3 and "begun with" not in capsys.readouterr().out


def test_a_run_that_was_begun_in_float32_goes_on_so_where_there_is_bf16(tiny, often, cpu, whole, monkeypatch):
    cfg = killed(tiny(run_name="r", **often, **SETTINGS), monkeypatch)
    trials = cpu()
    run = start(cfg)
    assert content(run) == whole(tiny, "fp32") and not trials and precisions(run) == ("float32",) * 3


def test_a_run_that_goes_on_without_bf16_says_what_has_changed(tiny, often, cpu, monkeypatch, capsys):
    cpu()
    cfg = killed(tiny(run_name="r", **often, **SETTINGS), monkeypatch)
    monkeypatch.setattr(ku, "_is_bf16_cpu", lambda: False)
    assert precisions(start(cfg)) == ("bfloat16", "bfloat16", "float32")
    assert "begun with precision bfloat16, now float32" in capsys.readouterr().out


def test_folds_side_by_side_get_the_precision_of_the_run(tiny, cpu, monkeypatch):
    cpu()
    jobs = []

    def begin(number, kind, job, folder, **options):
        jobs.append(job)
        raise InterruptedError  # the rest is not needed

    monkeypatch.setattr(ku, "_Worker", begin)
    with pytest.raises(InterruptedError):
        start(tiny(run_name="r", fold_processes=2))
    assert jobs[0]["settings"]["precision"] == "bf16"


# ---------------------------------------------------------------------------------------
# Inference


def test_a_bundle_is_predicted_in_bf16_where_its_golden_rows_are_quicker_and_near(runs, cpu, capsys):
    trials = cpu()
    bundle = ku.load_bundle(runs / "one")
    assert "precision auto: bfloat16 (1.00 s a pass, 2.00 s in float32)" in capsys.readouterr().out
    assert [run.cfg.precision for run in bundle.runs] == ["bf16"] and len(trials) == 1
    ku.check_golden(bundle)
    assert "8 golden rows in bfloat16" in capsys.readouterr().out
    ku.load_bundle(runs / "one", "fp32"), ku.load_bundle(runs / "one", "bf16")
    assert len(trials) == 1 and "only emulates" not in capsys.readouterr().out


def test_golden_rows_that_bf16_would_fail_are_predicted_in_float32(runs, cpu, monkeypatch, capsys):
    cpu()
    predict = ku.predict

    def overflowing(model, tokens, cfg, rows=None):
        return predict(model, tokens, cfg, rows) * (np.nan if cfg.precision == "bf16" else 1)

    monkeypatch.setattr(ku, "predict", overflowing)
    bundle = ku.load_bundle(runs / "one")
    reason = r"float32, not bfloat16 \(1.00 s a pass, 2.00 s in float32\): golden rows are nan off, 0.05 is allowed"
    assert ku.re.search(reason, capsys.readouterr().out) and bundle.runs[0].cfg.precision == "fp32"
    ku.check_golden(bundle)


def test_runs_of_a_bundle_have_a_trial_each_and_share_their_model(runs, cpu, monkeypatch, tmp_path):
    trials, built, real = cpu(), [], ku.TextModel.build_empty
    shutil.copytree(runs / "two", tmp_path / "three")
    bundle = ku.Bundle.open(runs / "two")
    bundle.runs += ku.Bundle.open(tmp_path / "three").runs
    monkeypatch.setattr(ku.TextModel, "build_empty", lambda *rest: built.append(real(*rest)) or built[-1])
    bundle.pick_cpu_precisions()
    ku.check_golden(bundle)
    assert [run.cfg.precision for run in bundle.runs] == ["bf16"] * 2 and len(trials) == 2 and len(built) == 1
