"""The training loop, run folders, prediction and submissions, on a tiny backbone."""

import json
import math
import re
import subprocess
import sys
import time
import weakref

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from conftest import QUIET, Forked, little_gpu_memory, make_texts, padded_mask, train_frame

CPU = torch.device("cpu")


def fold_data(cfg, frame=None, n_outputs=1):
    frame = train_frame(24).assign(fold=[0, 1] * 12) if frame is None else frame
    folder = ku._find_backbone(cfg.backbone)
    tokenizer = ku._load_tokenizer(folder)
    targets = cfg.encode_targets(frame, cfg.class_labels(frame))
    tokens = ku._tokenize(frame, tokenizer, cfg)
    ids = frame["id"].to_numpy()
    return ku._TrainingData(tokens, targets, frame["fold"].to_numpy(), folder, tokenizer, n_outputs, ids)


def train_fold(data, fold, cfg, write_log):
    return ku.FoldTrainer(ku.OptimizerStep(data, cfg), fold, write_log, ku.TimeBudget(cfg), **QUIET).train()


def resolved(cfg):
    return cfg.resolved(ku._BackboneLoader(cfg.backbone, cfg).config)


def run(cfg):
    """Read, fold and train; the run folder, its record and its out-of-fold table."""
    train, _, _ = ku.read_competition(cfg)
    folder = ku.train(ku.make_folds(train, cfg), cfg)
    record = json.loads((folder / "record.json").read_text())
    return folder, record, pd.read_csv(folder / "oof.csv", dtype={"id": str})


def one_step(tiny, loss, steps=1, rate=0.1, **settings):
    """Loss and gradient norm of the last of some optimiser steps over the first seven rows, and the weights then."""
    task = "multiclass" if loss in ("cross_entropy", "focal") else "regression"
    settings |= dict(levels=(0, 2)) if loss == "coral" else {}
    cfg = resolved(tiny(task=task, loss=loss, epochs=1, **settings))
    frame = train_frame(24).assign(fold=0, target=[0.0, 1.0, 2.0, 1.0] * 6 if loss == "coral" else [0, 1, 0.3, 0.9] * 6)
    if task == "multiclass":
        frame["target"] = ["a", "b", "c"] * 8
    data = fold_data(cfg, frame, n_outputs=3 if task == "multiclass" else 1)
    targets = torch.from_numpy(data.targets)
    targets = targets.float() if targets.is_floating_point() else targets
    engine = ku.OptimizerStep(data, cfg)
    engine.setup_fold(1, **QUIET)
    engine.optimizer = torch.optim.SGD(engine.model.eval().parameters(), lr=rate)
    for _ in range(steps):
        value, norm = engine(0, np.arange(7)).values
    return value, norm, torch.cat([p.detach().flatten() for p in engine.model.parameters()])


@pytest.mark.parametrize("loss", [name for name in ku.LOSSES if name != "mse_rank"])  # its pairs are of a micro-batch
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(loss, micro, tiny):
    value, norm, weights = one_step(tiny, loss)
    value_m, norm_m, weights_m = one_step(tiny, loss, micro_batch_size=micro)
    torch.testing.assert_close((value_m, norm_m), (value, norm), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights_m, weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ku.LOSSES)
def test_the_step_follows_the_gradient_of_the_logged_loss(loss, tiny):
    """With plain gradient descent a small step lowers the loss by the rate times the squared gradient norm."""
    rate = 1e-5 if loss == "gaussian" else 1e-4  # a steep one
    before, norm, _ = one_step(tiny, loss, max_grad_norm=0, steps=1, rate=rate)
    after, _, _ = one_step(tiny, loss, max_grad_norm=0, steps=2, rate=rate)
    assert (before - after).item() == pytest.approx(rate * norm.item() ** 2, rel=0.05)


def test_clipping_bounds_the_gradient_norm_of_the_step(tiny):
    _, norm, free = one_step(tiny, "mse", max_grad_norm=0)
    _, reported, clipped = one_step(tiny, "mse", max_grad_norm=0.01)
    assert reported == norm > 0.01
    start = one_step_start(tiny)
    assert (clipped - start).norm() == pytest.approx(0.1 * 0.01, rel=1e-2)
    assert (free - start).norm() == pytest.approx(0.1 * norm.item(), rel=1e-2)


