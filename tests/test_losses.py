"""Every entry of LOSSES and METRICS meets the same contract; each equals its formula in NumPy."""

import functools
import math

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

CFG = ku.Config()


SETTINGS = {"focal": dict(task="multilabel"), "coral": dict(levels=(1, 4))}
ERRORS, REAL = torch.tensor([[0], [0.1], [0.2], [0.3], [0.4], [0.5]]), torch.ones(6, dtype=torch.bool)


def loss_case(name):
    """A loss with its extras, raw outputs (6, K) and targets it takes."""
    rng = np.random.default_rng(0)
    loss = ku.LOSSES[name](ku.Config(**SETTINGS.get(name, {})), 1 if name == "coral" else 3)
    raw = torch.from_numpy(rng.normal(size=(6, loss.num_logits))).float()
    given = dict(target_std=ERRORS, valid_mask=REAL)
    extras = {what: given[what] for what in loss.extra_inputs if what in given}
    call = functools.partial(loss, **extras)
    if name == "coral":
        return loss, call, raw, torch.tensor([[1.0], [2], [4], [4], [3], [1]])
    if loss.tasks == ("multiclass",):
        return loss, call, raw, torch.tensor([0, 1, 2, 2, 1, 0])
    if "binary" in loss.tasks:
        return loss, call, raw, torch.from_numpy(rng.integers(0, 2, (6, 3))).float()
    return loss, call, raw, torch.from_numpy(rng.normal(size=(6, 3))).float()


@pytest.mark.parametrize("name", ku.LOSSES)
def test_a_loss_gives_one_value_a_row_and_a_gradient_to_every_output(name):
    loss, call, raw, target = loss_case(name)
    values = call(raw.requires_grad_(), target)
    assert values.shape == (6,)
    loss.reduce(values.mean()).backward()
    assert (raw.grad != 0).all()


def perfect_outputs(name, loss, target):
    if name == "coral":
        return 100 * (target > torch.arange(1, 4)).float() - 50
    if name == "gaussian":
        return torch.cat([target, torch.zeros_like(target)], 1)
    if target.ndim == 1:
        return 50 * torch.eye(3)[target]
    return target if loss.tasks == ("regression",) else 100 * target - 50


@pytest.mark.parametrize("name", ku.LOSSES)
def test_predictions_of_perfect_raw_outputs_are_the_targets(name):
    loss, _, _, target = loss_case(name)
    got, expected = loss.predict(perfect_outputs(name, loss, target)), target
    if name == "coral":
        assert torch.equal(got.round(), target)
        return
    torch.testing.assert_close(got, torch.eye(3)[target] if target.ndim == 1 else expected)


# These start at the mean or at the shares of classes, which are best for a part of the loss only
APPROXIMATE_STARTS = {"smooth_l1", "mse_rank", "gaussian", "focal"}


@pytest.mark.parametrize("name", [name for name in ku.LOSSES if name not in APPROXIMATE_STARTS])
def test_no_constant_output_is_better_than_the_starting_one(name):
    loss, call, _, target = loss_case(name)
    start = loss.init_bias(target)
    layer = loss.output_layer(1)
    with torch.no_grad():
        layer.bias.copy_(start)

    def value(bias):
        with torch.no_grad():
            layer.bias.copy_(bias)
            return call(layer(torch.zeros(6, 1)), target).mean()

    at = value(start)
    for k in range(len(start)):
        for shift in (-0.3, 0.3):
            moved = start.clone()
            moved[k] += shift
            assert value(moved) > at - 1e-4


# ---------------------------------------------------------------------------------------
# Formulas of the losses


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_ranking_adds_the_cross_entropy_of_pairs_without_ties_and_fillers():
    raw, target = np.random.default_rng(1).normal(size=(2, 5, 1))
    target[3] = target[1]
    real = np.array([True, True, True, True, False])
    loss = ku.LOSSES["mse_rank"](ku.Config(rank_weight=0.7), 1)
    got = loss(*map(torch.from_numpy, (raw, target)), valid_mask=torch.from_numpy(real))
    for i in range(4):
        pairs = []
        for j in range(4):
            if target[i, 0] != target[j, 0]:
                p, q = sigmoid(target[i, 0] - target[j, 0]), sigmoid(raw[i, 0] - raw[j, 0])
                pairs.append(-p * np.log(q) - (1 - p) * np.log(1 - q))
        assert got[i] == pytest.approx((raw[i, 0] - target[i, 0]) ** 2 + 0.7 * np.mean(pairs))


