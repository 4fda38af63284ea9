"""The scale of targets, weights of classes and rows, one-hot and soft targets, targets that do not fit the task."""

import dataclasses
import json

import comparison
import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import sklearn.utils
import torch
from bundle import save_half
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from conftest import QUIET, engine_of, train_frame, trained

ROWS = np.arange(1, 24, 2)  # those that fold 0 is trained on


def begun(cfg, frame):
    """An engine at the start of fold 0, over 24 rows in two folds."""
    engine = engine_of(cfg, train_frame(24).assign(fold=[0, 1] * 12).assign(**frame))
    engine.setup_fold(0, **QUIET)
    return engine


def losses_of(engine, rows):
    """(logits, mean loss of the step) of rows, without dropout."""
    engine.model.eval()
    engine.accumulate(engine.micro_batches(rows))
    return engine.model(**engine.data.tokens.batch(rows, engine.device)).detach(), engine.mean_loss.item()


def record_and_oof(cfg):
    run = trained(cfg)
    return json.loads((run / "record.json").read_text()), pd.read_csv(run / "oof.csv"), run


# ---------------------------------------------------------------------------------------
# Scale


@pytest.mark.parametrize(("factor", "shift"), [(1e6, 0), (1e-9, 0), (1, 1e9)])
def test_targets_of_any_scale_and_place_are_learnt_alike(factor, shift, tiny, competition):
    _, expected, _ = record_and_oof(tiny(run_name="plain", run_folds="0"))
    frame = train_frame()
    frame.assign(target=frame["target"] * factor + shift).to_csv(competition / "train.csv", index=False)
    folds = pd.Series(ku.make_folds(frame, tiny())["fold"])
    record, oof, run = record_and_oof(tiny(run_name="scaled", run_folds="0"))
    ours, theirs = ((table["prediction"] - table["target"].mean()) / table["target"].std() for table in (oof, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    own = frame["target"][folds != 0]
    scale = record["folds"][0]["target_scale"]
    assert scale["mean"] == pytest.approx([own.mean() * factor + shift], rel=1e-9)
    assert scale["spread"] == pytest.approx([own.std(ddof=0) * factor], rel=1e-5)
    ku.check_golden(ku.Bundle.open(run))


def test_each_target_has_its_own_scale_and_a_constant_one_stays(tiny):
    target = train_frame(24)["target"]
    engine = begun(tiny(target_columns="a,b,c"), {"a": target, "b": target * 1000 + 5, "c": 0.1})
    trained_on = engine.targets.numpy()
    np.testing.assert_allclose(trained_on[:, 0], trained_on[:, 1], atol=1e-5)
    assert trained_on[ROWS, 0].mean() == pytest.approx(0, abs=1e-6) and trained_on[ROWS, 0].std() == pytest.approx(1)
    assert abs(trained_on[:, 2]).max() < 1e-6 and engine.target_scale["spread"][2] == 1
    back = engine.model.predict(engine.targets)
    np.testing.assert_allclose(back, engine.data.targets, rtol=1e-5, atol=1e-5)


def test_standard_errors_are_in_the_units_of_each_target(tiny):
    target, error = train_frame(24)["target"], np.linspace(0.1, 0.5, 24)
    cfg = tiny(target_columns="a,b", loss="gaussian", error_column="standard_error")
    engine = begun(cfg, {"a": target, "b": target * 1000, "standard_error": error})
    spread = target[ROWS].std(ddof=0)
    np.testing.assert_allclose(engine.target_std, error[:, None] / [spread, spread * 1000], rtol=1e-5)


def test_a_loss_that_has_a_link_of_its_own_gets_targets_as_they_are_and_it_is_said(tiny, capsys):
    class Exponential(ku.MseLoss):
        def predict(self, logits):
            return logits.exp()

        def init_bias(self, targets):
            seen.append(targets)
            return targets.abs().mean(0).log()

    seen, target = [], torch.tensor(train_frame()["target"])
    ku.register(ku.LOSSES, "exponential")(Exponential)
    try:
        cfg = tiny(loss="exponential", run_folds="0")
        record, _, _ = record_and_oof(cfg)
        assert torch.isin(seen[-1], target.float()).all() and record["folds"][0]["target_scale"] is None
        assert "loss exponential has a predict of its own: it gets targets as they are" in capsys.readouterr().out
        Exponential.is_standardized = True
        record, _, _ = record_and_oof(dataclasses.replace(cfg, run_name="told"))
        assert seen[-1].mean().item() == pytest.approx(0, abs=1e-6) and record["folds"][0]["target_scale"]
    finally:
        del ku.LOSSES["exponential"]


def test_weights_in_fp16_keep_the_scale_in_full(tmp_path):
    scale = torch.tensor([1e9 + 1], dtype=torch.float64)
    save_file({"target_mean": scale, "weight": torch.ones(2)}, tmp_path / "whole")
    save_half(tmp_path / "whole", tmp_path / "half")
    half = load_file(tmp_path / "half")
    assert half["target_mean"] == scale and half["weight"].dtype == torch.float16


# ---------------------------------------------------------------------------------------
# Weights


LABELS = ["x"] * 8 + ["y"] * 12 + ["z"] * 4


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_balanced_classes_weigh_as_in_scikit_learn_and_the_start_is_their_best_constant(loss, tiny):
    cfg = tiny(task="multiclass", class_weight="balanced", loss=loss)
    engine = engine_of_classes(cfg, LABELS)
    labels = np.array(LABELS)[ROWS]
    expected = sklearn.utils.compute_sample_weight("balanced", labels)
    np.testing.assert_allclose(engine.sample_weights[ROWS], expected, rtol=1e-5)
    shares = engine.model.output.bias.softmax(0).detach().numpy()
    np.testing.assert_allclose(shares, 1 / 3, atol=0.1)
    logits, loss_value = losses_of(engine, ROWS)
    rows = engine.model.loss(logits, engine.targets[ROWS]).numpy()
    assert loss_value == pytest.approx((rows * expected).mean(), rel=1e-4)


def engine_of_classes(cfg, labels):
    frame = train_frame(24).assign(fold=[0, 1] * 12, target=labels)
    classes = cfg.class_labels(frame)
    engine = engine_of(dataclasses.replace(cfg, task="multilabel", loss="bce", class_weight=""), frame.assign(target=0))
    data = engine.data._replace(targets=cfg.encode_targets(frame, classes), n_outputs=len(cfg.output_names(classes)))
    engine = ku.OptimizerStep(data, cfg.resolved(ku._BackboneLoader(cfg.backbone, cfg).config))
    engine.setup_fold(0, **QUIET)
    return engine


@pytest.mark.parametrize("numbers", ["balanced", "1,5,0.5"])
def test_positives_of_each_label_weigh_as_their_number_says(numbers, tiny):
    rng = np.random.default_rng(0)
    hot = (rng.random((24, 3)) < [0.2, 0.5, 0.8]).astype(float)
    cfg = tiny(task="multilabel", target_columns="a,b,c", class_weight=numbers)
    engine = begun(cfg, dict(zip("abc", hot.T, strict=True)))
    n_positive = hot[ROWS].sum(0)
    ratio = (12 - n_positive) / n_positive if numbers == "balanced" else np.array([1, 5, 0.5])
    logits, value = losses_of(engine, ROWS)
    plain = F.binary_cross_entropy_with_logits(
        logits, torch.tensor(hot[ROWS]).float(), pos_weight=torch.tensor(ratio).float(), reduction="none"
    )
    mean_weight = (n_positive * ratio + 12 - n_positive) / 12
    assert value == pytest.approx((plain.numpy() / mean_weight).mean(), rel=1e-4)


@pytest.mark.parametrize("numbers", [4, "1,4", [2, 8]])
def test_one_number_or_two_weigh_the_classes_of_a_binary_task(numbers, tiny):
    engine = engine_of_classes(tiny(task="binary", class_weight=numbers), ["0", "1", "0", "1"] + ["0"] * 14 + ["1"] * 6)
    weights = engine.sample_weights[ROWS].numpy()
    assert weights[-1] / weights[5] == pytest.approx(4) and weights.mean() == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(class_weight="balance"), "must be balanced, or numbers above 0 such as 1,5; got balance"),
        (dict(class_weight="1,0"), "numbers above 0"),
        (dict(class_weight="2", task="regression"), "task is regression: see weight_column"),
    ],
)
def test_a_class_weight_that_means_nothing_is_refused(settings, told, tiny):
    with pytest.raises(ku.ConfigError, match=told):
        tiny(**(dict(task="multiclass") | settings))