def one_step_start(tiny):
    cfg = resolved(tiny())
    data = fold_data(cfg, train_frame(24).assign(fold=0, target=[0.0, 1.0, 0.3, 0.9] * 6))
    engine = ku.OptimizerStep(data, cfg)
    engine.setup_fold(1, **QUIET)
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("constant", lambda p: 1.0),
    ],
)
def test_the_schedule_moves_the_rate_of_every_group(schedule, after, tiny):
    cfg = resolved(tiny(schedule=schedule, warmup_ratio=0.2, llrd=0.5, lr=0.01))
    logged = []
    data, used = fold_data(cfg), []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: used.append([float(group["lr"]) for group in optimizer.param_groups])
    )
    try:
        train_fold(data, 0, ku.dataclasses.replace(cfg, batch_size=2, epochs=5), logged.append)
    finally:
        hook.remove()
    rates = [entry["lr"] for entry in logged if "loss" in entry]
    assert len(rates) == len(used) == 30
    for told, groups in zip(rates, used, strict=True):
        assert sorted(set(groups)) == pytest.approx(sorted(set(told.values())), rel=1e-6)
    for step, lr in enumerate(rates):
        factor = (step + 1) / 6 if step < 6 else after((step - 6) / 24)
        expected = {"embeddings": 0.5**2, "head": 0.1, "layer 1": 0.5, "layer 2": 1.0}
        assert lr == pytest.approx({depth: 0.01 * factor * share for depth, share in expected.items()})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (dict(), {5, 10, 15}),
        (dict(evals_per_epoch=2), {2, 5, 8, 10, 12, 15}),
        (dict(evals_per_epoch=9), set(range(1, 16))),
        (dict(eval_steps=4), {4, 8, 12, 15}),
        (dict(eval_steps=100), {15}),
    ],
)
def test_evaluations_come_as_set_and_always_at_the_end(settings, steps):
    assert ku.Config(epochs=3, **settings).evaluation_steps(5) == steps


def test_training_learns_eight_rows_by_heart(tiny):
    cfg = resolved(tiny(epochs=40, lr=5e-3, head_lr=1e-2, batch_size=4, weight_decay=0.0))
    frame = pd.concat([train_frame(8), train_frame(8)]).assign(fold=[0] * 8 + [1] * 8)
    logged = []
    train_fold(fold_data(cfg, frame), 0, cfg, logged.append)
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert np.mean(losses[-4:]) < 0.02 * np.mean(losses[:4])


def test_the_first_prediction_is_the_mean_of_the_training_targets(tiny):
    cfg = resolved(tiny())
    data = fold_data(cfg)
    model = ku.TextModel.build(cfg, data.folder, ku.MseLoss(cfg, 1), data.tokenizer, torch.full((4, 1), 7.25), **QUIET)
    assert model.output.bias.item() == 7.25


def test_multi_sample_dropout_averages_losses_of_several_masks_in_training_only(tiny):
    cfg = resolved(tiny(head_dropout=0.5, dropout_samples=4))
    data = fold_data(cfg)
    model = ku.TextModel.build(cfg, data.folder, ku.MseLoss(cfg, 1), data.tokenizer, torch.zeros(1, 1), **QUIET)
    batch = data.tokens.batch(np.arange(3), CPU)
    outputs = model.train()(**batch)
    assert outputs.shape == (4, 3, 1) and not torch.equal(outputs[0], outputs[1])
    torch.manual_seed(5)
    expected = np.mean([(sample.detach().numpy() - 1) ** 2 for sample in model(**batch)])
    engine = ku.OptimizerStep(data, cfg)
    engine.setup_fold(1, **QUIET)
    engine.model.train().load_state_dict(model.state_dict())
    engine.targets, engine.optimizer = torch.ones(24, 1), torch.optim.SGD(engine.model.parameters(), lr=0.0)
    torch.manual_seed(5)
    value, _ = engine(0, np.arange(3)).values
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.eval()(**batch), model(**batch)) and model(**batch).shape == (3, 1)


def test_predictions_come_in_the_order_of_the_rows_whatever_the_batches(tiny):
    cfg = resolved(tiny())
    data = fold_data(cfg, train_frame(24).assign(fold=0))
    model = ku.TextModel.build(cfg, data.folder, ku.MseLoss(cfg, 1), data.tokenizer, torch.zeros(1, 1), **QUIET).train()
    alone = [ku.predict(model, data.tokens, cfg, [i])[0] for i in range(24)]
    for budget in (8, 40, 10_000):
        got = ku.predict(model, data.tokens, ku.dataclasses.replace(cfg, batch_tokens=budget))
        np.testing.assert_allclose(got, alone, atol=1e-5)
    some = [5, 0, 17]
    np.testing.assert_allclose(ku.predict(model, data.tokens, cfg, some), np.array(alone)[some], atol=1e-5)
    assert model.training


