"""What inference does for speed: shared tokens, one model, and a precision that proves itself."""

import dataclasses
import gc
import json
import shutil
import weakref

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_config, train_frame, trained

FRAME = train_frame(12, seed=4)


@pytest.fixture(scope="module")
def three(runs, backbone_folder, tmp_path_factory):
    """Folders of three runs: `one` has another head than `two` and `three`."""
    folder = tmp_path_factory.mktemp("three")
    cfg = tiny_config(runs.parent / "competition", backbone_folder("tiny"), folder, run_name="three", seed=2, epochs=2)
    return {"one": runs / "one", "two": runs / "two", "three": trained(cfg)}


@pytest.fixture
def bundle_of(three):
    """Function: names of runs and the setting `precision` -> Bundle."""

    def load(*names, precision="auto"):
        return dataclasses.replace(
            ku.load_bundle(three[names[0]], precision),
            runs=[run for name in names for run in ku.load_bundle(three[name], precision).runs],
        )

    return load


@pytest.fixture
def counted(monkeypatch):
    """Function: name of a function of the module -> list that grows by what each call of it returned."""

    def count(name):
        calls, real = [], getattr(ku, name)
        monkeypatch.setattr(ku, name, lambda *a, **k: calls.append(real(*a, **k)) or calls[-1])
        return calls

    return count


def simple_way(run, frame):
    """Mean over folds of the predictions of fresh models, one text at a time in float32."""
    total = []
    for path in run.weights.values():
        tokenizer, model = run.open()
        model.load_state_dict(load_file(path))
        rows = [
            tokenizer(text, truncation=True, max_length=run.cfg.max_length, return_tensors="pt")
            for text in frame["excerpt"]
        ]
        with torch.no_grad():
            logits = [model.eval()(row["input_ids"], row["attention_mask"]) for row in rows]
            total.append([model.predict(row).numpy()[0] for row in logits])
    return np.mean(total, axis=0)


# ---------------------------------------------------------------------------------------
# One tokenisation, one model


def test_runs_with_one_tokenizer_and_one_length_tokenize_the_texts_once(bundle_of, counted):
    bundle, calls = bundle_of("one", "two", "three"), counted("_tokenize")
    ku.predict_bundle(bundle, FRAME)
    assert [len(tokens) for tokens in calls] == [len(FRAME)]


@pytest.mark.parametrize("change", [dict(max_length=16), dict(truncation="tail"), dict(template="the cat {excerpt}")])
def test_a_run_that_reads_the_texts_in_another_way_tokenizes_them_for_itself(change, bundle_of, counted):
    bundle = bundle_of("two", "three")
    other = bundle.runs[1]._replace(cfg=dataclasses.replace(bundle.runs[1].cfg, **change))
    expected = [dataclasses.replace(bundle, runs=[run]).predict(FRAME) for run in (bundle.runs[0], other)]
    calls = counted("_tokenize")
    got = ku.predict_bundle(dataclasses.replace(bundle, runs=[bundle.runs[0], other]), FRAME)
    assert len(calls) == 2
    np.testing.assert_allclose(got, np.mean(expected, axis=0), atol=1e-6)


def test_a_hidden_test_may_have_new_values_in_brackets_and_texts_of_any_length(tiny, competition, capsys):
    template = "[{genre}] {prompt} [TEXT] {excerpt}"
    for name in ("train.csv", "test.csv"):
        frame = pd.read_csv(competition / name, dtype={"id": str}).assign(genre="news", prompt="a cat")
        frame.to_csv(competition / name, index=False)
    run = trained(tiny(template=template, text_columns="prompt,excerpt", keep_newlines=True))
    bundle = ku.load_bundle(run)
    ku.check_golden(bundle)
    long = "the cat\n" * 500
    frame = FRAME.assign(genre=["news", "poem", long] * 4, prompt=["", long, "a"] * 4)
    capsys.readouterr()
    with pytest.warns(UserWarning, match=r"training never saw: \[poem\], \[the cat.{,90}$"):
        predictions = ku.predict_bundle(bundle, frame)
    assert np.isfinite(predictions).all() and "95% have at most" in capsys.readouterr().out


