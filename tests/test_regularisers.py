"""Adversarial steps, averages of weights, R-Drop and mixout against formulas written out."""

import copy
import json

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from conftest import QUIET, engine_of, train_frame, trained, weights

ROWS = np.array([1, 3, 5, 7, 9, 11, 13, 15])  # of the other fold than 0


@pytest.fixture
def begun(tiny):
    """Function: settings -> engine whose fold 0 begins, in training mode, without dropout."""

    def make(**settings):
        engine = engine_of(tiny(epochs=4, lr=1e-2, **settings))
        engine.setup_fold(0, **QUIET)
        engine.model.train()
        return engine

    return make


def gradients(model, engine, rows=ROWS):
    """The gradient of the mean loss of some rows, by plain autograd over padded rows; name -> tensor."""
    model = copy.deepcopy(model)
    model.zero_grad()
    raw = model(**engine.data.tokens.batch(rows, engine.device))
    engine.model.loss.reduce(engine.model.loss(raw, engine.targets[rows]).mean()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def left_by_the_step(engine, rows=ROWS):
    """The gradients with which the optimiser steps; name -> tensor."""
    engine.is_adversarial = engine.adversary is not None
    engine.update = lambda: None  # it would use them up
    engine.make_step(rows)
    return {name: weight.grad for name, weight in engine.model.named_parameters() if weight.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4, msg=name)


# ---------------------------------------------------------------------------------------
# Adversarial steps


def attacked_by_hand(engine, loss=None):
    """Gradients of AWP or FGM, from the formulas in NumPy."""
    cfg, model = engine.cfg, engine.model
    clean, moved = gradients(model, engine), copy.deepcopy(model)
    table = "backbone.embeddings.word_embeddings.weight"
    for name, weight in moved.named_parameters():
        if weight.ndim < 2 or (cfg.fgm and name != table):
            continue
        w, g = weight.detach().numpy().astype(float), clean[name].numpy().astype(float)
        length = np.sqrt((g**2).sum())
        if cfg.fgm:
            new = w + cfg.fgm * g / length
        else:
            new = np.clip(w + cfg.awp * g / length * abs(w), w - cfg.awp_eps * abs(w), w + cfg.awp_eps * abs(w))
        weight.data = torch.from_numpy(new).float()
    there = gradients(moved, engine)
    return {name: there[name] + clean[name] * bool(cfg.fgm) for name in there}


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [dict(awp=1.0, awp_eps=0.05), dict(awp=0.3, awp_eps=1.0), dict(fgm=2.0)],
    ids=["awp within its bound", "awp", "fgm"],
)
def test_an_adversarial_step_has_the_gradients_of_the_formula_whatever_the_micro_batches(settings, micro, begun):
    engine = begun(micro_batch_size=micro, **settings)
    before = copy.deepcopy(engine.model.state_dict())
    expected = attacked_by_hand(engine)
    assert_same(left_by_the_step(engine), expected)
    clean = gradients(engine.model, engine)
    assert max((clean[name] - expected[name]).norm() / clean[name].norm() for name in clean) > 1e-3
    assert all(torch.equal(before[name], weight) for name, weight in engine.model.state_dict().items())