def out_of_memory_above(model, slots, seen):
    """Make a model fail as a GPU does for batches of more than so many tokens with padding."""
    forward = model.forward

    def limited(**inputs):
        seen.append(padded_mask(inputs).numel())
        if seen[-1] > slots:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**inputs)

    model.forward = limited


def test_prediction_survives_out_of_memory_with_half_the_token_budget(tiny, runs, capsys):
    tokenizer, model = (loaded := ku._Run.load(runs / "one")).open()
    tokens = ku._tokenize(train_frame(30), tokenizer, loaded.cfg)
    expected = ku.predict(model, tokens, loaded.cfg)
    seen, cfg = [], ku.dataclasses.replace(loaded.cfg, batch_tokens=400)
    out_of_memory_above(model, 150, seen)
    np.testing.assert_allclose(ku.predict(model, tokens, cfg), expected, atol=1e-5)
    failed = [slots for slots in seen if slots > 150]
    assert 1 <= len(failed) <= 2 and "out of memory with" in (out := capsys.readouterr().out)
    assert f"on with batch_tokens {failed[0] // 2}" in out


def test_a_text_that_does_not_fit_into_memory_alone_is_an_error_that_says_its_length(tiny, runs):
    tokenizer, model = (loaded := ku._Run.load(runs / "one")).open()
    tokens = ku._tokenize(train_frame(5), tokenizer, loaded.cfg)
    out_of_memory_above(model, 5, [])
    with pytest.raises(ku.KitError, match=rf"a text of {tokens.lengths.max()} tokens does not fit into the memory"):
        ku.predict(model, tokens, loaded.cfg)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_golden_rows_are_those_of_float32_and_hold_in_half_precision_to_its_tolerance(precision, tiny, capsys):
    folder, record, oof = run(tiny(run_name="half", precision=precision))
    name, loaded = record["precision"], ku.Bundle.open(folder)
    ku.check_golden(loaded)
    told = dict(re.findall(r"golden rows in (\w+): (\S+) from training", capsys.readouterr().out))
    assert (
        told.keys() == {name, "float32"}
        and 0 == float(told["float32"]) < float(told[name]) < ku._GOLDEN_TOLERANCES[name]
    )
    golden = json.loads((folder / "golden.json").read_text())
    for row in golden["rows"]:
        assert row["prediction"] == pytest.approx(
            oof.set_index("id")["prediction"][[row["id"]]], abs=ku._GOLDEN_TOLERANCES[name]
        )
        row["prediction"][0] += 2e-4 * record["oof"]["target_sd"][0]
    (folder / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ku.BundleError, match="in float32 the prediction is"):
        ku.check_golden(ku.Bundle.open(folder))


def with_scores(loaded, **scores):
    return loaded._replace(record=loaded.record | {"oof": scores})


def test_golden_rows_are_compared_in_standard_deviations_of_the_targets(runs):
    loaded = ku._Run.load(runs / "one")
    spreads = {"target_sd": [500.0]}, {}, {"target_sd": [0.0]}, {"target_sd": [1.0, 1000.0]}
    wide, probabilities, constant, unequal = (with_scores(loaded, **scores) for scores in spreads)
    assert wide.golden_gaps(np.array([[3.0], [1500.0]]), [[2.0], [1000.0]]) == pytest.approx([1 / 500, 1])
    assert probabilities.golden_gaps(np.array([[0.5, 0.5]]), [[0.6, 0.4]]) == pytest.approx([0.1])
    assert constant.golden_gaps(np.array([[0.0], [0.1]]), [[0.0], [0.0]]) == pytest.approx([0, 0.1])
    assert unequal.golden_gaps(np.array([[0.5, 0.0], [0.0, 10.0]]), [[0.0, 0.0]] * 2) == pytest.approx([0.5, 0.01])


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 0.01, 0.9])
def test_a_prediction_that_is_off_by_a_small_spread_is_refused_in_every_precision(mean, precision, runs):
    narrow = with_scores(ku._Run.load(runs / "one"), target_sd=[0.01])
    rows = [{"id": "a", "fold": 0, "prediction": [mean]}, {"id": "b", "fold": 1, "prediction": [mean]}]
    narrow = narrow._replace(golden=narrow.golden | {"rows": rows})
    near = 0.5 * 0.01 * ku._GOLDEN_TOLERANCES[precision]
    assert narrow.check_gaps(np.array([[mean], [mean + near]]), precision) == pytest.approx(near / 0.01)
    with pytest.raises(ku.BundleError, match=f"fold 1, id b: in {precision} the prediction is 1 off"):
        narrow.check_gaps(np.array([[mean], [mean + 0.01]]), precision)


