"""Every entry of LOSSES and METRICS meets the same contract; each equals its formula in NumPy."""

import math

import numpy as np
import pytest
import torch

import kernel_utils as ku

CFG = ku.Config()


def loss_case(name):
    """A loss with two or three outputs, raw outputs (6, K) and targets it takes."""
    rng = np.random.default_rng(0)
    loss = ku.LOSSES[name](CFG, 3)
    raw = torch.from_numpy(rng.normal(size=(6, loss.width))).float()
    if "multiclass" in loss.tasks:
        return loss, raw, torch.tensor([0, 1, 2, 2, 1, 0])
    if "binary" in loss.tasks:
        return loss, raw, torch.from_numpy(rng.integers(0, 2, (6, 3))).float()
    return loss, raw, torch.from_numpy(rng.normal(size=(6, 3))).float()


@pytest.mark.parametrize("name", ku.LOSSES)
def test_a_loss_gives_one_value_a_row_and_a_gradient_to_every_output(name):
    loss, raw, target = loss_case(name)
    values = loss(raw.requires_grad_(), target)
    assert values.shape == (6,)
    loss.outer(values.mean()).backward()
    assert (raw.grad != 0).all()


@pytest.mark.parametrize("name", ku.LOSSES)
def test_predictions_of_perfect_raw_outputs_are_the_targets(name):
    loss, _, target = loss_case(name)
    if target.ndim == 1:
        perfect, expected = 50 * torch.eye(3)[target], torch.eye(3)[target]
    else:
        perfect, expected = (target, target) if loss.tasks == ("regression",) else (100 * target - 50, target)
    torch.testing.assert_close(loss.predict(perfect), expected)


@pytest.mark.parametrize("name", ku.LOSSES)
def test_no_constant_output_is_better_than_the_starting_one(name):
    loss, _, target = loss_case(name)
    start = loss.start(target)
    assert start.shape == (loss.width,)
    if name == "smooth_l1":
        return  # starts at the mean, which is best for its quadratic part only
    at = loss(start.expand(6, -1), target).mean()
    for k in range(loss.width):
        for shift in (-0.3, 0.3):
            moved = start.clone()
            moved[k] += shift
            assert loss(moved.expand(6, -1), target).mean() > at - 1e-4


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


LOSS_FORMULAS = {
    "mse": lambda r, t: ((r - t) ** 2).mean(1),
    "rmse": lambda r, t: ((r - t) ** 2).mean(1),
    "smooth_l1": lambda r, t: np.where(np.abs(r - t) < 1, 0.5 * (r - t) ** 2, np.abs(r - t) - 0.5).mean(1),
    "bce": lambda r, t: (np.log1p(np.exp(r)) - r * t).mean(1),
    "cross_entropy": lambda r, t: -np.log(softmax(r)[np.arange(len(t)), t]),
}


def test_every_loss_has_a_formula_here():
    assert set(LOSS_FORMULAS) == set(ku.LOSSES)


@pytest.mark.parametrize("name", LOSS_FORMULAS)
def test_a_loss_equals_its_formula(name):
    loss, raw, target = loss_case(name)
    np.testing.assert_allclose(loss(raw, target), LOSS_FORMULAS[name](raw.numpy(), target.numpy()), atol=1e-6)


def test_label_smoothing_spreads_a_share_of_the_target_over_all_classes():
    loss = ku.LOSSES["cross_entropy"](ku.Config(task="multiclass", label_smoothing=0.3), 3)
    _, raw, target = loss_case("cross_entropy")
    spread = 0.7 * np.eye(3)[target] + 0.1
    expected = -(spread * np.log(softmax(raw.numpy()))).sum(1)
    np.testing.assert_allclose(loss(raw, target), expected, atol=1e-6)


def test_bce_refuses_targets_outside_zero_and_one():
    with pytest.raises(ku.DataError, match="loss bce takes targets from 0 to 1, got -2 to 1"):
        ku.LOSSES["bce"](CFG, 1).start(torch.tensor([[-2.0], [1.0]]))


RNG = np.random.default_rng(1)
NUMBERS, GUESSES = RNG.normal(size=(60, 2)), RNG.normal(size=(60, 2))
GRADES = RNG.integers(0, 4, 60)
PROBABILITIES = softmax(RNG.normal(size=(60, 4)))
BITS, CHANCES = RNG.integers(0, 2, (60, 2)).astype(float), RNG.uniform(0.01, 0.99, (60, 2))


def cases(metric):
    """Targets and a perfect and a poor prediction for every task of a metric."""
    for task in ku.METRICS[metric].tasks:
        if task == "multiclass":
            yield GRADES, np.eye(4)[GRADES], PROBABILITIES
        elif task == "regression":
            target = NUMBERS if metric != "qwk" else np.rint(NUMBERS * 2)
            yield target, target, GUESSES
        else:
            target, chances = (BITS, CHANCES) if task == "multilabel" else (BITS[:, :1], CHANCES[:, :1])
            yield target, target, chances