def test_a_wrong_number_of_class_weights_names_the_classes(tiny):
    with pytest.raises(ku.ConfigError, match="each of 3, in this order: x, y, z; got 1, 2"):
        tiny(task="multiclass", class_weight="1,2").check_class_weight(["x", "y", "z"])


def test_rows_of_weight_0_are_as_if_they_were_left_out(tiny):
    """The other rows weigh 1 on average, and scale and start are theirs."""
    frame = train_frame(24)
    keep = np.arange(24) % 4 == 1  # every second training row
    target = frame["target"].where(keep, 1e6)
    engine = begun(tiny(weight_column="weight"), {"target": target, "weight": np.where(keep, 3.0, 0.0)})
    kept = frame["target"][keep]
    assert engine.target_scale["mean"] == pytest.approx([kept.mean()])
    assert engine.target_scale["spread"] == pytest.approx([kept.std(ddof=0)])
    assert engine.model.output.bias.item() == pytest.approx(0, abs=1e-5)
    logits, value = losses_of(engine, ROWS)
    errors = (logits[:, 0] - engine.targets[ROWS, 0])[keep[ROWS]] ** 2
    assert value == pytest.approx(errors.mean().item(), rel=1e-5)


def test_weights_multiply_those_of_standard_errors(tiny):
    weight, error = np.linspace(0, 2, 24), np.linspace(0.1, 0.5, 24)
    cfg = tiny(weight_column="weight", error_column="standard_error", error_weights=True)
    engine = begun(cfg, {"weight": weight, "standard_error": error})
    expected = weight / (error**2 + (error[ROWS] ** 2).mean())
    np.testing.assert_allclose(engine.sample_weights, expected / expected[ROWS].mean(), rtol=1e-5)