def test_a_prediction_far_from_zero_may_be_rounded_to_float32_where_targets_are_not_standardised(runs):
    narrow = with_scores(ku._Run.load(runs / "one"), target_sd=[0.01])
    fold = {"target_scale": None}
    narrow = narrow._replace(record=narrow.record | {"folds": [fold]})
    rounded = float(np.nextafter(np.float32(1000), np.float32(2000)))
    assert 0 < narrow.golden_gaps(np.array([[rounded]]), [[1000.0]])[0] < ku._GOLDEN_TOLERANCES["float32"]
    assert narrow.golden_gaps(np.array([[1000.01]]), [[1000.0]])[0] > ku._GOLDEN_TOLERANCES["float32"]
    fold["target_scale"] = {"mean": [1000.0], "spread": [0.01]}
    assert narrow.golden_gaps(np.array([[rounded]]), [[1000.0]])[0] > ku._GOLDEN_TOLERANCES["float32"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_runs_out_of_memory_predicts_all_the_same(tiny, capsys):
    folder, _, _ = run(tiny(run_name="gpu", precision="fp32"))
    tokenizer, model = (loaded := ku._Run.load(folder)).open()
    tokens = ku._tokenize(train_frame(20_000), tokenizer, loaded.cfg)
    expected = ku.predict(model, tokens, loaded.cfg)
    with little_gpu_memory(2**28):  # 20,000 texts of 32 tokens need more at once
        got = ku.predict(model, tokens, ku.dataclasses.replace(loaded.cfg, batch_tokens=10**7))
    assert "out of memory with" in capsys.readouterr().out
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_weights_that_would_not_fit_into_kaggles_working_folder_are_refused_before_training(
    tiny, tmp_path, monkeypatch
):
    working = tmp_path / "kaggle" / "working"
    working.mkdir(parents=True)
    (tmp_path / "kaggle" / "input").mkdir()
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path / "kaggle"))
    (working / "earlier.bin").write_bytes(b"x" * 1000)
    cfg = ku.dataclasses.replace(tiny(run_name="large"), output_dir=str(working / "runs"))
    fold = 4 * ku._num_parameters(ku._BackboneLoader(cfg.backbone, cfg).build_empty())
    n_bytes = 2 * fold + 2 * 3 * fold  # a checkpoint has the weights and two moments of each
    monkeypatch.setattr(ku, "_KAGGLE_OUTPUT_BYTES", n_bytes + 500)
    with pytest.raises(
        ku.KitError, match=r"the weights of 2 folds and two checkpoints take .* train fewer with run_folds"
    ):
        run(cfg)
    assert not (working / "runs" / "large").exists()
    monkeypatch.setattr(ku, "_KAGGLE_OUTPUT_BYTES", n_bytes + 10**5)
    folder, _, _ = run(cfg)
    assert len(list(working.rglob("model.safetensors"))) == 2 and not list(folder.rglob(".*"))