def test_a_batch_of_one_row_or_of_ties_has_no_pairs():
    loss = ku.LOSSES["mse_rank"](ku.Config(), 1)
    raw = torch.tensor([[1.0], [2.0]])
    for rows in (1, 2):
        values = loss(raw[:rows], torch.zeros(rows, 1), valid_mask=torch.ones(rows, dtype=torch.bool))
        assert torch.equal(values, raw[:rows, 0] ** 2)


def test_gaussian_is_the_divergence_from_the_distribution_of_the_target_but_for_a_constant():
    rng = np.random.default_rng(2)
    mean, log_spread, target = rng.normal(size=(3, 6, 2))
    error = rng.uniform(0.1, 1, 6)
    loss = ku.LOSSES["gaussian"](ku.Config(), 2)
    raw = torch.from_numpy(np.concatenate([mean, log_spread], 1))
    got = loss(raw, torch.from_numpy(target), target_std=torch.from_numpy(error)[:, None])
    normal = torch.distributions.Normal
    told = normal(torch.from_numpy(target), torch.from_numpy(error)[:, None].expand(6, 2))
    full = torch.distributions.kl_divergence(told, normal(torch.from_numpy(mean), torch.from_numpy(log_spread).exp()))
    torch.testing.assert_close(got, (full + told.scale.log() + 0.5).mean(1))
    np.testing.assert_array_equal(loss.predict(raw), mean)
    sure = loss(raw, torch.from_numpy(target), target_std=torch.zeros(6, 1, dtype=torch.double))
    likelihood = scipy.stats.norm.logpdf(target, mean, np.exp(log_spread)).mean(1)
    np.testing.assert_allclose(sure, -likelihood - np.log(2 * np.pi) / 2)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_is_cross_entropy_times_a_power_of_what_the_truth_lacks(gamma):
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(6, 3))
    classes, hot = np.array([0, 1, 2, 2, 1, 0]), rng.integers(0, 2, (6, 3)).astype(float)
    p = softmax(raw)[np.arange(6), classes]
    loss = ku.LOSSES["focal"](ku.Config(task="multiclass", loss="focal", focal_gamma=gamma), 3)
    np.testing.assert_allclose(loss(torch.from_numpy(raw), torch.from_numpy(classes)), -((1 - p) ** gamma) * np.log(p))
    np.testing.assert_allclose(loss.predict(torch.from_numpy(raw)), softmax(raw))
    p = np.where(hot == 1, sigmoid(raw), 1 - sigmoid(raw))
    loss = ku.LOSSES["focal"](ku.Config(task="multilabel", loss="focal", focal_gamma=gamma), 3)
    got = loss(torch.from_numpy(raw), torch.from_numpy(hot))
    np.testing.assert_allclose(got, (-((1 - p) ** gamma) * np.log(p)).mean(1))


def coral(levels=(2, 6)):
    return ku.LOSSES["coral"](ku.Config(loss="coral", levels=levels), 1)


def test_coral_sums_the_cross_entropies_of_being_above_each_level():
    raw = -np.sort(-np.random.default_rng(4).normal(size=(7, 4)), 1)
    target = np.array([2, 3, 4, 5, 6, 6, 2])
    expected = [
        sum(-np.log(sigmoid(r) if y > 2 + k else 1 - sigmoid(r)) for k, r in enumerate(row))
        for row, y in zip(raw, target, strict=True)
    ]
    got = coral()(torch.from_numpy(raw), torch.from_numpy(target[:, None].astype(float)))
    np.testing.assert_allclose(got, expected)


def test_corals_outputs_share_one_weight_vector_and_never_rise():
    layer, x = coral().output_layer(8), torch.randn(50, 8)
    for _ in range(20):
        with torch.no_grad():
            layer.bias.normal_(std=5)
            layer.weight.normal_()
        raw = layer(x)
        assert raw.shape == (50, 4) and (raw.diff(dim=1) <= 0).all()
        torch.testing.assert_close(raw - raw[:1], (raw - raw[:1])[:, :1].expand(-1, 4), atol=1e-4, rtol=1e-4)


def test_corals_prediction_rounds_to_the_number_of_positive_logits_and_rises_with_the_score():
    bias = torch.tensor([3.0, 1.0, -0.5, -4.0], dtype=torch.double)
    score = torch.linspace(-12, 12, 4001, dtype=torch.double)[:, None]
    predicted = coral().predict(score + bias)
    assert predicted.shape == (4001, 1) and (predicted.diff(dim=0) >= 0).all()
    np.testing.assert_array_equal(predicted.round()[:, 0], 2 + (score + bias > 0).sum(1))
    assert predicted.min() == 2 and predicted.max() == 6 and predicted.diff(dim=0).max() < 0.02