@pytest.mark.parametrize(("attack", "copies"), [("awp", 1), ("fgm", 2)])
def test_a_loss_that_is_the_root_of_a_mean_takes_it_over_the_rows_that_give_the_gradients(
    attack, copies, begun, monkeypatch
):
    squared, rooted = (begun(loss=loss, **{attack: 1.0}) for loss in ("mse", "rmse"))
    expected, taken = left_by_the_step(squared), {}
    mean = squared.mean_loss.item() / copies  # of squared errors: at moved weights, or there and before

    def take(parameters, _):
        taken.update({name: w.grad.clone() for name, w in rooted.model.named_parameters() if w.grad is not None})
        return torch.ones(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", take)
    rooted.first_adversarial_step = 0
    loss, _, adversarial, _ = rooted(0, ROWS).values
    assert_same(taken, {name: slope / (2 * np.sqrt(mean)) for name, slope in expected.items()})
    clean = squared.clean_loss.item()
    there = squared.mean_loss.item() - clean if copies == 2 else squared.mean_loss.item()
    assert [loss.item(), adversarial.item()] == pytest.approx([np.sqrt(clean), np.sqrt(there)], rel=1e-4)


@pytest.mark.parametrize("attack", ["awp", "fgm"])
def test_weights_come_back_to_the_bit_when_the_second_pass_fails(attack, begun, monkeypatch):
    engine, calls = begun(**{attack: 0.5}), []
    before, forward_backward = weights(engine), ku.OptimizerStep.forward_backward

    def failing(engine, inputs, rows):
        calls.append(not torch.equal(weights(engine), before))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward_backward(engine, inputs, rows)

    monkeypatch.setattr(ku.OptimizerStep, "forward_backward", failing)
    with pytest.raises(KeyboardInterrupt):
        left_by_the_step(engine)
    assert calls == [False, True] and torch.equal(weights(engine), before)


@pytest.mark.parametrize("attack", ["awp", "fgm"])
def test_memory_that_runs_out_in_the_second_pass_gives_the_same_gradients_in_smaller_parts(attack, begun, monkeypatch):
    expected = left_by_the_step(begun(**{attack: 0.5}))
    engine, before, forward_backward = begun(**{attack: 0.5}), [], ku.OptimizerStep.forward_backward

    def full(engine, inputs, rows):
        before.append(len(rows))
        if len(before) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward_backward(engine, inputs, rows)

    monkeypatch.setattr(ku.OptimizerStep, "forward_backward", full)
    assert_same(left_by_the_step(engine), expected)
    assert before == [8, 8, 4, 4, 4, 4]


def test_a_gradient_that_is_zero_or_not_finite_moves_nothing():
    model = torch.nn.Module()
    model.a, model.b, model.c, model.d = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(4))
    model.a.grad, model.b.grad = torch.zeros(2, 2), torch.tensor([[1.0, torch.inf], [0, 1]])
    model.c.grad = torch.tensor([[3.0, 0], [0, 4]])  # d has none
    attack = ku._AdversarialPerturbation(model, ku.Config(awp=0.5, awp_eps=1.0))
    attack.remember()
    moved = attack.perturb()
    assert torch.equal(model.a, torch.ones(2, 2)) and torch.equal(model.b, model.a) and torch.equal(model.d, model.a)
    assert np.allclose(model.c.detach(), [[1.3, 1], [1, 1.4]])
    assert moved == pytest.approx(0.5 / np.sqrt(12))
    attack.restore()
    assert torch.equal(model.c, model.a)


def test_the_scale_of_float16_does_not_change_the_attack(begun):
    engine = begun(awp=0.5)
    engine.accumulate(engine.micro_batches(ROWS))
    moved = []
    for scale in (1.0, 1024.0):
        for weight in engine.model.parameters():
            weight.grad *= scale
        engine.adversary.perturb()
        moved.append(weights(engine))
        engine.adversary.restore()
    torch.testing.assert_close(*moved, atol=1e-7, rtol=1e-6)


def test_adversarial_steps_begin_when_asked_and_say_what_they_did(tiny):
    run = trained(tiny(epochs=3, awp=0.5, awp_eps=0.2, adversarial_start=1, run_folds="0", run_name="awp"))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [("adversarial_loss" in line) for line in steps] == [False] * 3 + [True] * 6
    assert all(line["adversarial_loss"] > line["loss"] for line in steps[3:])
    (fold,) = ku.RunFolder(run).read_record()["folds"]
    told = fold["regularisers"]["awp"]
    assert told["steps"] == 6 and told["loss"] == pytest.approx(np.mean([line["loss"] for line in steps[3:]]))
    assert 0 < told["perturbation"] < 0.2 and told["adversarial_loss"] > told["loss"]


def test_the_embeddings_must_learn_where_they_are_attacked(tiny):
    with pytest.raises(ku.ConfigError, match="fgm moves the word embeddings"):
        engine_of(tiny(fgm=1.0, adversarial_start=0, freeze_embeddings=True)).setup_fold(0, **QUIET)