def test_two_runs_with_one_seed_give_identical_files_and_another_seed_does_not(tiny):
    settings = dict(head_dropout=0.1, backbone_dropout=0.1)
    first, second = (run(tiny(run_name=name, **settings))[0] for name in ("a", "b"))
    other, _, _ = run(tiny(run_name="c", seed=1, **settings))
    assert (first / "oof.csv").read_bytes() == (second / "oof.csv").read_bytes()
    weights = [(folder / "fold1" / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (first / "oof.csv").read_bytes() != (other / "oof.csv").read_bytes()


def test_a_fold_trained_alone_equals_the_fold_of_a_whole_run(tiny):
    _, _, whole = run(tiny(run_name="whole"))
    _, record, alone = run(tiny(run_name="alone", run_folds="1"))
    assert [fold["fold"] for fold in record["folds"]] == [1]
    pd.testing.assert_frame_equal(alone, whole[whole["fold"] == 1].reset_index(drop=True))


@pytest.mark.plots
def test_a_run_folder_holds_what_the_design_says(tiny):
    folder, record, oof = run(tiny(run_name="run"))
    names = {path.name for path in folder.iterdir()}
    files = {"record.json", "oof.csv", "golden.json", "log.jsonl", "curves.png", "oof.png"}
    assert names == files | {"fold0", "fold1", "tokenizer"}
    kept = {"model.safetensors", "config.json", "state.json", "state.safetensors", "manifest.json"}
    assert {path.name for path in (folder / "fold0").iterdir()} == kept
    assert list(oof.columns) == ["id", "fold", "target", "prediction", "prediction_best", "prediction_last"]
    assert record["status"] == "complete" and record["rows"] == len(oof) == 40
    assert oof["id"].is_unique and set(oof["id"]) == set(train_frame()["id"])
    assert {"versions", "device", "threads", "seconds", "tokens_per_second"} <= set(record)
    for kind in ("best", "last"):
        error = oof["target"] - oof[f"prediction_{kind}"]
        assert record["oof"][kind] == pytest.approx(math.sqrt((error**2).mean()))
        by_fold = (error**2).groupby(oof["fold"]).mean() ** 0.5
        assert [fold[kind]["score"] for fold in record["folds"]] == pytest.approx(list(by_fold))
        assert record["oof"][f"{kind}_fold_sd"] == pytest.approx(by_fold.std())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["fold"] == 0 and "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_the_saved_weights_predict_what_the_chosen_checkpoint_predicted(checkpoint, tiny):
    cfg = tiny(run_name="run", keep=checkpoint, epochs=4, evals_per_epoch=3, lr=0.02, metric="mae")
    folder, record, oof = run(cfg)
    assert any(fold["best"]["step"] < fold["last"]["step"] for fold in record["folds"])
    assert oof["prediction"].equals(oof[f"prediction_{checkpoint}"])
    loaded = ku._Run.load(folder)
    tokenizer, model = loaded.open()
    tokens = ku._tokenize(train_frame(), tokenizer, loaded.cfg)
    for fold in (0, 1):
        ku.load_model(model, folder / f"fold{fold}" / "model.safetensors")
        rows = np.flatnonzero(oof["fold"] == fold)
        got = ku.predict(model, tokens, loaded.cfg, rows)[:, 0]
        np.testing.assert_allclose(got, oof["prediction"].iloc[rows], atol=1e-5)
    steps = [line for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "mae" in line]
    for fold in record["folds"]:
        scores = {line["step"]: line["mae"] for line in steps if line["fold"] == fold["fold"]}
        assert fold["best"] == {"score": min(scores.values()), "step": min(scores, key=scores.get)}
        assert fold["last"]["step"] == max(scores)


TASKS = {
    "multi-target": (dict(target_columns="target,other"), {"target", "other"}, ["target", "other"]),
    "binary": (dict(task="binary"), None, None),
    "multiclass": (dict(task="multiclass", reinit_layers=1, llrd=0.9), {"low", "mid", "top"}, ["low", "mid", "top"]),
    "multilabel": (dict(task="multilabel", target_columns="a,b", metric="f1_macro"), {"a", "b"}, ["a", "b"]),
}


def task_frame(name):
    frame = train_frame(60)
    rank = frame["target"].rank(method="first")
    if name == "multi-target":
        return frame.assign(other=-frame["target"])
    if name == "binary":
        return frame.assign(target=np.where(rank > 30, "yes", "no"))
    if name == "multiclass":
        return frame.assign(target=np.select([rank <= 20, rank <= 40], ["low", "mid"], "top"))
    return frame.assign(a=(rank > 30).astype(int), b=(rank % 2 == 0).astype(int)).drop(columns="target")


@pytest.mark.plots
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_from_the_table_to_a_submission(task, tiny, competition):
    settings, suffixes, _ = TASKS[task]
    task_frame(task).to_csv(competition / "train.csv", index=False)
    cfg = tiny(run_name=task, **settings)
    test = pd.read_csv(competition / "test.csv", dtype=str)
    columns = sorted(suffixes) if suffixes else ["target"]
    cells = dict.fromkeys(columns, 0.5)
    test[["id"]].assign(**cells).to_csv(competition / "sample_submission.csv", index=False)
    folder, record, oof = run(cfg)
    predicted = [f"prediction_{name}" for name in columns] if suffixes else ["prediction"]
    assert set(predicted) <= set(oof.columns)
    _, test, sample = ku.read_competition(cfg)
    submission = ku.predict_test(folder, test, sample)
    assert list(submission.columns) == ["id", *columns]
    values = submission[columns].to_numpy()
    assert np.isfinite(values).all() and values.std() > 0
    if task != "multi-target":
        assert ((values > 0) & (values < 1)).all()
    if task == "multiclass":
        np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(oof[predicted].sum(axis=1), 1, atol=1e-5)
    metric = record["oof"]["metric"]
    assert metric == {"multi-target": "mcrmse", "binary": "auc", "multiclass": "accuracy"}.get(task, "f1_macro")


def test_a_multiclass_submission_with_one_column_holds_the_likeliest_label(tiny, competition):
    task_frame("multiclass").to_csv(competition / "train.csv", index=False)
    cfg = tiny(task="multiclass")
    folder, _, _ = run(cfg)
    _, test, sample = ku.read_competition(cfg)
    labels = ku.predict_test(folder, test, sample)["target"]
    probabilities = ku.predict_bundle(ku.Bundle.open(folder), test)
    by_id = dict(zip(test["id"], np.array(["low", "mid", "top"])[probabilities.argmax(1)], strict=True))
    assert list(labels) == [by_id[i] for i in sample["id"]]


def test_a_prediction_is_the_mean_of_the_folds(tiny):
    folder, _, _ = run(tiny(run_name="run"))
    loaded, texts = ku._Run.load(folder), pd.DataFrame({"excerpt": make_texts(5)})
    tokenizer, model = loaded.open()
    tokens = ku._tokenize(texts, tokenizer, loaded.cfg)
    each = []
    for fold in (0, 1):
        ku.load_model(model, folder / f"fold{fold}" / "model.safetensors")
        each.append(ku.predict(model, tokens, loaded.cfg))
    np.testing.assert_allclose(ku.predict_bundle(ku.Bundle.open(folder), texts), np.mean(each, axis=0), atol=1e-6)
    assert not np.allclose(each[0], each[1])


@pytest.fixture
def finished(tiny):
    """A loaded run and the ids, predictions and sample of a submission."""
    cfg = tiny(run_name="run", run_folds="0")
    folder, _, _ = run(cfg)
    _, test, sample = ku.read_competition(cfg)
    return ku.Bundle.open(folder), test["id"], np.arange(10.0)[:, None], sample


def test_a_submission_has_the_ids_order_and_columns_of_the_sample(finished, tmp_path):
    loaded, ids, predictions, sample = finished
    ku.write_submission(loaded, ids.to_frame(), predictions, sample, tmp_path / "s.csv")
    written = pd.read_csv(tmp_path / "s.csv", dtype={"id": str})
    assert list(written.columns) == ["id", "target"] and list(written["id"]) == list(sample["id"])
    assert list(written["target"]) == [predictions[list(ids).index(i), 0] for i in sample["id"]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda i, p, s: (i, np.where(p == 3, np.nan, p), s), "1 predictions are not finite, the first for id '003'"),
        (lambda i, p, s: (i, p, s.iloc[1:]), "the ids of sample_submission.csv and of the predictions differ"),
        (lambda i, p, s: (i, p, s.assign(other=0)), "has columns target, other; the settings predict target"),
    ],
)
def test_a_submission_that_does_not_fit_is_refused_and_leaves_the_old_file(spoil, message, finished, tmp_path):
    loaded, *rest = finished
    (tmp_path / "s.csv").write_text("old")
    ids, predictions, sample = spoil(*rest)
    with pytest.raises(ku.DataError, match=message):
        ku.write_submission(loaded, ids.to_frame(), predictions, sample, tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == "old"


def test_a_folder_that_is_there_is_never_touched(tiny, tmp_path):
    first, _, _ = run(tiny(run_folds="0"))
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    second, _, _ = run(tiny(run_folds="0", resume=False))
    third, _, _ = run(tiny(run_folds="0", lr=0.01))
    assert [second.name, third.name] == [f"{first.name}-2", f"{first.name}-3"]
    assert before == {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    (tmp_path / "runs" / "thesis").mkdir()
    (tmp_path / "runs" / "thesis" / "chapter.txt").write_text("ten years of work")
    with pytest.raises(
        ku.ConfigError, match="thesis exists and cannot go on; choose another name or delete it\n  it is no run"
    ):
        run(tiny(run_name="thesis"))
    assert (tmp_path / "runs" / "thesis" / "chapter.txt").read_text() == "ten years of work"


def test_an_unfinished_run_is_not_loaded(tiny):
    folder, record, _ = run(tiny(run_name="run", run_folds="0"))
    (folder / "record.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(ku.ConfigError, match="the run did not finish"):
        ku._Run.load(folder)


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("__call__", "fold 0, step 1: the loss is nan"),
        ("predict", r"fold 0, step 3: 20 predictions are not finite \(rows 0"),
    ],
)
def test_what_is_not_finite_in_training_stops_the_run_and_names_the_step(method, problem, tiny, monkeypatch):
    monkeypatch.setattr(ku._FoldsInTurn, "try_model", lambda *rest: None)  # as if it had become so later
    function = getattr(ku.MseLoss, method)
    broken = type("Broken", (ku.MseLoss,), {method: lambda *inputs: function(*inputs) * math.nan})
    monkeypatch.setitem(ku.LOSSES, "broken", broken)
    with pytest.raises(ku.NumericError, match=problem):
        run(tiny(loss="broken", run_folds="0"))


def test_the_model_of_a_fold_is_gone_before_the_next_is_built(tiny, monkeypatch):
    built, alive, build = [], [], ku.TextModel.build

    def counting(*arguments):
        alive.append(sum(model() is not None for model in built))
        model = build(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ku.TextModel, "build", counting)
    run(tiny(n_folds=3))
    assert alive == [0, 0, 0]


def test_a_loss_of_ones_own_trains_by_its_name(tiny):
    @ku.register(ku.LOSSES, "log_cosh")
    class LogCosh(ku.MseLoss):
        def __call__(self, raw, target):
            return torch.log(torch.cosh(raw - target)).mean(1)

        def init_bias(self, targets):
            return targets.numpy().mean(0) if bias == "array" else targets.mean_of_nothing

    try:
        bias = "a mistake"
        with pytest.raises(AttributeError, match="mean_of_nothing"):
            run(tiny(loss="log_cosh", run_folds="0", run_name="r"))
        assert not (ku.Path(tiny().output_dir) / "r").exists()
        bias = "array"  # the mistake is mended, and nothing of it stands in the way
        _, record, _ = run(tiny(loss="log_cosh", run_folds="0", run_name="r"))
        assert record["resolved"]["loss"] == "log_cosh"
    finally:
        del ku.LOSSES["log_cosh"]


def test_eight_bit_adamw_trains_with_a_quarter_of_the_moments():
    pytest.importorskip("bitsandbytes")
    cfg = resolved_default(optimizer="adamw8bit", max_length=8)
    data, moved = fold_data(cfg), []
    for optimizer in ("adamw", "adamw8bit"):
        engine = ku.OptimizerStep(data, ku.dataclasses.replace(cfg, optimizer=optimizer))
        engine.setup_fold(0, **QUIET)
        start = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        for step in range(3):
            engine(step, np.arange(1, 9, 2))
        moved.append(torch.cat([(p.detach() - start[name]).flatten() for name, p in engine.model.named_parameters()]))
        states = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
        size = sum(t.numel() * t.element_size() for t in states if isinstance(t, torch.Tensor) and t.numel() > 256)
        bytes_each = size / ku._num_parameters(engine.model)
        assert bytes_each == pytest.approx({"adamw": 8, "adamw8bit": 2}[optimizer], rel=0.1)
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.9 and not torch.equal(*moved)


def resolved_default(**settings):
    cfg = ku.Config(**settings)
    folder = ku._find_backbone(cfg.backbone)
    return ku.dataclasses.replace(cfg, backbone=str(folder)).resolved(ku._BackboneLoader(folder, cfg).config)


def test_without_bitsandbytes_eight_bit_adamw_is_an_error_that_says_what_to_install(tiny, monkeypatch):
    find = ku.importlib.util.find_spec
    monkeypatch.setattr(ku.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ku.ConfigError, match="adamw8bit needs the package bitsandbytes: pip install bitsandbytes"):
        run(tiny(optimizer="adamw8bit"))


def test_the_default_rate_follows_the_width_and_is_recorded(tiny):
    for width, lr in ((384, 1e-4), (768, 2e-5), (1024, 1e-5)):
        config = ku.transformers.BertConfig(hidden_size=width)
        assert ku.Config().resolved(config).lr == lr
        assert ku.Config(lr=3e-3).resolved(config).lr == 3e-3
    _, record, _ = run(tiny(run_folds="0"))
    expected = {"loss": "mse", "metric": "rmse", "lr": 1e-4, "backbone_dropout": 0.0}
    assert record["resolved"] == expected and record["settings"]["lr"] == 0.0


def test_without_a_tracker_wandb_is_not_imported_and_where_it_is_missing_the_error_says_so(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    run(tiny(run_folds="0"))
    monkeypatch.setattr(ku.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(ku.ConfigError, match="report_to wandb needs the package wandb"),
        ku._RunLog(tiny(report_to="wandb"), "."),
    ):
        pass


@pytest.mark.slow
def test_wandb_logs_offline_and_asks_for_no_login(tiny, tmp_path):
    if ku.importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    cfg = tiny(run_folds="0", report_to="wandb", run_name="tracked")
    environment = {k: v for k, v in ku.os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with Forked(lambda: run(cfg) and None, env=environment, **streams) as process:
        out = process.communicate()[0]
    assert process.returncode == 0, out
    files = list((tmp_path / "runs" / "tracked" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16", "fp32"])
def test_a_gpu_learns_eight_rows_by_heart_in_every_precision(precision, tiny):
    if ku._precision_error(precision):
        pytest.skip(ku._precision_error(precision))
    cfg = resolved(tiny(epochs=40, lr=5e-3, head_lr=1e-2, batch_size=4, weight_decay=0.0, precision=precision))
    frame = pd.concat([train_frame(8), train_frame(8)]).assign(fold=[0] * 8 + [1] * 8)
    logged = []
    train_fold(fold_data(cfg, frame), 0, cfg, logged.append)
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert np.mean(losses[-4:]) < 0.05 * np.mean(losses[:4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_run_is_loaded_and_predicts_what_it_validated(tiny):
    folder, record, oof = run(tiny(run_name="gpu"))
    loaded = ku._Run.load(folder)
    tokenizer, model = loaded.open()
    tokens = ku._tokenize(train_frame(), tokenizer, loaded.cfg)
    ku.load_model(model, folder / "fold1" / "model.safetensors", device="cuda")
    rows = np.flatnonzero(oof["fold"] == 1)
    got = ku.predict(model, tokens, loaded.cfg, rows)[:, 0]
    np.testing.assert_allclose(got, oof["prediction"].iloc[rows], atol=1e-2)
    assert (
        np.isfinite(ku.predict_bundle(ku.Bundle.open(folder), train_frame())).all() and record["peak_memory_bytes"] > 0
    )


def test_a_tracker_gets_the_numbers_of_the_log(tiny, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(ku._RunLog, "start_tracker", lambda log, cfg, folder: Recorder(logged))
    with ku._RunLog(tiny(), tmp_path) as log:
        log({"fold": 1, "step": 2, "loss": 0.5, "lr": {"head": 0.1}})
        log({"fold": 1, "step": 2, "rmse": 0.7})
    assert logged == [
        {"fold1/step": 2, "fold1/loss": 0.5, "fold1/lr/head": 0.1},
        {"fold1/step": 2, "fold1/rmse": 0.7},
        "end",
    ]


class Recorder:
    def __init__(self, logged):
        self.log = logged.append
        self.finish = lambda: logged.append("end")


def test_a_mistake_found_while_the_first_model_is_built_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(ku.ConfigError, match="concat_layers must be at most the backbone's 2 layers"):
        run(tiny(head="concat", concat_layers=9, run_name="r"))
    assert not (tmp_path / "runs" / "r").exists()
    run(tiny(head="concat", concat_layers=2, run_name="r", run_folds="0"))


def test_a_metric_of_ones_own_chooses_the_best_evaluation(tiny):
    @ku.metric("largest_error", "lower", ("regression",))
    def largest_error(target, prediction):
        return np.abs(target - prediction).max()

    def largest_errors(target, prediction):
        return np.abs(target - prediction)

    try:
        _, record, oof = run(tiny(metric="largest_error", epochs=2))
        assert record["oof"]["last"] == pytest.approx((oof["target"] - oof["prediction"]).abs().max())
        with pytest.raises(ku.KitError, match=r"largest_errors must give a number, gave shape \(3,\)"):
            ku._Metric(largest_errors, "lower", (), None)(np.ones(3), np.zeros(3))
    finally:
        del ku.METRICS["largest_error"]


@pytest.mark.parametrize("head", ["conv1d", "lstm"])
def test_heads_of_few_features_serve_several_outputs(head, tiny, competition):
    task_frame("multiclass").to_csv(competition / "train.csv", index=False)
    (competition / "sample_submission.csv").unlink()
    _, record, oof = run(tiny(task="multiclass", head=head, rnn_size=2, epochs=3, lr=5e-3))
    probabilities = oof[[f"prediction_{name}" for name in ("low", "mid", "top")]].to_numpy()
    assert len({tuple(row) for row in probabilities.round(6)}) > 10 and record["oof"]["last"] > 0.3


def test_progress_refreshes_so_rarely_that_a_saved_notebook_stays_small(capsys):
    for _ in ku._progress(range(300), "steps"):
        time.sleep(0.002)
    assert capsys.readouterr().out.count("\r") <= 3