def test_corals_start_is_the_shares_above_each_level():
    target = torch.tensor([2.0, 2, 3, 5, 5, 6, 6, 6])[:, None]  # none has level 4
    loss = coral()
    layer = loss.output_layer(3)
    with torch.no_grad():
        layer.bias.copy_(loss.init_bias(target))
    got = layer(torch.zeros(1, 3)).sigmoid()[0]
    torch.testing.assert_close(got, torch.tensor([6 / 8, 5 / 8, 5 / 8, 3 / 8]), atol=6e-3, rtol=0)


@pytest.mark.parametrize("target", [[2, 7], [1, 3], [2.5, 3]])
def test_coral_refuses_targets_that_are_no_levels(target):
    with pytest.raises(ku.DataError, match="loss coral takes whole numbers from 2 to 6, as levels says; got"):
        coral().check_targets(torch.tensor(target).float()[:, None])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss="coral"), "loss coral needs levels"),
        (dict(loss="coral", levels="6,1"), "loss coral needs levels"),
        (dict(loss="coral", levels="1,6", target_columns="a,b"), "loss coral takes one target column"),
        (dict(error_weights=True), "error_weights needs error_column"),
        (dict(label_noise=1.0), "label_noise needs error_column"),
        (dict(error_column="standard_error"), "error_column does nothing without"),
        (dict(error_column="e", error_weights=True, task="binary"), "error_column is for regression"),
    ],
)
def test_settings_of_losses_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ku.ConfigError, match=message):
        ku.Config(**settings)


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


def test_every_loss_has_a_formula_here_or_above():
    assert set(LOSS_FORMULAS) | {"mse_rank", "gaussian", "focal", "coral"} == set(ku.LOSSES)


@pytest.mark.parametrize("name", LOSS_FORMULAS)
def test_a_loss_equals_its_formula(name):
    loss, _, raw, target = loss_case(name)
    np.testing.assert_allclose(loss(raw, target), LOSS_FORMULAS[name](raw.numpy(), target.numpy()), atol=1e-6)


def test_label_smoothing_spreads_a_share_of_the_target_over_all_classes():
    loss = ku.LOSSES["cross_entropy"](ku.Config(task="multiclass", label_smoothing=0.3), 3)
    _, _, raw, target = loss_case("cross_entropy")
    spread = 0.7 * np.eye(3)[target] + 0.1
    expected = -(spread * np.log(softmax(raw.numpy()))).sum(1)
    np.testing.assert_allclose(loss(raw, target), expected, atol=1e-6)


def test_bce_refuses_targets_outside_zero_and_one():
    with pytest.raises(ku.DataError, match="loss bce takes targets from 0 to 1, got -2 to 1"):
        ku.LOSSES["bce"](CFG, 1).check_targets(torch.tensor([[-2.0], [1.0]]))


RNG = np.random.default_rng(1)
NUMBERS, GUESSES = RNG.normal(size=(60, 2)), RNG.normal(size=(60, 2))
GRADES = RNG.integers(0, 4, 60)
PROBABILITIES = softmax(RNG.normal(size=(60, 4)))
BITS, CHANCES = RNG.integers(0, 2, (60, 2)).astype(float), RNG.uniform(0.01, 0.99, (60, 2))


GROUPS = pd.Series(np.arange(60) % 4)  # of rows, for the metrics that take them
ROWS_OF_GROUPS = [np.flatnonzero(name == GROUPS) for name in range(4)]


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
        best, worse = (metric(target, prediction, group=GROUPS) for prediction in (perfect, poor))
        assert best == pytest.approx(1.0 if metric.better == "higher" else 0.0, abs=1e-6)
        assert metric.is_better(best, worse) and not metric.is_better(worse, best)


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
    ("group_spearman", NUMBERS, GUESSES,
     lambda t, p: np.mean([np.corrcoef(rank(t[g, k]), rank(p[g, k]))[0, 1] for g in ROWS_OF_GROUPS for k in (0, 1)])),
    ("accuracy", GRADES, PROBABILITIES, lambda t, p: np.mean(t == p.argmax(1))),
    ("accuracy", BITS, CHANCES, lambda t, p: np.mean((p >= 0.5) == (t == 1))),
    ("f1_macro", GRADES, PROBABILITIES, lambda t, p: np.mean([f1(t == k, p.argmax(1) == k) for k in range(4)])),
    ("f1_macro", BITS[:, :1], CHANCES[:, :1], lambda t, p: np.mean([f1(t == 1, p >= 0.5), f1(t == 0, p < 0.5)])),
    ("f1_macro", BITS, CHANCES, lambda t, p: np.mean([f1(t[:, k] == 1, p[:, k] >= 0.5) for k in (0, 1)])),
    ("auc", BITS, CHANCES, lambda t, p: np.mean([pairs_won(t[:, k], p[:, k]) for k in (0, 1)])),
    ("auc", GRADES, PROBABILITIES, lambda t, p: np.mean([pairs_won((t == k).astype(int), p[:, k]) for k in range(4)])),
    ("map3", GRADES, PROBABILITIES,
     lambda t, p: np.mean([[1, 1 / 2, 1 / 3, 0][(p[i] > p[i, t[i]]).sum()] for i in range(60)])),
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
    score = ku.METRICS[name](target, prediction, group=GROUPS)
    assert score == pytest.approx(formula(target, prediction), abs=1e-9)