def test_a_fold_whose_training_rows_weigh_nothing_is_refused(tiny):
    with pytest.raises(ku.DataError, match="column weight: expected a weight above 0 in a training row of fold 0"):
        begun(tiny(weight_column="weight"), {"weight": [1, 0] * 12})


def test_a_run_does_not_go_on_with_other_weights_of_rows(tiny, competition):
    cfg = tiny(weight_column="weight", run_name="r", run_folds="0")
    train_frame().assign(weight=1.0).to_csv(competition / "train.csv", index=False)
    trained(cfg)
    train_frame().assign(weight=np.arange(40)).to_csv(competition / "train.csv", index=False)
    with pytest.raises(ku.ConfigError, match="the weights of rows: not as when the run began"):
        trained(cfg)


# ---------------------------------------------------------------------------------------
# Columns of classes


def write_classes(competition, shares):
    frame = train_frame().drop(columns="target")
    frame.assign(**dict(zip("abc", shares.T, strict=True))).to_csv(competition / "train.csv", index=False)
    test = pd.read_csv(competition / "test.csv", dtype=str)[["id"]]
    test.assign(c=0, a=1, b=0).to_csv(competition / "sample_submission.csv", index=False)


CLASS_COLUMNS = dict(task="multiclass", target_columns="a,b,c")
SHARES = np.random.default_rng(0).dirichlet(np.ones(3), 40)


def test_columns_of_0_and_1_are_trained_as_labels_are(tiny, competition):
    hot = np.eye(3, dtype=int)[np.arange(40) % 3]
    write_classes(competition, hot)
    _, oof, run = record_and_oof(tiny(**CLASS_COLUMNS, metric="logloss", run_name="hot"))
    submission = pd.read_csv(run / "submission.csv")
    assert list(submission) == ["id", "c", "a", "b"]
    np.testing.assert_allclose(submission[["a", "b", "c"]].sum(axis=1), 1, atol=1e-6)
    frame = train_frame().assign(target=np.array(list("abc"))[np.arange(40) % 3])
    frame.to_csv(competition / "train.csv", index=False)
    (competition / "sample_submission.csv").unlink()
    _, labelled, _ = record_and_oof(tiny(task="multiclass", metric="logloss", run_name="labels"))
    names = ["fold", "prediction_a", "prediction_b", "prediction_c"]
    pd.testing.assert_frame_equal(oof[names], labelled[names])


