"""Long texts in overlapping windows: how they are cut, that their logits are pooled, and whole runs."""

import dataclasses
import itertools

import kernel_utils as ku
import numpy as np
import openvino_engine
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import QUIET, WORDS, engine_of, make_texts, make_tokenizer, tiny_config, train_frame, trained

CPU = torch.device("cpu")
BOS, EOS, FIRST = 2, 3, 4


def words_of(n):
    """Text of the words 0, 1, 2, ... and on from 0."""
    return " ".join(WORDS[i % len(WORDS)] for i in range(n))


def windows_of(text, **settings):
    """The words of each window, by their numbers in WORDS; max_length 8 leaves room for six."""
    columns = {"excerpt": [text], "second": [text]}
    tokens = ku._tokenize(columns, make_tokenizer(), ku.Config(max_length=8, **settings))
    rows = np.split(tokens.windows.ids, tokens.windows.offsets[1:-1])
    assert all(row[0] == BOS and row[-1] == EOS and len(row) <= 8 for row in rows)
    return [[int(i) - FIRST for i in row[1:-1]] for row in rows]


# ---------------------------------------------------------------------------------------
# Cutting


@pytest.mark.parametrize(
    "n_words, settings, spans",
    [
        (0, dict(windows=3, window_overlap=2), [(0, 0)]),
        (6, dict(windows=3, window_overlap=2), [(0, 6)]),
        (7, dict(windows=3, window_overlap=2), [(0, 6), (1, 7)]),  # the last ends with the text
        (10, dict(windows=3, window_overlap=2), [(0, 6), (4, 10)]),
        (11, dict(windows=3, window_overlap=2), [(0, 6), (4, 10), (5, 11)]),
        (14, dict(windows=3, window_overlap=2), [(0, 6), (4, 10), (8, 14)]),
        (14, dict(windows=3, window_overlap=0), [(0, 6), (6, 12), (8, 14)]),
        (14, dict(windows=9, window_overlap=4), [(0, 6), (3, 9), (6, 12), (8, 14)]),  # half is shared at most
        # 15 words and more do not go into three windows of 6 that share 2, which hold 14
        (20, dict(windows=3, window_overlap=2), [(0, 6), (4, 10), (8, 14)]),
        (20, dict(windows=3, window_overlap=2, truncation="tail"), [(6, 12), (10, 16), (14, 20)]),
    ],
)
def test_a_long_text_is_read_in_windows_that_overlap_and_end_with_it(n_words, settings, spans):
    assert windows_of(words_of(n_words), **settings) == [list(range(*span)) for span in spans]


def test_head_and_tail_of_a_text_that_is_too_long_for_its_windows_are_joined():
    # 10 of 20 words go into two windows: 10 // 4 of the head, the rest of the tail
    joined = [0, 1, *range(12, 20)]
    got = windows_of(words_of(20), windows=2, window_overlap=2, truncation="head_tail")
    assert got == [joined[:6], joined[4:]]


def test_the_first_text_of_a_pair_is_repeated_and_takes_half_of_the_room_at_most():
    texts = {"excerpt": ["the cat", words_of(9), words_of(9)], "second": [words_of(9), words_of(9), "the"]}
    cfg = ku.Config(max_length=13, windows=4, window_overlap=2, text_columns=["excerpt", "second"])
    tokens = ku._tokenize(texts, make_tokenizer(), cfg)  # 10 words beside <s>, </s> and </s>
    ids, half = list(range(FIRST, FIRST + 9)), list(range(FIRST, FIRST + 5))
    cat = [BOS, 4, 6, EOS]
    expected = [[*cat, *ids[:8], EOS], [*cat, *ids[1:], EOS]]
    expected += [[BOS, *half, EOS, *part, EOS] for part in (ids[:5], ids[3:8], ids[4:])]
    expected += [[BOS, *ids, EOS, 4, EOS]]  # it fits, so it is whole
    assert [row.tolist() for row in np.split(tokens.windows.ids, tokens.windows.offsets[1:-1])] == expected
    assert tokens.n_windows.tolist() == [2, 3, 1] and tokens.lengths.tolist() == [26, 39, 13]