def test_auc_leaves_out_a_class_that_has_no_row():
    target = np.array([0, 1, 0, 1])
    prediction = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.65, 0.25, 0.1]])
    assert ku.METRICS["auc"](target, prediction) == pytest.approx(np.mean([0.75, 0.75]))


def test_a_score_that_is_not_a_number_never_counts_as_the_best():
    assert not ku.METRICS["rmse"].is_better(math.nan, 0.5)
    assert ku.METRICS["rmse"].is_better(0.5, math.nan)


def squared(self, logits, target):
    return ((logits - target) ** 2).mean(1)


def check_own_loss(build, monkeypatch, **methods):
    monkeypatch.setitem(ku.LOSSES, "own", type("OwnLoss", (ku.Loss,), {"__call__": squared} | methods))
    model, tokens = build("bert")
    model.loss = ku.LOSSES["own"](ku.Config(), 1)
    rdrop = 0.0 if "reduce" in methods else 1.0
    cfg = ku.Config(loss="own", rdrop=rdrop, backbone_dropout=0.1)
    trial = ku._ModelTrial(model, tokens, cfg, torch.float32)
    trial.check_loss(torch.tensor([[1.0], [3.0]]), {}, 1)


@pytest.mark.filterwarnings("error")
def test_a_loss_of_ones_own_passes_the_trial(build, monkeypatch):
    check_own_loss(build, monkeypatch)


@pytest.mark.parametrize(
    ("method", "function", "problem"),
    [
        ("__call__", lambda self, x, y: squared(self, x, y).mean(), r"\(B,\), here \(2,\); it gave shape \(\)"),
        ("__call__", lambda self, x, y: (x - y) ** 2, r"\(B,\), here \(2,\); it gave shape \(2, 1\)"),
        ("__call__", lambda self, x, y: 0.5, "it gave float"),
        ("__call__", lambda self, x, y: squared(self, x, y) * math.nan, "it gave NaN"),
        ("__call__", lambda self, x, y: squared(self, x.detach(), y), "gives no gradient"),
        ("predict", lambda self, x: x[:, 0], r"\(B, n_outputs\), here \(2, 1\); it gave shape \(2,\)"),
        ("reduce", lambda self, mean: mean[None], r"it gave shape \(1,\)"),
        ("distance", lambda self, x, y: (x - y).mean(), r"it gave shape \(\)"),
    ],
)
def test_a_loss_of_ones_own_that_gives_another_shape_is_refused(method, function, problem, build, monkeypatch):
    with pytest.raises(ku.KitError, match=rf"loss own \(OwnLoss\) .*{problem}"):
        check_own_loss(build, monkeypatch, **{method: function})


def test_a_loss_of_ones_own_that_moves_with_its_batch_is_warned_of(build, monkeypatch):
    def broadcast(self, logits, target):  # (B,) - (B, 1) is (B, B)
        return ((logits[:, 0] - target) ** 2).mean(1)

    with pytest.warns(UserWarning, match=r"loss own \(OwnLoss\): the loss of a row moves by .* with its batch"):
        check_own_loss(build, monkeypatch, __call__=broadcast)


@pytest.mark.parametrize("bias", [0.0, torch.zeros(()), torch.tensor([math.nan])])
def test_a_first_bias_of_another_shape_is_refused(bias, backbone_folder, tokenizer):
    cfg, folder = ku.Config(max_length=32), backbone_folder("tiny")
    loss = ku.MseLoss(cfg, 1)
    loss.init_bias = lambda targets: bias
    with pytest.raises(ku.KitError, match=r"init_bias of loss .*\(MseLoss\) must give .* \(K,\), here \(1,\)"):
        ku.TextModel.build(cfg, folder, loss, tokenizer, torch.zeros(2, 1))


@pytest.mark.parametrize("factor", [math.nan, -1.0, None, "1", torch.ones(())])
def test_a_schedule_that_gives_no_factor_is_refused(factor, monkeypatch):
    monkeypatch.setitem(ku.SCHEDULES, "own", lambda progress: factor)
    with pytest.raises(ku.KitError, match="schedule own must give a finite number, not below 0"):
        ku._learning_rates([{"lr": 1.0}], 10, ku.Config(schedule="own"))