@pytest.mark.parametrize("metric", ["logloss", "accuracy"])
def test_soft_targets_are_trained_on_and_scored_by_their_likeliest_class(metric, tiny, competition):
    write_classes(competition, SHARES)
    cfg = tiny(**CLASS_COLUMNS, metric=metric)
    record, oof, _ = record_and_oof(cfg)
    truth, p = (oof[[f"{kind}_{name}" for name in "abc"]].to_numpy() for kind in ("target", "prediction"))
    scores = {"logloss": -(truth * np.log(p)).sum(1).mean(), "accuracy": (truth.argmax(1) == p.argmax(1)).mean()}
    assert record["oof"]["last"] == pytest.approx(scores[metric], rel=1e-5)
    np.testing.assert_allclose(truth, SHARES[oof["id"]], rtol=1e-9)
    read, _, _ = comparison.encode_oof(oof, cfg, list("abc"))
    assert ku.METRICS[metric](read, p) == pytest.approx(scores[metric], rel=1e-5)
    assert ku.METRICS[metric].per_row(read, p).mean() == pytest.approx(scores[metric], rel=1e-5)


def test_rounded_probabilities_are_divided_by_their_sum_and_others_are_named(tiny, competition):
    write_classes(competition, SHARES.round(2))
    frame, _, _ = ku.read_competition(tiny(**CLASS_COLUMNS))
    np.testing.assert_allclose(frame[list("abc")].sum(axis=1), 1)
    shares = SHARES.copy()
    shares[3] *= 1.1
    write_classes(competition, shares)
    with pytest.raises(ku.DataError, match=r"column a \+ b \+ c: expected 1.*got row 4 \(id 003\): '1.1'"):
        ku.read_competition(tiny(**CLASS_COLUMNS))
    shares[3] = [1.5, -0.5, 0]
    write_classes(competition, shares)
    with pytest.raises(
        ku.DataError, match=r"column b: expected a probability, from 0 to 1, got row 4 \(id 003\): '-0.5'"
    ):
        ku.read_competition(tiny(**CLASS_COLUMNS))


# ---------------------------------------------------------------------------------------
# Task and target that do not fit


@pytest.mark.parametrize(
    ("task", "cells", "told"),
    [
        ("multiclass", np.arange(60) / 7, "60 different values in 60 rows; set task regression"),
        ("multiclass", [f"w{i}" for i in range(60)], "60 different values in 60 rows; name another"),
        ("binary", list("abc") * 20, "got 3 in 60 rows: 'a' 20, 'b' 20, 'c' 20; set task multiclass"),
        ("regression", ["low", "high"] * 30, r"a finite number \(set task binary for labels\)"),
        ("regression", ["low", "mid", "high"] * 20, r"a finite number \(set task multiclass for labels\)"),
        ("multilabel", [0, 1, 2, 3] * 15, r"0 or 1 \(set task multiclass, or regression for amounts\)"),
    ],
)
def test_a_target_that_does_not_fit_names_the_task_that_does(task, cells, told, tiny, competition):
    train_frame(60).assign(target=cells).to_csv(competition / "train.csv", index=False)
    with pytest.raises(ku.DataError, match=told):
        ku.read_competition(tiny(task=task))


def test_half_grades_are_classes_and_numbers_of_0_and_1_may_be_labels(tiny, competition, capsys):
    train_frame().assign(target=[1, 1.5, 2, 2.5] * 10).to_csv(competition / "train.csv", index=False)
    assert tiny(task="multiclass").class_labels(ku.read_competition(tiny(task="multiclass"))[0])[1] == "1.5"
    train_frame().assign(target=[0, 1] * 20).to_csv(competition / "train.csv", index=False)
    ku.read_competition(tiny())
    assert "only 0 and 1, taken as numbers; task binary predicts probabilities" in capsys.readouterr().out