@pytest.mark.parametrize("seed", range(20))
def test_of_several_segments_one_is_read_to_its_end_and_the_others_take_half_at_most(seed):
    rng = np.random.default_rng(seed)
    row = [[100 * k + i for i in range(rng.integers(0, 60))] for k in range(rng.integers(1, 5))]
    room, long = int(rng.integers(4, 80)), int(rng.integers(len(row)))
    cfg = ku.Config(windows=50, window_overlap=int(rng.integers(0, 20)))
    rows = ku._cut_row(row, room, long, ["head"] * len(row), cfg)
    windows, others = [parts[long] for parts in rows], [[*parts[:long], *parts[long + 1 :]] for parts in rows]
    assert all(other == others[0] for other in others) and all(sum(map(len, parts)) <= room for parts in rows)
    assert sorted(set().union(*windows)) == row[long]
    if sum(map(len, row)) <= room:
        assert rows == [row]
    elif len(rows) > 1:
        n_others = sum(map(len, others[0]))
        assert n_others <= room // 2 and all(len(window) == room - n_others for window in windows)
        overlaps = [one[-1] + 1 - two[0] for one, two in itertools.pairwise(windows)]
        overlap = min(cfg.window_overlap, (room - n_others) // 2)
        assert set(overlaps[:-1]) <= {overlap} and overlap <= overlaps[-1] < room - n_others


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(window_overlap=32), "window_overlap does nothing while windows is 1"),
        (dict(window_pool="max"), "window_pool does nothing while windows is 1"),
    ],
)
def test_settings_of_windows_that_do_not_fit_are_refused(settings, problem):
    with pytest.raises(ku.ConfigError, match=problem):
        ku.Config(**settings)


# ---------------------------------------------------------------------------------------
# Logits, gradients, predictions

LONG = dict(max_length=10, windows=4, window_overlap=3, precision="fp32")
LAYOUTS = {"packed": {}, "padded": {"attention": "sdpa"}}


def plain_logits(text, cfg, backbone, output):
    """Logits (1, K) of a text: Hugging Face's own model on each window alone, their mean or maximum."""
    ids = torch.tensor([FIRST + WORDS.index(word) for word in text.split()])
    room, step = cfg.max_length - 2, cfg.max_length - 2 - cfg.window_overlap
    ids = ids[: room + 3 * step]
    starts = [0] if len(ids) <= room else [*range(0, len(ids) - room, step), len(ids) - room]
    logits = []
    for start in starts:
        window = torch.cat([torch.tensor([BOS]), ids[start : start + room], torch.tensor([EOS])])
        states = backbone(input_ids=window[None]).last_hidden_state
        logits.append(output(states.mean(1)))
    logits = torch.cat(logits)
    return logits.mean(0, True) if cfg.window_pool == "mean" else logits.max(0, True).values


def engine_and_plain(cfg):
    """An engine at the start of a fold, and (backbone, output layer) with its weights."""
    engine = engine_of(cfg)
    engine.setup_fold(0, **QUIET)
    model = engine.model
    backbone = transformers.AutoModel.from_pretrained(cfg.backbone, attn_implementation="eager")
    output = torch.nn.Linear(model.output.in_features, model.output.out_features)
    output.load_state_dict(model.output.state_dict())
    return engine, backbone, output


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_a_step_has_the_gradient_of_the_loss_of_pooled_logits(pool, layout, micro_batch_size, tiny):
    cfg = tiny(window_pool=pool, micro_batch_size=micro_batch_size, **LONG, **LAYOUTS[layout])
    engine, backbone, output = engine_and_plain(cfg)
    assert engine.is_packed == (layout == "packed")
    rows = np.array([5, 1, 9, 13, 7, 3, 21, 11])
    assert set(engine.data.tokens.n_windows[rows]) >= {1, 3, 4}
    engine.accumulate(engine.micro_batches(rows))

    frame = train_frame(24)
    logits = torch.cat([plain_logits(frame["excerpt"][row], cfg, backbone, output) for row in rows])
    own = frame["target"][1::2]  # those of fold 1, which are trained on
    target = torch.tensor(((frame["target"] - own.mean()) / own.std(ddof=0)).to_numpy()[rows]).float()
    loss = (logits[:, 0] - target).square().mean()
    loss.backward()
    assert engine.mean_loss.item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(engine.model.output.weight.grad, output.weight.grad, rtol=1e-3, atol=1e-4)
    expected = dict(backbone.named_parameters())
    for name, weight in engine.model.backbone.named_parameters():
        if weight.grad is not None and expected[name].grad is not None:
            torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_tokens", [8, 4096])  # one window a batch; all of them