def test_another_vocabulary_is_another_tokenisation(bundle_of, counted, tmp_path):
    bundle = bundle_of("two", "three")
    path = tmp_path / "tokenizer.json"
    content = json.loads(bundle.runs[1].tokenizer["tokenizer.json"].read_text())
    words = content["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    path.write_text(json.dumps(content))
    swapped = bundle.runs[1]._replace(tokenizer=bundle.runs[1].tokenizer | {"tokenizer.json": path})
    calls = counted("_tokenize")
    ku.predict_bundle(dataclasses.replace(bundle, runs=[bundle.runs[0], swapped]), FRAME)
    assert len(calls) == 2 and (calls[0].ids != calls[1].ids).any()


def test_check_and_prediction_build_one_model_for_the_runs_of_one_architecture(bundle_of, monkeypatch):
    bundle, built, real = bundle_of("two", "three"), [], ku.TextModel.build_empty
    monkeypatch.setattr(ku.TextModel, "build_empty", lambda *parts: built.append(parts) or real(*parts))
    ku.check_golden(bundle)
    ku.predict_bundle(bundle, FRAME)
    assert len(built) == 1


def test_of_runs_of_two_architectures_in_any_order_one_model_is_in_memory(bundle_of, monkeypatch):
    bundle, built, alive, real = bundle_of("two", "one", "three"), [], [], ku.TextModel.build_empty

    def counting(*arguments):
        gc.collect()
        alive.append(sum(model() is not None for model in built))
        model = real(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ku.TextModel, "build_empty", counting)
    ku.predict_bundle(bundle, FRAME)
    assert alive == [0, 0]


def test_a_fold_is_loaded_into_the_memory_of_the_one_before(bundle_of):
    run = bundle_of("two").runs[0]
    _, model = run.open()
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    for fold, path in run.weights.items():
        run.load_fold(model, fold)
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
        expected = load_file(path)
        assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def test_predictions_are_those_of_fresh_models_that_read_one_text_at_a_time(bundle_of):
    bundle = bundle_of("two", "one", "three")
    expected = np.mean([simple_way(run, FRAME) for run in bundle.runs], axis=0)
    np.testing.assert_allclose(ku.predict_bundle(bundle, FRAME), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------
# The precision


@pytest.fixture
def half(three, tmp_path):
    """A copy of a run that says it was trained in bf16."""
    folder = shutil.copytree(three["two"], tmp_path / "half")
    record = json.loads((folder / "record.json").read_text())
    record["settings"]["precision"] = "bf16"
    (folder / "record.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def gpu(monkeypatch):
    """Function: whether it has bf16 -> a stand-in for a GPU."""

    def make(bf16):
        monkeypatch.setattr(ku, "_pick_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")

    return make


def test_auto_is_float32_on_a_cpu_and_as_trained_on_a_gpu(half, gpu):
    assert [run.cfg.precision for run in ku.load_bundle(half).runs] == ["fp32"]
    assert [run.cfg.precision for run in ku.Bundle.open(half).runs] == ["bf16"]
    gpu(bf16=True)
    assert [run.cfg.precision for run in ku.load_bundle(half).runs] == ["bf16"]


def test_a_gpu_without_bf16_refuses_it_where_it_is_forced_and_says_what_it_takes_instead(half, gpu, capsys):
    gpu(bf16=False)
    with pytest.raises(ku.ConfigError, match="precision bf16 cannot be used here: Tesla T4 has no bf16"):
        ku.load_bundle(half, "bf16")
    assert ku.load_bundle(half).runs[0].cfg.precision == "auto"
    assert "half: Tesla T4 has no bf16, so precision auto instead" in capsys.readouterr().out


def test_a_precision_that_there_is_not_is_refused(three):
    with pytest.raises(ku.ConfigError, match=r"precision.*int8"):
        ku.load_bundle(three["two"], "int8")


def test_a_forced_precision_that_predicts_otherwise_is_refused_by_the_golden_rows(bundle_of):
    bundle = bundle_of("three", precision="bf16")
    row = bundle.runs[0].golden["rows"][0]
    row["prediction"] = [row["prediction"][0] + 1]
    with pytest.raises(ku.BundleError, match=r"three, fold .* in bfloat16 the prediction is .* off that of training"):
        ku.check_golden(bundle)


def test_a_forced_precision_is_checked_and_used(bundle_of, capsys):
    exact, forced = bundle_of("three"), bundle_of("three", precision="bf16")
    ku.check_golden(forced)
    assert "8 golden rows in bfloat16" in (out := capsys.readouterr().out) and "8 golden rows in float32" in out
    got = ku.predict_bundle(forced, FRAME)
    assert "bfloat16" in capsys.readouterr().out
    assert 0 < abs(got - ku.predict_bundle(exact, FRAME)).max() < 5e-2


def test_a_process_predicts_in_the_precision_of_its_parent(bundle_of, monkeypatch, tmp_path):
    bundle = bundle_of("three", precision="bf16")

    def start(number, kind, job, folder):
        ku._write_json(tmp_path / "1.json", job | {"device": ku._device_name(), "cells": FRAME.to_dict("list")})
        raise InterruptedError  # the rest is not needed

    monkeypatch.setattr(ku, "_Worker", start)
    with pytest.raises(InterruptedError):
        ku.predict_bundle(bundle, FRAME, processes=2)
    ku._predict_job(tmp_path / "1.json")
    np.testing.assert_array_equal(np.load(tmp_path / "1.npy"), bundle.predict(FRAME))
    assert (np.load(tmp_path / "1.npy") != bundle_of("three").predict(FRAME)).any()


def join_columns(frame):
    return frame.assign(excerpt=frame["first"] + " " + frame["rest"].str.lower())


def test_a_hidden_test_goes_through_the_preprocessing_of_the_run(
    competition, backbone_folder, tmp_path, monkeypatch, capsys
):
    for name in ("train", "test"):
        table = pd.read_csv(competition / f"{name}.csv", dtype={"id": str})
        words = table.pop("excerpt").str.split(n=1)
        table.assign(first=words.str[0], rest=words.str[1].str.upper()).to_csv(competition / f"{name}.csv", index=False)
    monkeypatch.setitem(ku.PREPROCESS, "join", join_columns)
    cfg = tiny_config(competition, backbone_folder("tiny"), tmp_path / "runs", preprocess="join")
    folder = trained(cfg)
    assert folder.name.startswith("competition-bert")
    bundle = ku.load_bundle(str(folder))
    ku.check_golden(bundle)
    hidden = train_frame(7, seed=9)[["id", "excerpt"]]
    words = hidden["excerpt"].str.split(n=1)
    pd.DataFrame({"id": hidden["id"], "first": words.str[0], "rest": words.str[1].str.upper()}).to_csv(
        competition / "test.csv", index=False
    )
    (competition / "sample_submission.csv").unlink()
    test, _ = ku.read_test_set(bundle, str(competition))
    assert test["excerpt"].tolist() == hidden["excerpt"].tolist()
    assert np.allclose(ku.predict_bundle(bundle, test), ku.predict_bundle(bundle, hidden))
    monkeypatch.delitem(ku.PREPROCESS, "join")
    with pytest.raises(ku.ConfigError, match=r"preprocess must be one of .*; got 'join'"):
        ku.load_bundle(str(folder))
