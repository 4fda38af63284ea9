"""tools/probe_layers.py: features of every layer, out-of-fold ridge regressions on them, and what it says of them."""

import inspect
import sys

import kernel_utils as ku
import numpy as np
import pandas as pd
import probe_layers
import pytest
import scipy.stats
import torch
import transformers
from matplotlib.image import imread

from conftest import tiny_config, train_frame

LAYERS, WIDTH = 4, 32  # of the tiny backbones


@pytest.fixture
def made():
    """Features (60, 8), targets (60, 2) that depend on them, and folds 0, 1, 2 in turn."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, [1, 2, 5, 1, 1, 1, 1, 0.1], size=(60, 8))
    targets = x[:, :2] @ [[1.0, 0.5], [-0.5, 1.0]] + rng.normal(0, 1, (60, 2))
    return x, targets, np.arange(60) % 3


def states_alone(folder, kind, text):
    """States of one text without padding, (L + 1, T, H), by transformers alone."""
    auto = transformers.T5EncoderModel if kind == "t5" else transformers.AutoModel
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    taken = {name: inputs[name] for name in inspect.signature(model.forward).parameters if name in inputs}
    with torch.no_grad():
        out = model(**taken, output_hidden_states=True)
    return np.stack([state[0].numpy() for state in (*out.hidden_states[:-1], out.last_hidden_state)])


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "modernbert", "t5", "gpt2"])
@pytest.mark.parametrize("attention", ["", "eager"])
def test_features_are_those_of_each_text_alone_in_packed_and_in_padded_batches(
    kind, attention, competition, backbone_folder, tmp_path
):
    cfg = tiny_config(competition, backbone_folder(kind), tmp_path, attention=attention, batch_tokens=128)
    model, tokens, frame = probe_layers.load(cfg)
    assert not model.training and len(set(tokens.lengths)) > 5
    pooled = probe_layers.pool_layers(model, tokens, cfg)
    assert pooled.shape == (LAYERS + 1, 2, len(frame), WIDTH) and pooled.dtype == np.float32
    for row in (0, tokens.lengths.argmin(), tokens.lengths.argmax()):
        states = states_alone(backbone_folder(kind), kind, frame["excerpt"][row])
        token = states[:, -1 if kind in ("t5", "gpt2") else 0]
        np.testing.assert_allclose(pooled[:, 0, row], token, atol=2e-5 * abs(states).max())
        np.testing.assert_allclose(pooled[:, 1, row], states.mean(1), atol=2e-5 * abs(states).max())


def test_features_of_a_text_in_windows_are_the_means_of_those_of_its_windows(tiny):
    cfg = tiny(max_length=10, windows=4, window_overlap=3)
    model, tokens, _ = probe_layers.load(cfg)
    pooled = probe_layers.pool_layers(model, tokens, cfg)
    of_windows = probe_layers.pool_layers(model, tokens.windows, cfg)
    first = [0, *np.cumsum(tokens.n_windows)]
    assert len(set(tokens.n_windows)) > 2 and pooled.dtype == np.float32
    for row in range(len(tokens)):
        expected = of_windows[:, :, first[row] : first[row + 1]].mean(2)
        np.testing.assert_allclose(pooled[:, :, row], expected, atol=1e-5)


def test_settings_of_training_do_not_change_the_features(tiny):
    plain, other = tiny(), tiny(reinit_layers=2, mixout=0.5, backbone_dropout=0.5, head="conv1d", seed=3)
    features = [probe_layers.pool_layers(*probe_layers.load(cfg)[:2], cfg) for cfg in (plain, other)]
    np.testing.assert_array_equal(*features)


def normal_equations(x, y, alpha):
    """Weights and intercept of the ridge regression that does not shrink the intercept."""
    mean, centre = x.mean(0), y.mean(0)
    weights = np.linalg.solve((x - mean).T @ (x - mean) + alpha * np.eye(x.shape[1]), (x - mean).T @ (y - centre))
    return weights, centre - mean @ weights


def test_predictions_solve_the_normal_equations_of_the_other_folds(made, monkeypatch):
    x, targets, folds = made
    monkeypatch.setattr(probe_layers, "ALPHAS", [7.0])
    predictions, alphas = probe_layers.predict_folds(x, targets, folds)
    for fold in range(3):
        z = (x - x[folds != fold].mean(0)) / x[folds != fold].std(0)
        weights, intercept = normal_equations(z[folds != fold], targets[folds != fold], 7.0)
        expected = z[folds == fold] @ weights + intercept
        np.testing.assert_allclose(predictions[folds == fold], expected, rtol=1e-9)
    assert alphas == [7.0] * 3


def test_alpha_is_the_best_by_leave_one_out_among_the_training_rows(made):
    x, targets, folds = made[0], made[1][:, :1], made[2]
    _, alphas = probe_layers.predict_folds(x, targets, folds)
    for fold in range(3):
        z, y = (a[folds != fold] for a in (probe_layers.standardise(x, folds != fold), targets))
        errors = []
        for alpha in probe_layers.ALPHAS:
            fits = [normal_equations(np.delete(z, i, 0), np.delete(y, i, 0), alpha) for i in range(len(z))]
            errors.append(sum((z[i] @ w + b - y[i]) ** 2 for i, (w, b) in enumerate(fits)).item())
        assert alphas[fold] == probe_layers.ALPHAS[np.argmin(errors)]
    assert min(alphas) > 0.1 and max(alphas) < 1e6  # the grid goes on at both sides


def test_a_row_is_predicted_without_targets_of_its_fold(made):
    x, targets, folds = made
    before, _ = probe_layers.predict_folds(x, targets, folds)
    changed = targets.copy()
    changed[folds == 1] = np.random.default_rng(1).permutation(changed[folds == 1]) + 100
    after, _ = probe_layers.predict_folds(x, changed, folds)
    np.testing.assert_array_equal(before[folds == 1], after[folds == 1])
    assert (before[folds != 1] != after[folds != 1]).all()
    constants = [probe_layers.predict_constant(y, folds)[folds == 1] for y in (targets, changed)]
    np.testing.assert_array_equal(*constants)
    np.testing.assert_allclose(constants[0], np.tile(targets[folds != 1].mean(0), (20, 1)))


def test_a_row_is_predicted_without_features_of_other_rows_of_its_fold(made):
    x, targets, folds = made
    before, _ = probe_layers.predict_folds(x, targets, folds)
    changed = x.copy()
    changed[4] *= 1000  # in fold 1
    after, _ = probe_layers.predict_folds(changed, targets, folds)
    others = (folds == 1) & (np.arange(60) != 4)
    np.testing.assert_array_equal(before[others], after[others])
    z = probe_layers.standardise(changed, folds != 1)[folds != 1]
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(z.std(0), 1)


def test_rounding_in_a_feature_that_is_constant_is_not_scaled_up(made):
    _, targets, folds = made
    x = np.full((60, 4), 2.0) + 1e-7 * targets[:, :1]
    predictions, _ = probe_layers.predict_folds(x.astype(np.float32), targets, folds)
    np.testing.assert_allclose(predictions, probe_layers.predict_constant(targets, folds))


def planted(targets, layer, feature, n_layers=5):
    """Noise as features (n_layers, 2, N, 6), but for one that has the targets in it."""
    pooled = np.random.default_rng(2).normal(size=(n_layers, 2, len(targets), 6)).astype(np.float32)
    pooled[layer, feature, :, :2] += targets
    return pooled


def test_a_signal_is_found_at_the_layer_and_feature_that_has_it(made):
    _, targets, folds = made
    table = probe_layers.probe_layers(planted(targets, 2, 1), targets, folds, "rmse")
    best = table.loc[table["score"].idxmin()]
    assert (best["layer"], best["feature"]) == (2, "mean") and best["r2"] > 0.5
    assert (table["r2"].drop(best.name) < 0.1).all()
    assert "mean: best at layer 2 (rmse " in probe_layers.hint(table, "mean")


def test_scores_are_over_all_rows_in_target_units_with_their_spread_over_folds(made):
    x, targets, folds = made
    row = probe_layers.score_row(targets, x[:, :2], folds, "rmse")
    errors = (targets - x[:, :2]) ** 2
    of_folds = [np.sqrt(errors[folds == fold].mean()) for fold in range(3)]
    constant = np.stack([targets[folds != fold].mean(0) for fold in folds])
    assert row["score"] == pytest.approx(np.sqrt(errors.mean()))
    assert [row[f"score fold {fold}"] for fold in range(3)] == pytest.approx(of_folds)
    assert row["sd over folds"] == pytest.approx(np.std(of_folds, ddof=1))
    assert row["r2"] == pytest.approx(1 - errors.sum() / ((targets - constant) ** 2).sum())


def test_classes_are_scored_by_r2_of_their_indicators(tiny):
    labels = ["low", "mid", "high"] * 13 + ["low"]
    frame = train_frame().assign(target=labels, fold=[0, 0, 0, 1, 1] * 8)
    cfg = tiny(task="multiclass")
    targets = probe_layers.make_targets(frame, cfg)
    np.testing.assert_array_equal(targets, [[label == name for name in ("high", "low", "mid")] for label in labels])
    folds = frame["fold"].to_numpy()
    row = probe_layers.score_row(targets, 0.9 * targets + 0.02, folds, "r2")
    constant = np.stack([targets[folds != fold].mean(0) for fold in folds])
    expected = 1 - ((0.1 * targets - 0.02) ** 2).sum() / ((targets - constant) ** 2).sum()
    assert row["score"] == row["r2"] == pytest.approx(expected)
    assert probe_layers.score_row(targets, constant, folds, "r2")["score"] == 0


def test_of_two_classes_the_indicator_of_the_second_is_probed_and_labels_stay_as_they_are(tiny):
    two = train_frame(4).assign(target=["yes", "no", "no", "yes"])
    np.testing.assert_array_equal(probe_layers.make_targets(two, tiny(task="binary")), [[1], [0], [0], [1]])
    several = train_frame(4).assign(a=[1.0, 0, 1, 0], b=[1.0, 1, 0, 0])
    cfg = tiny(task="multilabel", target_columns="a,b")
    np.testing.assert_array_equal(probe_layers.make_targets(several, cfg), several[["a", "b"]])


def test_a_target_that_is_the_same_everywhere_is_refused(tiny):
    with pytest.raises(ku.DataError, match=r"train\.csv: target is the same in every row"):
        probe_layers.make_targets(train_frame().assign(target=1.5), tiny())


def scored(layers, metric="rmse", feature="cls"):
    """A table with these scores of five folds for each layer."""
    rows = [{f"score fold {i}": score for i, score in enumerate(layer)} for layer in layers]
    scores = [{"layer": i, "feature": feature, "metric": metric, "score": np.mean(s)} for i, s in enumerate(layers)]
    return pd.DataFrame([a | b for a, b in zip(scores, rows, strict=True)])


NOISE = np.array([0.02, -0.01, 0.0, 0.01, -0.02])
SPREAD = np.array([0.1, -0.1, 0.2, -0.2, 0.0])  # of folds, the same in every layer
LOSING = [0.9, 0.7 + NOISE, 0.6 - NOISE, 0.61 + NOISE, 0.75 - NOISE, 0.8 + NOISE]  # 3 is as good as 2, 4 is not


@pytest.mark.parametrize(("metric", "sign"), [("rmse", 1), ("r2", -1)])
def test_layers_that_know_less_by_more_than_the_noise_of_the_folds_are_named(metric, sign):
    table = scored([sign * (layer + SPREAD) for layer in LOSING], metric)
    assert probe_layers.hint(table, "cls") == (
        f"cls: best at layer 2 ({metric} {sign * 0.6:.4f}), the last one, 5, is 0.2000 behind; "
        "layers above 3 know less than layer 2: candidates for reinit_layers 2"
    )


def test_a_last_layer_that_is_behind_by_noise_is_as_good_as_any():
    table = scored([0.9 + SPREAD, 0.6 + SPREAD, 0.7 + SPREAD, 0.61 + SPREAD + NOISE])  # 2 is worse, the last is not
    said = "cls: best at layer 1 (rmse 0.6000), the last one, 3, is 0.0100 behind; the last layer is as good as any"
    assert probe_layers.hint(table, "cls") == said


def test_a_last_layer_that_is_the_best_is_as_good_as_any():
    table = scored([0.9 + SPREAD, 0.7 + NOISE + SPREAD, 0.6 + SPREAD])
    assert probe_layers.hint(table, "cls") == "cls: best at layer 2 (rmse 0.6000); the last layer is as good as any"


def test_a_last_layer_that_is_ahead_in_most_folds_does_not_know_less():
    table = scored([0.6 + SPREAD, 0.5 + SPREAD + NOISE]).assign(score=[0.6, 0.61])  # one fold has most of the rows
    assert "best at layer 0" in (said := probe_layers.hint(table, "cls")) and "as good as any" in said


def test_the_noise_is_that_of_the_corrected_t_test_not_of_folds_that_share_nothing():
    table = scored([0.6 + SPREAD, 0.6 + SPREAD + 0.025 + NOISE])
    assert scipy.stats.ttest_1samp(0.025 + NOISE, 0).pvalue < 0.03
    assert "as good as any" in probe_layers.hint(table, "cls")
    assert "reinit_layers 1" in probe_layers.hint(scored([0.6 + SPREAD, 0.65 + SPREAD + NOISE]), "cls")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["probe_layers.py", *map(str, arguments)])
    probe_layers.main()


def probe(monkeypatch, folder, competition, backbone, *settings):
    told = [f"data_dir={competition}", f"backbone={backbone}", "max_length=32", *settings]
    run(monkeypatch, "-o", folder, *(word for setting in told for word in ("--set", setting)))
    return pd.read_csv(folder / "probe.csv")


def test_the_command_writes_table_and_picture_and_says_what_they_show(
    competition, backbone_folder, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "new" / "probe"
    table = probe(monkeypatch, folder, competition, backbone_folder("bert"), "n_folds=4")
    assert list(table["feature"]) == ["constant", *["cls", "mean"] * (LAYERS + 1)]
    assert table["layer"].isna()[0] and list(table["layer"][1::2]) == list(range(LAYERS + 1))
    assert set(table["rows"]) == {40} and set(table["folds"]) == {4} and set(table["metric"]) == {"rmse"}
    assert table["backbone"][0] == ku._short_name(str(backbone_folder("bert"))) and str(tmp_path) not in str(table)
    assert {"device", "score", "sd over folds", "r2", "alpha fold 3", "score fold 3"} <= set(table)
    assert table["score"][1] == pytest.approx(table["score"][0])  # the first token's embedding says nothing
    targets = pd.read_csv(competition / "train.csv", dtype={"id": str})
    folds = ku.make_folds(targets, ku.Config(n_folds=4))["fold"].to_numpy()
    y = targets["target"].to_numpy()
    errors = [y[folds == fold] - y[folds != fold].mean() for fold in range(4)]
    assert table["score"][0] == pytest.approx(np.sqrt((np.concatenate(errors) ** 2).mean()), rel=1e-5)
    image = imread(folder / "probe.png")[..., :3]
    assert min(image.shape[:2]) >= 400 and len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said[0].startswith("cls: best at") and said[1].startswith("mean: best at") and "not evidence" in said[2]


def test_classes_can_be_probed_by_the_command(competition, backbone_folder, tmp_path, monkeypatch):
    frame = pd.read_csv(competition / "train.csv", dtype=str)
    frame["target"] = np.where(frame["excerpt"].str.split().str.len() > 15, "long", "short")
    frame.to_csv(competition / "train.csv", index=False)
    table = probe(monkeypatch, tmp_path / "probe", competition, backbone_folder("bert"), "task=binary", "n_folds=2")
    assert set(table["metric"]) == {"r2"} and (table["score"] == table["r2"]).all() and table["score"][0] == 0
    assert table["score"].max() > 0.1


def test_misspelt_settings_are_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "-o", tmp_path / "probe", "--set", "backbon=x", "--set", "max_length=many")
    told = str(caught.value)
    assert "there is no setting 'backbon' (did you mean backbone?)" in told and "max_length must be a whole" in told
    assert not (tmp_path / "probe").exists()


def test_a_setting_without_a_value_is_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "-o", tmp_path, "--set", "backbone")
    assert "expected NAME=VALUE, got 'backbone'" in capsys.readouterr().err


def test_an_output_that_cannot_be_a_folder_is_an_error_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        run(monkeypatch, "-o", tmp_path / "file", "--set", "data_dir=nowhere")