# ---------------------------------------------------------------------------------------
# Averages


@pytest.mark.parametrize("settings", [dict(ema=0.8), dict(ema=0.99), dict(swa_start=1.5)])
def test_the_average_equals_its_recurrence(settings, begun):
    engine = begun(**settings)
    path, expected = [weights(engine).double()], None
    for step in range(6):  # of 8, two an epoch
        engine(step, ROWS)
        path.append(weights(engine).double())
    if "ema" in settings:
        expected = path[0]
        for t, now in enumerate(path[1:]):
            decay = min(settings["ema"], (1 + t) / (10 + t))
            expected = decay * expected + (1 - decay) * now
    else:
        expected = torch.stack(path[4:]).mean(0)
    average = torch.cat([mean.flatten() for mean in engine.average.means.values()])
    torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-5)
    assert (expected - path[-1]).norm() > 1e-3 * path[-1].norm()


def test_a_step_that_float16_skips_does_not_move_the_running_average(begun, monkeypatch):
    engine = begun(ema=0.5)
    engine(0, ROWS)
    before = {name: mean.clone() for name, mean in engine.average.means.items()}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    engine(1, ROWS)
    assert all(torch.equal(before[name], mean) for name, mean in engine.average.means.items())


def test_an_equal_average_has_nothing_of_the_weights_before_its_start_though_float16_skips_its_first_step(
    begun, monkeypatch
):
    engine, clip, path = begun(swa_start=2.0), torch.nn.utils.clip_grad_norm_, []
    for step in range(7):  # two an epoch: the average begins with step 4
        skipped = step == 4
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", (lambda *_: torch.tensor(torch.inf)) if skipped else clip
        )
        if skipped:
            monkeypatch.setattr(engine.scaler, "step", lambda optimizer: None)
        engine(step, ROWS)
        monkeypatch.undo()
        path.append(weights(engine).double())
    assert torch.equal(path[4], path[3]) and not torch.equal(path[5], path[4])
    average = torch.cat([mean.flatten() for mean in engine.average.means.values()]).double()
    torch.testing.assert_close(average, torch.stack(path[4:]).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [dict(ema=0.9), dict(swa_start=1.0), dict(ema=0.9, keep="best")])
def test_averaged_weights_are_evaluated_and_saved_and_training_goes_on_with_its_own(settings, tiny):
    plain, averaged = (
        trained(tiny(epochs=2, lr=1e-2, run_name=name, evals_per_epoch=2, **more))
        for name, more in (("plain", {}), ("averaged", settings))
    )
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (plain, averaged)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    scores = [[line["rmse"] for line in log if "rmse" in line] for log in logs]
    last = len(scores[0]) - 1
    assert scores[0][last] != scores[1][last]
    ku.check_golden(ku.Bundle.open(averaged))
    oof = pd.read_csv(averaged / "oof.csv", dtype={"id": str}).set_index("id")["prediction"]
    for row in json.loads((averaged / "golden.json").read_text())["rows"]:  # of the weights that are saved
        assert row["prediction"] == pytest.approx([oof[row["id"]]], abs=1e-5)


def test_before_its_start_the_equal_average_is_not_used(begun):
    engine = begun(swa_start=2.0)
    engine(0, ROWS)
    before = weights(engine)
    engine.swap_average(1)
    assert torch.equal(weights(engine), before)
    for step in range(1, 6):
        engine(step, ROWS)
    before = weights(engine)
    engine.swap_average(6)
    assert not torch.equal(weights(engine), before)
    engine.swap_average(6)
    assert torch.equal(weights(engine), before)


# ---------------------------------------------------------------------------------------
# R-Drop


