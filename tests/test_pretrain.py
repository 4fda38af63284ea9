"""Pre-training on the texts of a competition: what is masked, what is learnt, what comes out and how it goes on."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bundle
import kernel_utils as ku
import numpy as np
import pandas as pd
import pretraining
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, PIECES, ROOT, WORDS, Forked, make_pieces, make_texts, tiny_config, trained

CPU = torch.device("cpu")
PAD, UNK, BOS, EOS, MASK = range(5)
WITHOUT = ["xlnet", "t5", "bart", "gpt2", "llama"]  # no head for masked words, or a decoder beside it
WITH = [kind for kind in ARCHITECTURES if kind not in WITHOUT]


@pytest.fixture
def settings(competition, maskable, tmp_path):
    """Function: settings -> PretrainConfig of a quick pre-training on the made competition with a tiny BERT."""

    def config(**given):
        base = dict(data_dir=competition, backbone=maskable("bert"), output_dir=tmp_path / "runs", run_name="p")
        return pretraining.PretrainConfig.from_dict(
            base | dict(max_length=16, epochs=2, batch_size=16, held_out=0.2) | given
        )

    return config


def corpus_of(texts, tokenizer=None, **given):
    cfg = pretraining.PretrainConfig.from_dict(given)
    return pretraining._make_corpus(list(texts), tokenizer or make_pieces(), 27, cfg), cfg


def window(corpus, row):
    span = slice(corpus.tokens.offsets[row], corpus.tokens.offsets[row + 1])
    return corpus.tokens.ids[span]


def told(run):
    return json.loads((run / "pretrain.json").read_text())


# ---------------------------------------------------------------------------------------
# Texts and windows


def test_texts_of_train_and_test_come_once_without_empty_ones_and_without_a_look_at_other_columns(tmp_path):
    pd.DataFrame({"excerpt": ["a cat", "the dog", " a cat ", ""], "target": "?"}).to_csv(
        tmp_path / "train.csv", index=False
    )
    pd.DataFrame({"excerpt": ["the dog", "a hat", "  "], "id": "7"}).to_csv(tmp_path / "test.csv", index=False)
    texts, counts = pretraining._read_texts(pretraining.PretrainConfig(data_dir=str(tmp_path)))
    assert texts == ["a cat", "the dog", "a hat"]
    assert counts == {"train.csv": 4, "test.csv": 3, "empty": 2, "repeated": 2}


def test_a_competition_without_a_test_file_and_a_second_text_column_are_read(tmp_path):
    pd.DataFrame({"left": ["a", "b"], "right": ["c", "a"]}).to_csv(tmp_path / "train.csv", index=False)
    cfg = pretraining.PretrainConfig(data_dir=str(tmp_path), text_columns="left,right")
    assert pretraining._read_texts(cfg)[0] == ["a", "b", "c"]


def test_a_column_of_numbers_and_a_column_that_is_missing_are_named_with_the_file(tmp_path):
    pd.DataFrame({"text": ["0.5", "7"]}).to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(ku.DataError, match=r"train\.csv, column text: expected texts, not numbers .*, got row 1"):
        pretraining._read_texts(pretraining.PretrainConfig(data_dir=str(tmp_path), text_columns="text"))
    with pytest.raises(ku.DataError, match=r"train\.csv: no column 'texd' \(did you mean text\?\)"):
        pretraining._read_texts(pretraining.PretrainConfig(data_dir=str(tmp_path), text_columns="texd"))


def test_max_rows_draws_the_same_texts_whatever_the_order_of_the_rows(tmp_path):
    drawn = []
    for texts in (make_texts(30), make_texts(30)[::-1]):
        pd.DataFrame({"excerpt": texts}).to_csv(tmp_path / "train.csv", index=False)
        drawn.append(pretraining._read_texts(pretraining.PretrainConfig(data_dir=str(tmp_path), max_rows=7, seed=3))[0])
    assert len(drawn[0]) == 7 and sorted(drawn[0]) == sorted(drawn[1])


def test_a_long_text_becomes_windows_of_equal_length_that_lose_no_token():
    texts = [" ".join(WORDS * 3), "a cat"]
    corpus, _ = corpus_of(texts, max_length=20)
    windows = [window(corpus, row).tolist() for row in range(len(corpus.tokens))]
    assert all(ids[0] == BOS and ids[-1] == EOS and len(ids) <= 20 for ids in windows)
    inside = [ids[1:-1] for ids, text in zip(windows, corpus.texts, strict=True) if text == 0]
    assert [i for ids in inside for i in ids] == make_pieces()(texts[0], add_special_tokens=False)["input_ids"]
    assert max(map(len, inside)) - min(map(len, inside)) <= 1 and len(inside) == 4  # 69 tokens, 18 in a window


def test_a_text_without_a_token_that_may_be_masked_is_left_out():
    corpus, _ = corpus_of(["a cat", "?? !!", "the dog"])
    assert corpus.texts.tolist() == [0, 2]


def marks():
    """A tokenizer of the XLM-R kind, which has special tokens among the pieces of words."""
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0), ("▁cat", -2.0)]
    model = tokenizers.models.Unigram(pieces + [(letter, -3.0) for letter in "acdst<>/"], unk_id=1)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    names = dict(pad_token="<pad>", unk_token="<unk>", cls_token="<s>", eos_token="</s>", mask_token="<mask>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("tokenizer", [make_pieces(), marks()], ids=["pieces", "marks"])
def test_special_tokens_that_are_written_in_a_text_are_read_as_text(tokenizer):
    corpus, _ = corpus_of(["cat <s> cat </s><mask> cat"], tokenizer)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    before, after = ku._SpecialSegments.of(tokenizer).ids
    ids = corpus.tokens.ids[len(before) : len(corpus.tokens.ids) - len(after)]
    assert special.isdisjoint(ids.tolist()) and len(ids) > 8 and len(corpus.words) == len(corpus.tokens.ids)
    cat = tokenizer("cat", add_special_tokens=False)["input_ids"][-1]
    assert len(set(corpus.words[corpus.tokens.ids == cat])) == 3


# ---------------------------------------------------------------------------------------
# Masking


def drawn(corpus, cfg, epochs=1):
    """(row, positions, new ids) of every window in so many epochs."""
    for epoch in range(epochs):
        for row in range(len(corpus.tokens)):
            yield row, *pretraining._mask_window(corpus, row, epoch, cfg)


def test_all_tokens_of_a_word_are_masked_together_and_words_are_counted_not_tokens():
    corpus, cfg = corpus_of(["slowly a cat sat quickly on slowly the mat quickly"] * 3, mask_share=0.3)
    for row, positions, _ in drawn(corpus, cfg, 20):
        ids = window(corpus, row)
        starts = [p for p in positions if PIECES[ids[p]] != "##ly"]
        assert len(starts) == 3  # 0.3 of ten words
        for place in range(len(ids) - 1):
            if PIECES[ids[place + 1]] == "##ly":
                assert (place in positions) == (place + 1 in positions)


def test_without_whole_words_tokens_are_masked_one_by_one():
    corpus, cfg = corpus_of(["slowly quickly slowly quickly slowly"], whole_words=False, mask_share=0.3)
    assert all(len(positions) == 3 for _, positions, _ in drawn(corpus, cfg, 10))  # 0.3 of ten tokens
    split = [sum(p + 1 in positions for p in positions if p % 2) < 1 for _, positions, _ in drawn(corpus, cfg, 10)]
    assert any(split)


def test_special_and_unknown_tokens_are_never_masked_nor_drawn_as_replacements():
    corpus, cfg = corpus_of(["the <mask> cat zebra sat </s> on"] * 40, mask_share=0.9)
    kept = {PIECES.index(word) for word in ("the", "cat", "sat", "on")}
    seen = set()
    for row, positions, new in drawn(corpus, cfg, 20):
        assert set(window(corpus, row)[positions]) <= kept and len(positions) == 4
        seen |= set(new.tolist())
    assert MASK in seen and not seen & {PAD, UNK, BOS, EOS} and seen - {MASK} - kept


def test_of_the_masked_tokens_80_percent_become_the_mask_10_percent_random_and_10_percent_stay():
    corpus, cfg = corpus_of(make_texts(200))
    pairs = [(new, window(corpus, row)[positions]) for row, positions, new in drawn(corpus, cfg, 30)]
    new, old = map(np.concatenate, zip(*pairs, strict=True))
    assert len(new) > 14000
    kept = 0.1 + 0.1 / 22  # a random one of 22 ordinary tokens may be the same
    assert (new == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (new == old).mean() == pytest.approx(kept, abs=0.01)


def test_masks_are_drawn_anew_each_epoch_and_again_the_same_for_the_same_seed_epoch_and_row():
    corpus, cfg = corpus_of([" ".join(WORDS)] * 2)
    one, again, epoch, row = (pretraining._mask_window(corpus, r, e, cfg) for r, e in ((0, 1), (0, 1), (0, 2), (1, 1)))
    other = pretraining._mask_window(corpus, 0, 1, pretraining.PretrainConfig(seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert all(not np.array_equal(one[0], x[0]) for x in (epoch, row, other))


def test_a_tokenizer_that_knows_no_words_is_said_and_masks_single_tokens(capsys):
    characters = {c: i for i, c in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<mask>", *"abcdefghijklmnopqrstu "])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(characters, [], unk_token="<unk>"))
    names = dict(pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
    corpus, cfg = corpus_of(
        ["a cat sat on a hat"] * 2,
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names),
    )
    assert "does not divide texts into words: single tokens are masked" in capsys.readouterr().out
    assert {len(positions) for _, positions, _ in drawn(corpus, cfg, 5)} == {round(0.15 * 18)}


# ---------------------------------------------------------------------------------------
# The model


def masked_model(folder, **given):
    cfg = pretraining.PretrainConfig.from_dict(dict(backbone=folder) | given)
    torch.manual_seed(0)
    return *pretraining._load_masked_model(folder, cfg.training()), cfg


@pytest.mark.parametrize("kind", WITH)
def test_the_loss_is_that_of_the_whole_model_at_the_masked_places_whatever_else_is_in_the_batch(kind, maskable):
    model, new, cfg = masked_model(maskable(kind))
    corpus, _ = corpus_of(make_texts(5), max_length=32)
    masks = [pretraining._mask_window(corpus, row, 1, cfg) for row in range(5)]
    with torch.no_grad():
        loss = model.eval()(*pretraining._masked_batch(corpus, np.arange(5), masks, CPU)).item()
    plain, expected = model.language_model, 0.0
    model.backbone._forward_hooks.clear()
    for row, (positions, ids) in enumerate(masks):
        inputs = window(corpus, row).astype(np.int64)
        true = inputs[positions]
        inputs[positions] = ids
        with torch.no_grad():
            logits = plain(torch.from_numpy(inputs)[None]).logits[0, positions].double().numpy()
        shifted = logits - logits.max(1, keepdims=True)
        log = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        expected -= log[np.arange(len(true)), true].sum()
    assert new and loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", WITH)
def test_what_comes_out_is_a_backbone_with_the_trained_weights_and_nothing_to_spare(kind, maskable, settings, capsys):
    seen = {}
    original = pretraining._save_pretrained

    def keeping(model, *rest):
        seen.update({name: weight.clone() for name, weight in model.backbone.state_dict().items()})
        original(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "_save_pretrained", keeping)
        run = pretraining.pretrain(settings(backbone=maskable(kind), epochs=1, max_rows=12, lr=1e-3))
    assert "tied to the word embeddings" in capsys.readouterr().out
    assert ku._find_backbone(str(run)) == run
    model, info = transformers.AutoModel.from_pretrained(run, output_loading_info=True)
    assert not info["unexpected_keys"] and all("pooler" in name for name in info["missing_keys"])
    before = transformers.AutoModel.from_pretrained(maskable(kind)).state_dict()
    moved = 0
    for name, weight in model.state_dict().items():
        if "pooler" not in name:
            assert weight.dtype == seen[name].dtype and torch.equal(weight, seen[name]), name
            moved += not torch.equal(weight, before[name])
    assert moved > 10 and model.dtype == torch.float32
    lines = []
    ku._BackboneLoader(run, ku.Config(), say=lines.append).load()
    assert not [line for line in lines if "not used" in line]
    assert ku._load_tokenizer(run)("slowly a cat")["input_ids"] == make_pieces()("slowly a cat")["input_ids"]


@pytest.mark.parametrize("kind", WITHOUT)
def test_an_architecture_without_a_head_for_masked_words_is_refused_with_what_to_do(kind, maskable, settings):
    with pytest.raises(ku.KitError, match=r"no head that predicts masked words.*train on it as it is") as error:
        pretraining.pretrain(settings(backbone=maskable(kind)))
    assert str(maskable(kind)) in str(error.value) and not Path(settings().output_dir).exists()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_head_that_the_checkpoint_has_is_used_and_learns_at_the_rate_of_the_backbone(
    kind, tmp_path, maskable, capsys
):
    language_model = transformers.AutoModelForMaskedLM.from_pretrained(maskable(kind))
    language_model.save_pretrained(tmp_path)
    make_pieces().save_pretrained(tmp_path)
    model, new, cfg = masked_model(tmp_path, lr=2e-5, head_lr=0.5)
    assert not new and "at random" not in capsys.readouterr().out
    for name, weight in language_model.state_dict().items():
        assert torch.equal(weight, model.language_model.state_dict()[name])
    corpus, _ = corpus_of(make_texts(5))
    rates = {
        group["depth"]: group["lr"]
        for group in pretraining._Pretraining(corpus, model, new, cfg).optimizer.param_groups
    }
    assert rates == {"backbone": 2e-5, "head": 2e-5}


def test_a_head_in_the_names_of_old_checkpoints_is_used(tmp_path, maskable):
    language_model = transformers.AutoModelForMaskedLM.from_pretrained(maskable("bert"))
    language_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("cls.predictions.decoder.bias", None)  # Google's BERT has this bias once
    save_file(
        {name: weight.clone() for name, weight in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    assert not masked_model(tmp_path)[1]


def test_a_new_head_learns_at_its_own_rate_and_biases_and_norms_do_not_decay(maskable):
    model, new, cfg = masked_model(maskable("bert"), lr=2e-5, head_lr=0.5, weight_decay=0.1)
    corpus, _ = corpus_of(make_texts(5))
    groups = pretraining._Pretraining(corpus, model, new, cfg).optimizer.param_groups
    found = {(group["depth"], p.ndim > 1): group["weight_decay"] for group in groups for p in group["params"]}
    assert found == {("backbone", True): 0.1, ("backbone", False): 0, ("head", True): 0.1, ("head", False): 0}
    assert {group["depth"]: group["lr"] for group in groups} == {"backbone": 2e-5, "head": 0.5}
    table = model.backbone.get_input_embeddings().weight
    assert sum(p is table for group in groups for p in group["params"] if group["depth"] == "backbone") == 1


def test_weights_of_the_backbone_that_are_missing_are_an_error_never_random(tmp_path, maskable):
    folder = Path(shutil.copytree(maskable("bert"), tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ku.KitError, match=r"lacks 1 weights of BertForMaskedLM: .*layer\.1\.output\.dense\.weight"):
        masked_model(folder)


def test_a_tokenizer_without_a_mask_token_is_an_error(settings, tmp_path, maskable):
    folder = Path(shutil.copytree(maskable("bert"), tmp_path / "plain"))
    make_pieces(mask=False).save_pretrained(folder)
    with pytest.raises(ku.KitError, match="no mask token"):
        pretraining.pretrain(settings(backbone=folder))


def test_a_window_longer_than_the_positions_of_the_backbone_is_an_error(settings):
    with pytest.raises(ku.ConfigError, match="max_length must be at most 160"):
        pretraining.pretrain(settings(max_length=161))


# ---------------------------------------------------------------------------------------
# Training


def training_of(cfg, texts=40, **given):
    corpus = pretraining._make_corpus(make_texts(texts), make_pieces(), 27, cfg)
    torch.manual_seed(0)
    model, new = pretraining._load_masked_model(Path(cfg.backbone), cfg.training())
    return pretraining._Pretraining(corpus, model, new, cfg)


def test_texts_are_held_out_whole_and_never_trained_on(settings):
    training = training_of(settings(max_length=8, epochs=2))
    texts = training.corpus.texts
    held, used = (set(texts[rows]) for rows in (training.rows, training.train_rows))
    assert len(held) == 8 and not held & used and len(held | used) == 40  # 0.2 of 40
    rows = np.concatenate(list(training.batches()))
    assert sorted(rows) == sorted([*training.train_rows] * 2)


def test_the_held_out_loss_is_of_the_same_masks_each_time_and_leaves_no_trace_in_the_random_state(settings):
    training = training_of(settings())
    before = torch.get_rng_state()
    assert training.evaluate() == training.evaluate()
    assert torch.equal(torch.get_rng_state(), before) and training.model.training
    (_, one), (_, two) = training.state.held_out
    assert one == two == pytest.approx(math.log(27), abs=0.3)  # a new head guesses


def test_micro_batches_make_the_same_step(settings, tmp_path, maskable):
    folder = Path(shutil.copytree(maskable("bert"), tmp_path / "still"))
    config = json.loads((folder / "config.json").read_text())
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config | rates))
    weights = []
    for micro in (0, 3):
        training = training_of(settings(backbone=folder, micro_batch_size=micro, weight_decay=0, warmup_ratio=0))
        training.optimizer = torch.optim.SGD(training.optimizer.param_groups)
        training.step(next(training.batches()))
        weights.append(training.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-7, rtol=1e-5)


@pytest.mark.plots
def test_the_loss_falls_on_texts_that_can_be_learnt(settings, tmp_path):
    texts = [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(12)) for start in range(len(WORDS))]
    pd.DataFrame({"excerpt": [f"{a} {b}" for a in texts for b in texts[:4]]}).to_csv(
        tmp_path / "train.csv", index=False
    )
    run = pretraining.pretrain(settings(data_dir=tmp_path, max_length=32, epochs=30, lr=2e-3, head_lr=5e-3))
    losses = told(run)["held_out"]
    assert losses["before"] > 2.9 and losses["after"] < 0.8 * losses["before"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_what_helps(settings):
    with pytest.raises(ku.NumericError, match=r"pre-training, step \d+: the loss is nan: lower lr"):
        pretraining.pretrain(settings(lr=1e30, head_lr=1e30, warmup_ratio=0))


# ---------------------------------------------------------------------------------------
# Interruptions


@pytest.fixture
def often():
    """A checkpoint after each step."""
    return dict(checkpoint_minutes=1e-9)


class Killed(BaseException):
    """Ends a run as abruptly as an exception can; no code of ours catches it."""


def at_step(monkeypatch, number, act):
    """Call `act` before the step of this number, counted from now on."""
    step, count = pretraining._Pretraining.step, iter(range(1, 10**6))
    monkeypatch.setattr(
        pretraining._Pretraining, "step", lambda *given: act() if next(count) == number else step(*given)
    )


def kill():
    raise Killed


def content(run):
    """What must be equal in two runs, byte for byte; of pretrain.json what does not tell the time."""
    record = told(run)
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".safetensors", ".json")}
    del files["pretrain.json"]
    return files | {name: record[name] for name in ("status", "steps", "held_out", "texts", "windows")}


@pytest.mark.parametrize(
    ("step", "given"),
    [(1, {}), (2, {}), (6, {}), (10, {}), (7, dict(precision="fp16")), (7, dict(precision="bf16", micro_batch_size=3))],
)
def test_a_killed_run_goes_on_to_the_same_bytes(step, given, settings, often, monkeypatch):
    expected = content(pretraining.pretrain(settings(run_name="whole", **given)))
    cfg = settings(run_name="killed", **often, **given)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, step, kill)
        pretraining.pretrain(cfg)
    assert not ku._is_backbone(Path(cfg.output_dir) / "killed")
    steps, count = [], pretraining._Pretraining.step
    monkeypatch.setattr(pretraining._Pretraining, "step", lambda *given: steps.append(1) or count(*given))
    run = pretraining.pretrain(cfg)
    assert content(run) == expected and len(steps) == expected["steps"] - (step - 1)
    assert len(told(run)["sessions"]) == 2 and {p.name for p in run.iterdir()} == {
        *(p.name for p in (run.parent / "whole").iterdir())
    }


@pytest.mark.parametrize(
    "name, counts",
    [("kernel_utils.py", True), ("pretraining.py", True), ("comparison.py", False), ("blending.py", False)],
)
def test_a_change_of_the_core_or_of_pretraining_alone_keeps_a_run_from_going_on(name, counts, tmp_path, monkeypatch):
    corpus, _ = corpus_of(make_texts(5))
    modules = Path(shutil.copytree(ROOT / "kernel_utils", tmp_path / "modules"))
    monkeypatch.setattr(ku, "__file__", str(modules / "kernel_utils.py"))
    monkeypatch.setattr(pretraining, "__file__", str(modules / "pretraining.py"))
    config = modules / "config.json"
    config.write_text("{}")
    before = pretraining._fingerprint(make_texts(5), corpus, config, {})
    with open(modules / name, "a") as file:
        file.write("# another\n")
    assert (pretraining._fingerprint(make_texts(5), corpus, config, {}) != before) == counts


def test_a_process_that_is_killed_by_the_system_goes_on_to_the_same_bytes(settings, often):
    expected = content(pretraining.pretrain(settings(run_name="whole")))
    cfg = settings(run_name="killed", **often)
    step = pretraining._Pretraining.step

    def pretrain_slowly():
        pretraining._Pretraining.step = lambda *arguments: (step(*arguments), time.sleep(0.3))
        pretraining.pretrain(cfg)

    process = Forked(pretrain_slowly, stdout=subprocess.DEVNULL)
    run, limit = Path(cfg.output_dir) / "killed", time.monotonic() + 60
    while not (run / "checkpoints" / "fold0-step3" / "manifest.json").is_file():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert told(run)["status"] == "stopped" and told(run)["stopped"].startswith(ku._CUT_OFF)
    assert content(pretraining.pretrain(cfg)) == expected


def test_a_run_that_a_file_stops_is_saved_says_so_and_goes_on_to_the_same_bytes(settings, monkeypatch):
    expected = content(pretraining.pretrain(settings(run_name="whole")))
    cfg = settings(run_name="slow")
    step, file = pretraining._Pretraining.step, Path(cfg.output_dir) / "slow" / "STOP"
    with monkeypatch.context() as patch:
        patch.setattr(
            pretraining._Pretraining,
            "step",
            lambda training, rows: (step(training, rows), training.state.step == 3 and file.touch()),
        )
        with pytest.raises(ku.Stopped, match=r"the file .*/slow/STOP: saved up to step 3 of 10\n.*with what is saved"):
            pretraining.pretrain(cfg)
    record = told(file.parent)
    assert record["status"] == "stopped" and record["steps"] == 3 and not file.exists()
    file.touch()  # forgotten
    assert content(pretraining.pretrain(cfg)) == expected


def test_max_minutes_that_are_too_few_stop_before_the_first_step(settings):
    with pytest.raises(ku.Stopped, match=r"max_minutes 0\.01.*step 0 of"):
        pretraining.pretrain(settings(max_minutes=0.01))


def test_a_complete_run_is_not_trained_again(settings, monkeypatch, capsys):
    cfg = settings(epochs=1)
    before = content(pretraining.pretrain(cfg))
    monkeypatch.setattr(pretraining._Pretraining, "step", kill)
    assert content(pretraining.pretrain(cfg)) == before and "is complete, nothing is trained" in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(mask_share=0.3), dict(whole_words=False), dict(seed=1), dict(max_rows=20)])
def test_a_name_taken_by_a_run_with_other_settings_is_refused_and_the_run_is_not_touched(change, settings):
    before = content(pretraining.pretrain(settings(epochs=1)))
    with pytest.raises(ku.ConfigError, match=f"{next(iter(change))} was"):
        pretraining.pretrain(settings(epochs=1, **change))
    assert content(Path(settings().output_dir) / "p") == before


def test_links_in_an_unfinished_pretraining_are_refused_by_name_and_hard_links_keep_their_other_names(
    settings, tmp_path
):
    cfg = settings(run_name="r", epochs=1)
    run = pretraining.pretrain(cfg)
    whole = content(run)
    record = json.loads((run / "pretrain.json").read_text())
    (run / "pretrain.json").write_text(json.dumps(record | {"status": "running"}))
    outside = tmp_path / "outside"
    (outside / "fold0-step9").mkdir(parents=True)
    (outside / "file").write_text("precious")
    (run / "checkpoints").symlink_to(outside)
    (run / ".config.json.tmp").symlink_to(outside / "file")
    with pytest.raises(ku.ConfigError) as error:
        pretraining.pretrain(cfg)
    for name in ("checkpoints", ".config.json.tmp"):
        assert f"r/{name}: a symbolic link" in str(error.value)
        (run / name).unlink()
    (run / "tokenizer.json").unlink()
    os.link(outside / "file", run / "tokenizer.json")
    assert content(pretraining.pretrain(cfg)) == whole
    assert (outside / "file").read_text() == "precious" and (outside / "fold0-step9").is_dir()


def test_other_texts_under_the_same_name_are_refused(settings, competition):
    pretraining.pretrain(settings(epochs=1))
    frame = pd.read_csv(competition / "train.csv", dtype=str)
    frame.assign(excerpt=frame["excerpt"] + " cat").to_csv(competition / "train.csv", index=False)
    with pytest.raises(ku.ConfigError, match="the texts: not as when the run began"):
        pretraining.pretrain(settings(epochs=1))


def test_a_killed_run_is_copied_from_an_attached_folder_and_goes_on(settings, often, monkeypatch, tmp_path):
    expected = content(pretraining.pretrain(settings(run_name="whole")))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 4, kill)
        pretraining.pretrain(settings(run_name="killed", **often))
    attached = tmp_path / "attached"
    shutil.move(tmp_path / "runs" / "killed", attached / "killed")
    run = pretraining.pretrain(settings(run_name="again", resume_from=attached, **often))
    assert content(run) == expected


# ---------------------------------------------------------------------------------------
# Provenance


@pytest.fixture
def pretrained(settings):
    return pretraining.pretrain(settings(epochs=1))


def test_pretrain_json_tells_where_the_weights_come_from_and_what_was_done(pretrained, maskable):
    record = told(pretrained)
    weights = maskable("bert") / "model.safetensors"
    assert record["status"] == "complete" and record["weights"] == {weights.name: ku._file_sha256(weights)}
    assert record["backbone"] == str(maskable("bert")) and record["head"] == "new"
    assert record["texts"] == {"train.csv": 40, "test.csv": 10, "empty": 0, "repeated": 0, "used": 50}
    assert record["steps"] == record["of_steps"] == math.ceil((record["windows"] - record["held_out"]["windows"]) / 16)
    assert record["held_out"]["texts"] == 10 and record["settings"]["mask_share"] == 0.15
    assert record["versions"]["transformers"] == transformers.__version__ and record["seconds"] > 0
    losses = record["held_out"]["steps_and_losses"]
    assert [step for step, _ in losses] == [0, record["steps"]]
    assert [losses[0][1], losses[1][1]] == [record["held_out"]["before"], record["held_out"]["after"]]


def test_a_run_and_its_bundle_carry_the_pretraining_of_their_backbone(pretrained, competition, tmp_path, monkeypatch):
    run = trained(tiny_config(competition, pretrained, tmp_path / "runs", run_name="tuned"))
    carried, source = json.loads((run / "record.json").read_text())["pretrained"], told(pretrained)
    assert carried == {name: source[name] for name in ku._PROVENANCE if name in source}
    assert {"weights", "settings", "held_out", "texts", "steps", "versions"} <= set(carried)
    names = ["--id", "me/my-bundle", "--title", "My bundle"]
    monkeypatch.setattr(sys, "argv", ["bundle.py", str(run), "-o", str(tmp_path / "dist"), *names])
    bundle.main()
    assert json.loads((tmp_path / "dist" / "manifest.json").read_text())["runs"]["tuned"]["pretrained"] == carried
    assert json.loads((tmp_path / "dist" / "tuned.record.json").read_text())["pretrained"] == carried


def test_a_starter_takes_the_pretraining_along_with_the_backbone(pretrained):
    sources, problems = bundle.backbone_sources(pretrained)
    assert not problems and {"pretrain.json", "model.safetensors", "config.json"} <= {name for name, _ in sources}


def test_a_run_on_a_plain_backbone_records_no_pretraining(maskable):
    assert ku._pretraining_of(maskable("bert")) == {}


def test_a_second_pretraining_records_the_first(pretrained, settings):
    again = pretraining.pretrain(settings(epochs=1, backbone=pretrained, run_name="again"))
    assert told(again)["pretrained"]["weights"] == told(pretrained)["weights"]
    assert ku._pretraining_of(again)["pretrained"]["pretrained"]["steps"] == told(pretrained)["steps"]


def test_a_backbone_whose_pretraining_is_not_complete_is_refused(pretrained, competition, tmp_path):
    (pretrained / "pretrain.json").write_text(json.dumps(told(pretrained) | {"status": "running"}))
    with pytest.raises(ku.KitError, match=r"pretrain\.json: the pre-training is not complete \(status 'running'\)"):
        trained(tiny_config(competition, pretrained, tmp_path / "runs"))


def test_biases_of_a_new_head_start_at_zero_whatever_memory_held(maskable, monkeypatch):
    load = ku._BackboneLoader.load_weights

    def uninitialised(*arguments):
        model, info = load(*arguments)
        for key, weight in model.named_parameters():
            if key in info["missing_keys"] and key.endswith("bias"):
                weight.data.fill_(torch.nan)
        return model, info

    monkeypatch.setattr(ku._BackboneLoader, "load_weights", uninitialised)
    model, new = pretraining._load_masked_model(maskable("longformer"), pretraining.PretrainConfig().training())
    head = {key: weight for key, weight in model.language_model.named_parameters() if key.startswith("lm_head")}
    assert new and (head["lm_head.bias"] == 0).all() and head["lm_head.dense.weight"].any()