def test_predictions_are_of_pooled_logits_whatever_batch_a_window_is_in(pool, layout, batch_tokens, tiny):
    cfg = tiny(window_pool=pool, batch_tokens=batch_tokens, **LONG, **LAYOUTS[layout])
    engine, backbone, output = engine_and_plain(cfg)
    rows = [4, 20, 3, 3, 17]
    with torch.no_grad():
        texts = train_frame(24)["excerpt"]
        logits = np.array([plain_logits(texts[row], cfg, backbone, output).item() for row in rows])
    own = train_frame(24)["target"][1::2]
    expected = logits * own.std(ddof=0) + own.mean()
    np.testing.assert_allclose(engine.predict(rows)[:, 0], expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_texts_of_one_window_are_predicted_as_without_windows_to_the_bit(layout, tiny):
    settings = dict(max_length=40, precision="fp32", **LAYOUTS[layout])  # all of the texts fit
    one, several = engine_of(tiny(**settings)), engine_of(tiny(windows=8, window_overlap=5, **settings))
    for engine in (one, several):
        engine.setup_fold(0, **QUIET)
    assert (one.predict(np.arange(24)) == several.predict(np.arange(24))).all()


def test_each_dropout_sample_is_pooled_by_itself(build):
    model, tokens = build("bert", head_dropout=0.5, dropout_samples=3, windows=3, window_overlap=2)
    logits = torch.arange(24.0).reshape(3, 4, 2)
    pooled = model.pool_windows(logits, [1, 3])
    assert pooled.tolist() == [[[8 * s, 8 * s + 1], [8 * s + 4, 8 * s + 5]] for s in range(3)]
    assert model.train()(**tokens.batch([2, 0], CPU)).shape == (3, 2, 1)


# ---------------------------------------------------------------------------------------
# Steps and folds


@pytest.mark.parametrize(
    "settings",
    [
        dict(rdrop=1.0, head_dropout=0.2, dropout_samples=2),
        dict(awp=0.01, adversarial_start=0, ema=0.9),
        dict(loss="coral", levels="-1,9", window_pool="max"),
        dict(loss="gaussian", error_column="standard_error"),
        dict(length_bucket=4, attention="sdpa"),
    ],
)
def test_what_else_a_step_does_goes_with_windows(settings, tiny):
    frame = train_frame(24).assign(fold=[0, 1] * 12)
    if settings.get("loss") == "coral":
        frame["target"] = frame["target"].round()
    engine = engine_of(tiny(**LONG, **settings), frame)
    engine.setup_fold(0, **QUIET)
    batches = list(engine.data.batches(0, engine.cfg, engine.length_bucket))
    results = [engine(step, rows) for step, rows in enumerate(batches)]
    assert all(result.values.isfinite().all() for result in results)
    assert sorted(np.concatenate(batches)) == list(range(1, 24, 2))


def test_static_shapes_are_left_out_with_a_reason(tiny):
    engine, said = engine_of(tiny(compile=True, **LONG)), []
    engine.setup_fold(0, say=said.append)
    assert "compile is left out: texts have different numbers of windows" in said


def test_micro_batches_are_halved_until_their_windows_fit(tiny, monkeypatch):
    engine = engine_of(tiny(**LONG))
    engine.setup_fold(0, **QUIET)
    real, rows = engine.forward_backward, np.arange(1, 17, 2)

    def forward_backward(inputs, rows):
        if inputs["pack"].attention_mask.shape[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.\nIt has details.")
        real(inputs, rows)

    engine.accumulate(engine.micro_batches(rows))
    loss = engine.mean_loss.item()
    engine.zero_sums()
    monkeypatch.setattr(engine, "forward_backward", forward_backward)
    result = engine(0, rows)
    assert engine.micro_batch_size < 8 and result.values[0].item() == pytest.approx(loss, rel=1e-5)


def test_windows_come_back_from_the_file_for_another_process(tiny, tmp_path):
    data = engine_of(tiny(**LONG)).data
    data.save(tmp_path)
    again = ku._TrainingData.load(tmp_path, data.tokenizer).tokens
    for name, value in data.tokens.batch([3, 9], CPU).items():
        other = again.batch([3, 9], CPU)[name]
        assert value == other if name == "n_windows" else torch.equal(value, other)
    assert again.lengths.tolist() == data.tokens.lengths.tolist()


# ---------------------------------------------------------------------------------------
# Whole runs


def test_a_word_at_the_end_of_a_long_text_is_learnt_in_windows_and_not_from_the_head(tmp_path, backbone_folder):
    folder, rng = tmp_path / "tail", np.random.default_rng(0)
    labels = np.tile(["cat", "dog"], 40)
    texts = [" ".join([*rng.choice(["the", "a", "on"], 490), *[label] * 10]) for label in labels]
    folder.mkdir()
    frame = pd.DataFrame({"id": range(len(texts)), "excerpt": texts, "target": labels})
    frame.to_csv(folder / "train.csv", index=False)
    settings = dict(task="binary", head="max", max_length=66, run_folds="0", epochs=4, eval_steps=20)
    settings |= dict(lr=3e-3, head_lr=1e-2, backbone_dropout=0.0, precision="fp32")
    scores = {}
    for name, more in {"head": {}, "windows": dict(windows=9, window_overlap=8)}.items():
        cfg = tiny_config(folder, backbone_folder("tiny"), tmp_path, run_name=name, **settings | more)
        frame = ku.make_folds(ku.read_competition(cfg)[0], cfg)
        scores[name] = ku.RunFolder(ku.train(frame, cfg)).read_record()["oof"]["last"]
    assert scores["windows"] > 0.95 and scores["head"] < 0.7


@pytest.fixture(scope="module")
def run(runs, backbone_folder, tmp_path_factory):
    """A finished run with windows on the made competition."""
    folder = tmp_path_factory.mktemp("windowed")
    return trained(
        tiny_config(
            runs.parent / "competition", backbone_folder("tiny"), folder, run_name="r", **LONG | {"head": "gru"}
        )
    )


def plain_predictions(run, texts):
    """Mean over the folds of fresh models that read window by window."""
    cfg, total = run.cfg, []
    for path in run.weights.values():
        tokenizer, model = run.open()
        model.load_state_dict(load_file(path))
        with torch.no_grad():
            rows = []
            for text in texts:
                tokens = ku._tokenize({"excerpt": [text]}, tokenizer, cfg).windows
                windows = np.split(tokens.ids, tokens.offsets[1:-1])
                logits = [model.eval()(torch.tensor(ids)[None].long(), torch.ones(1, len(ids))) for ids in windows]
                rows.append(model.predict(torch.cat(logits).mean(0, True)).numpy()[0])
            total.append(rows)
    return np.mean(total, axis=0)


def test_other_texts_are_predicted_as_window_by_window_also_one_of_50000_words(run):
    bundle = ku.load_bundle(run)
    ku.check_golden(bundle)
    texts = [*make_texts(8, seed=9), words_of(50_000), ""]
    frame = pd.DataFrame({"id": range(len(texts)), "excerpt": texts})
    predictions = ku.predict_bundle(bundle, frame)
    np.testing.assert_allclose(predictions, plain_predictions(bundle.runs[0], texts), atol=1e-5)


def test_runs_that_pool_windows_in_another_way_share_no_model(run):
    bundle, frame = ku.load_bundle(run), train_frame(12, seed=4)
    pools = [dataclasses.replace(bundle.runs[0].cfg, window_pool=pool) for pool in ("mean", "max")]
    bundle = dataclasses.replace(bundle, runs=[bundle.runs[0]._replace(cfg=cfg) for cfg in pools])
    predictions = {one.cfg.window_pool: of_folds[0] for one, of_folds in bundle.predict_folds(frame)}
    difference = predictions["max"] - predictions["mean"]
    assert (difference > -1e-6).all() and (difference > 1e-4).any()


@pytest.mark.skipif(not openvino_engine.importlib.util.find_spec("openvino"), reason="needs openvino")
def test_openvino_predicts_windows(run, monkeypatch, capsys):
    monkeypatch.setattr(openvino_engine, "MIN_ROWS", 1)
    monkeypatch.setattr(openvino_engine, "MAX_SECONDS", np.inf)
    bundle, frame = ku.load_bundle(run), train_frame(12, seed=4)
    got = openvino_engine.OpenvinoBundle.of(bundle, "fp32").predict(frame)
    assert "OpenVINO fp32 agrees" in capsys.readouterr().out
    np.testing.assert_allclose(got, bundle.predict(frame), atol=1e-5)