@pytest.mark.parametrize("samples", [1, 2])
def test_r_drop_adds_the_distance_of_two_passes_to_their_mean_loss(samples, begun):
    engine = begun(rdrop=3.0, head_dropout=0.5, dropout_samples=samples)
    torch.manual_seed(5)
    got = left_by_the_step(engine)
    value = engine.mean_loss.item()
    torch.manual_seed(5)
    model = copy.deepcopy(engine.model)
    model.zero_grad()
    inputs, target = engine.data.tokens.batch(ROWS, engine.device), engine.targets[ROWS]
    one, other = model(**inputs).reshape(samples, 8, 1), model(**inputs).reshape(samples, 8, 1)
    mean = (((one - target) ** 2).mean() + ((other - target) ** 2).mean()) / 2
    apart = ((one - other) ** 2).mean()
    (mean + 3 * apart).backward()
    assert_same(got, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert value == pytest.approx((mean + 3 * apart).item(), rel=1e-5)
    assert engine.metrics["rdrop"].item() == pytest.approx(apart.item(), rel=1e-4) and apart > 0


@pytest.mark.parametrize(("loss", "task"), [("bce", "multilabel"), ("cross_entropy", "multiclass")])
def test_the_distance_of_probabilities_is_the_mean_of_both_divergences(loss, task):
    raw, other = torch.randn(2, 5, 4, dtype=torch.double, generator=torch.manual_seed(0))
    got = ku.LOSSES[loss](ku.Config(task=task), 4).distance(raw, other)
    if loss == "bce":
        p, q = (np.stack([x.sigmoid(), 1 - x.sigmoid()], -1) for x in (raw, other))
        both = (scipy.stats.entropy(p, q, axis=-1) + scipy.stats.entropy(q, p, axis=-1)).mean(1) / 2
    else:
        p, q = (x.softmax(1).numpy() for x in (raw, other))
        both = (scipy.stats.entropy(p, q, axis=1) + scipy.stats.entropy(q, p, axis=1)) / 2
    np.testing.assert_allclose(got, both, rtol=1e-9)


def test_r_drop_of_two_equal_passes_is_an_error(tiny):
    cfg = tiny(rdrop=1.0, head_dropout=0.1, run_folds="0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ku.nn.Dropout, "forward", lambda self, x: x)
        with pytest.raises(ku.KitError, match="rdrop does nothing, because two passes are the same"):
            trained(cfg)


# ---------------------------------------------------------------------------------------
# Standard errors of the targets


def with_errors(frame):
    return frame.assign(fold=[0, 1] * 12, standard_error=np.linspace(0, 0.6, 24))


def begun_with_errors(tiny, **settings):
    engine = engine_of(tiny(error_column="standard_error", **settings), with_errors(train_frame(24)))
    engine.setup_fold(0, **QUIET)
    engine.model.train()
    return engine


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_surer_rows_weigh_more_and_one_on_average_over_the_training_rows(loss, tiny):
    engine = begun_with_errors(tiny, error_weights=True, loss=loss)
    error = np.linspace(0, 0.6, 24)
    weight = 1 / (error**2 + (error[1::2] ** 2).mean())
    weight /= weight[1::2].mean()
    np.testing.assert_allclose(engine.sample_weights, weight, rtol=1e-5)
    engine.accumulate(engine.micro_batches(ROWS))
    raw = engine.model(**engine.data.tokens.batch(ROWS, engine.device)).detach().numpy()[:, 0]
    errors = (raw - engine.targets[ROWS].numpy()[:, 0]) ** 2
    assert engine.mean_loss.item() == pytest.approx((errors * weight[ROWS]).mean(), rel=1e-5)


def test_noise_on_the_targets_has_the_size_of_their_standard_errors(tiny, monkeypatch):
    engine = begun_with_errors(tiny, label_noise=2.0)
    draws, draw = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: draws.append(draw(x)) or draws[-1])
    engine.accumulate(engine.micro_batches(ROWS))
    error = np.linspace(0, 0.6, 24) / engine.data.targets[1::2].std()  # in the units of the targets in training
    noise = 2 * error[ROWS] * draws[0].numpy()[:, 0]
    raw = engine.model(**engine.data.tokens.batch(ROWS, engine.device)).detach().numpy()[:, 0]
    expected = ((raw - engine.targets[ROWS].numpy()[:, 0] - noise) ** 2).mean()
    assert engine.mean_loss.item() == pytest.approx(expected, rel=1e-5)
    assert engine.metrics["label_noise"].item() == pytest.approx(abs(noise).mean(), rel=1e-5)


def test_validation_and_its_score_know_no_weights_and_no_noise(tiny):
    run = trained(tiny(error_column="standard_error", error_weights=True, label_noise=1.0, run_name="noisy"))
    oof = pd.read_csv(run / "oof.csv")
    record = ku.RunFolder(run).read_record()
    assert record["oof"]["last"] == pytest.approx(np.sqrt(((oof["target"] - oof["prediction_last"]) ** 2).mean()))
    fold = record["folds"][0]
    noise = fold["regularisers"]["label_noise"]["mean_size"] * fold["target_scale"]["spread"][0]
    assert noise == pytest.approx(0.4, abs=0.15)
    assert sorted(oof["target"]) == sorted(train_frame()["target"])


@pytest.mark.parametrize(("cell", "told"), [("-0.1", "'-0.1'"), ("", "''"), ("inf", "'inf'")])
def test_a_standard_error_that_is_none_is_named_with_its_row(cell, told, tiny, competition):
    frame = train_frame().astype({"standard_error": str})
    frame.loc[4, "standard_error"] = cell
    frame.to_csv(competition / "train.csv", index=False)
    expected = rf"column standard_error: expected a finite number from 0 up, got row 5 \(id 004\): {told}"
    with pytest.raises(ku.DataError, match=expected):
        ku.read_competition(tiny(error_column="standard_error", error_weights=True))


def test_standard_errors_that_are_all_zero_are_refused(tiny, competition):
    train_frame().assign(standard_error=0).to_csv(competition / "train.csv", index=False)
    with pytest.raises(
        ku.DataError, match="column standard_error: expected a number above 0 in some row, got 0 in all"
    ):
        ku.read_competition(tiny(error_column="standard_error", error_weights=True))


def test_a_run_does_not_go_on_with_other_standard_errors(tiny, competition):
    cfg = tiny(error_column="standard_error", error_weights=True, run_name="errors")
    trained(cfg)
    train_frame().assign(standard_error=0.3).to_csv(competition / "train.csv", index=False)
    with pytest.raises(ku.ConfigError, match="the standard errors: not as when the run began"):
        trained(cfg)


# ---------------------------------------------------------------------------------------
# Mixout


def mixed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ku._MixoutLinear)}