@pytest.mark.parametrize("name", ku.METRICS)
def test_a_perfect_prediction_is_the_best_value_of_a_metric(name):
    metric = ku.METRICS[name]
    for target, perfect, poor in cases(name):
        best, worse = metric(target, perfect), metric(target, poor)
        assert best == pytest.approx(1.0 if metric.better == "higher" else 0.0, abs=1e-6)
        assert ku.improves(name, best, worse) and not ku.improves(name, worse, best)


def rank(x):
    return np.argsort(np.argsort(x)).astype(float)


def kappa(target, guess, n):
    observed, weights = np.zeros((n, n)), (np.arange(n)[:, None] - np.arange(n)) ** 2
    np.add.at(observed, (target, guess), 1)
    chance = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    return 1 - (weights * observed).sum() / (weights * chance).sum()


def pairs_won(target, score):
    """AUC as the share of pairs that are ordered right."""
    return np.mean([a > b for a in score[target == 1] for b in score[target == 0]])


def f1(target, guess):
    return 2 * np.sum(target & guess) / (np.sum(target) + np.sum(guess))


METRIC_FORMULAS = [
    ("rmse", NUMBERS, GUESSES, lambda t, p: math.sqrt(np.mean((t - p) ** 2))),
    ("mae", NUMBERS, GUESSES, lambda t, p: np.mean(np.abs(t - p))),
    ("mcrmse", NUMBERS, GUESSES, lambda t, p: np.mean([math.sqrt(np.mean((t[:, k] - p[:, k]) ** 2)) for k in (0, 1)])),
    ("pearson", NUMBERS, GUESSES, lambda t, p: np.mean([np.corrcoef(t[:, k], p[:, k])[0, 1] for k in (0, 1)])),
    ("spearman", NUMBERS, GUESSES,
     lambda t, p: np.mean([np.corrcoef(rank(t[:, k]), rank(p[:, k]))[0, 1] for k in (0, 1)])),
    ("accuracy", GRADES, PROBABILITIES, lambda t, p: np.mean(t == p.argmax(1))),
    ("accuracy", BITS, CHANCES, lambda t, p: np.mean((p >= 0.5) == (t == 1))),
    ("f1_macro", GRADES, PROBABILITIES, lambda t, p: np.mean([f1(t == k, p.argmax(1) == k) for k in range(4)])),
    ("f1_macro", BITS[:, :1], CHANCES[:, :1], lambda t, p: np.mean([f1(t == 1, p >= 0.5), f1(t == 0, p < 0.5)])),
    ("f1_macro", BITS, CHANCES, lambda t, p: np.mean([f1(t[:, k] == 1, p[:, k] >= 0.5) for k in (0, 1)])),
    ("auc", BITS, CHANCES, lambda t, p: np.mean([pairs_won(t[:, k], p[:, k]) for k in (0, 1)])),
    ("auc", GRADES, PROBABILITIES, lambda t, p: np.mean([pairs_won((t == k).astype(int), p[:, k]) for k in range(4)])),
    ("logloss", GRADES, PROBABILITIES, lambda t, p: -np.mean(np.log(p[np.arange(60), t]))),
    ("logloss", BITS, CHANCES, lambda t, p: -np.mean(t * np.log(p) + (1 - t) * np.log(1 - p))),
    ("qwk", GRADES, PROBABILITIES, lambda t, p: kappa(t, p.argmax(1), 4)),
    ("qwk", GRADES[:, None].astype(float), GUESSES[:, :1] + 1.5,
     lambda t, p: kappa(t[:, 0].astype(int), np.clip(np.rint(p[:, 0]), 0, 3).astype(int), 4)),
]  # fmt: skip


def test_every_metric_has_a_formula_here():
    assert {name for name, *_ in METRIC_FORMULAS} == set(ku.METRICS)


@pytest.mark.parametrize(("name", "target", "prediction", "formula"), METRIC_FORMULAS)
def test_a_metric_equals_its_formula(name, target, prediction, formula):
    assert ku.METRICS[name](target, prediction) == pytest.approx(formula(target, prediction), abs=1e-9)


def test_auc_leaves_out_a_class_that_has_no_row():
    target = np.array([0, 1, 0, 1])
    prediction = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1]])
    assert ku.METRICS["auc"](target, prediction) == pytest.approx(np.mean([0.75, 0.75]))


def test_a_score_that_is_not_a_number_never_counts_as_the_best():
    assert not ku.improves("rmse", math.nan, 0.5)
    assert ku.improves("rmse", 0.5, math.nan)