def test_mixout_mixes_pretrained_weights_by_input_and_is_the_weight_on_average(begun):
    engine = begun(mixout=0.4)
    for step in range(4):
        engine(step, ROWS)
    layer = next(iter(mixed_layers(engine.model).values()))
    w, w0 = layer.weight.detach().numpy().astype(float), layer.pretrained.numpy().astype(float)
    assert abs(w - w0).max() > 1e-3
    draws = np.stack([layer.mixed().detach().numpy() for _ in range(4000)])
    for draw in draws[:20]:
        kept = np.isclose(draw, (w - 0.4 * w0) / 0.6, atol=1e-6).all(0)  # m is 1: of whole columns, an input each
        gone = np.isclose(draw, w0, atol=1e-6).all(0)  # m is 0: (W0 - p W0) / (1 - p)
        assert (kept | gone).all() and gone.any() and kept.any()
    spread = abs(w - w0) * np.sqrt(0.4 / 0.6 / 4000)
    assert (abs(draws.mean(0) - w) <= 5 * spread + 1e-6).all()


def test_mixout_acts_in_training_alone_and_leaves_names_of_weights_as_they_are(begun):
    engine, plain = begun(mixout=0.4), begun()
    assert engine.model.state_dict().keys() == plain.model.state_dict().keys()
    for step in range(2):
        engine(step, ROWS)
    inputs = engine.data.tokens.batch(ROWS, engine.device)
    assert not torch.equal(engine.model(**inputs), engine.model(**inputs))
    plain.model.load_state_dict(engine.model.state_dict())
    torch.testing.assert_close(engine.model.eval()(**inputs), plain.model.eval()(**inputs))


def test_mixout_leaves_out_layers_without_pretrained_weights_and_those_that_stay(begun, tiny, backbone_folder):
    cfg = tiny(mixout=0.4, reinit_layers=1, freeze_layers=1)
    engine = engine_of(ku.dataclasses.replace(cfg, backbone=str(backbone_folder("bert"))))
    engine.setup_fold(0, **QUIET)
    mixed = mixed_layers(engine.model)
    assert len(mixed) == 12 and {name.split(".")[3] for name in mixed} == {"1", "2"}
    assert len(mixed_layers(begun(mixout=0.4).model)) == 12


def test_mixout_of_a_model_that_has_no_linear_layers_is_an_error(tiny, backbone_folder):
    cfg = ku.dataclasses.replace(tiny(mixout=0.1), backbone=str(backbone_folder("gpt2")))
    with pytest.raises(ku.ConfigError, match="mixout does nothing for GPT2Model"):
        engine_of(cfg).setup_fold(0, **QUIET)


@pytest.mark.parametrize("kind", ["roberta", "deberta-v2", "modernbert", "electra"])
def test_mixout_reaches_the_layers_of_other_architectures(kind, tiny, backbone_folder):
    engine = engine_of(ku.dataclasses.replace(tiny(mixout=0.5, lr=1e-2), backbone=str(backbone_folder(kind))))
    engine.setup_fold(0, **QUIET)
    assert len(mixed_layers(engine.model)) >= 16
    engine.model.train()
    engine(0, ROWS)
    inputs = engine.data.tokens.batch(ROWS, engine.device)
    assert not torch.equal(engine.model(**inputs), engine.model(**inputs))


def test_checkpointed_layers_mix_the_same_weights_when_they_are_computed_again(begun):
    engines = [begun(mixout=0.5), begun(mixout=0.5, gradient_checkpointing=True)]
    engines[0](0, ROWS)  # away from the pre-trained weights
    engines[1].model.load_state_dict(engines[0].model.state_dict())
    for engine in engines:
        torch.manual_seed(3)
        engine.accumulate(engine.micro_batches(ROWS))
    slopes = [{name: w.grad for name, w in engine.model.named_parameters() if w.grad is not None} for engine in engines]
    assert_same(*slopes)


# ---------------------------------------------------------------------------------------
# Settings, records


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(awp=1.0, fgm=1.0), "awp and fgm are two adversarial passes"),
        (dict(awp=1.0, adversarial_start=3), "adversarial_start 3 must be below epochs, 3"),
        (dict(ema=0.9, swa_start=1), "ema and swa_start are two averages"),
        (dict(swa_start=3), "swa_start 3 must be below epochs, 3"),
        (dict(rdrop=1.0), "rdrop does nothing without dropout"),
        (dict(rdrop=1.0, task="multiclass", backbone_dropout=0.0), "rdrop does nothing without dropout"),
        (dict(rdrop=1.0, head_dropout=0.1, loss="rmse"), "rdrop adds to a mean over rows: loss rmse is none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ku.ConfigError, match=message):
        ku.Config(**settings)


def test_every_regulariser_tells_in_record_and_print_how_it_acted(tiny, capsys):
    settings = dict(awp=0.1, adversarial_start=1, ema=0.9, rdrop=1.0, mixout=0.3, head_dropout=0.2, llrd=0.9)
    run = trained(tiny(epochs=2, run_name="all", **settings))
    out = capsys.readouterr().out
    for fold in ku.RunFolder(run).read_record()["folds"]:
        told = fold["regularisers"]
        assert told.keys() == {"awp", "ema", "rdrop", "mixout"}
        assert told["awp"]["perturbation"] > 0 and told["ema"]["distance"] > 0 and told["rdrop"]["distance"] > 0
        assert told["mixout"]["layers"] == 12 and told["mixout"]["distance"] > 0
    assert "mixout 0.3 in 12 linear layers" in out
    assert all(f"  {name}: " in out for name in ("awp", "ema", "rdrop", "mixout"))
