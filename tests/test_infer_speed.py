"""What inference does for speed: shared tokens, one model, and precisions that prove themselves on a CPU."""

import dataclasses
import gc
import json
import weakref

import kernel_utils as ku
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_config, train_frame, trained

FRAME = train_frame(12, seed=4)


@pytest.fixture(scope="module")
def three(runs, backbone_folder, tmp_path_factory):
    """Folders of three runs: `one` has another head than `two` and `three`."""
    folder = tmp_path_factory.mktemp("three")
    cfg = tiny_config(runs.parent / "competition", backbone_folder("bert"), folder, run_name="three", seed=2, epochs=2)
    return {"one": runs / "one", "two": runs / "two", "three": trained(cfg)}


@pytest.fixture
def bundle_of(three):
    """Function: names of runs and the setting `precision` -> Bundle."""

    def load(*names, precision=""):
        return ku.load_bundle(three[names[0]], precision)._replace(
            runs=[run for name in names for run in ku.load_bundle(three[name], precision).runs]
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
        tokenizer, model = ku._open_run(run)
        model.load_state_dict(load_file(path))
        rows = [
            tokenizer(text, truncation=True, max_length=run.cfg.max_length, return_tensors="pt")
            for text in frame["excerpt"]
        ]
        with torch.no_grad():
            total.append([model.eval()(row["input_ids"], row["attention_mask"]).numpy()[0] for row in rows])
    return np.mean(total, axis=0)


# ---------------------------------------------------------------------------------------
# One tokenisation, one model


def test_runs_with_one_tokenizer_and_one_length_tokenize_the_texts_once(bundle_of, counted):
    bundle, calls = bundle_of("one", "two", "three"), counted("tokenize")
    ku.predict_bundle(bundle, FRAME)
    assert [len(tokens) for tokens in calls] == [len(FRAME)]


@pytest.mark.parametrize("change", [dict(max_length=16), dict(truncation="tail"), dict(prefix="the cat ")])
def test_a_run_that_reads_the_texts_in_another_way_tokenizes_them_for_itself(change, bundle_of, counted):
    bundle = bundle_of("two", "three")
    other = bundle.runs[1]._replace(cfg=dataclasses.replace(bundle.runs[1].cfg, **change))
    expected = [ku._predict_runs(bundle._replace(runs=[run]), FRAME, 0) for run in (bundle.runs[0], other)]
    calls = counted("tokenize")
    got = ku.predict_bundle(bundle._replace(runs=[bundle.runs[0], other], opened={}), FRAME)
    assert len(calls) == 2
    np.testing.assert_allclose(got, np.mean(expected, axis=0), atol=1e-6)


def test_another_vocabulary_is_another_tokenisation(bundle_of, counted, tmp_path):
    bundle = bundle_of("two", "three")
    path = tmp_path / "tokenizer.json"
    content = json.loads(bundle.runs[1].tokenizer["tokenizer.json"].read_text())
    words = content["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    path.write_text(json.dumps(content))
    swapped = bundle.runs[1]._replace(tokenizer=bundle.runs[1].tokenizer | {"tokenizer.json": path})
    calls = counted("tokenize")
    ku.predict_bundle(bundle._replace(runs=[bundle.runs[0], swapped]), FRAME)
    assert len(calls) == 2 and (calls[0].ids != calls[1].ids).any()


def test_check_and_prediction_build_one_model_for_the_runs_of_one_architecture(bundle_of, counted):
    bundle, built = bundle_of("two", "three"), counted("TextModel")
    ku.check_golden(bundle)
    ku.predict_bundle(bundle, FRAME)
    assert len(built) == 1


def test_of_runs_of_two_architectures_in_any_order_one_model_is_in_memory(bundle_of, monkeypatch):
    bundle, built, alive, real = bundle_of("two", "one", "three"), [], [], ku.TextModel

    def counting(*arguments):
        gc.collect()
        alive.append(sum(model() is not None for model in built))
        model = real(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ku, "TextModel", counting)
    ku.predict_bundle(bundle, FRAME)
    assert alive == [0, 0]


def test_a_fold_is_loaded_into_the_memory_of_the_one_before(bundle_of):
    run = bundle_of("two").runs[0]
    _, model = ku._open_run(run)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    for fold, path in run.weights.items():
        ku._load_fold(model, run, fold)
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
        expected = load_file(path)
        assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def test_predictions_are_those_of_fresh_models_that_read_one_text_at_a_time(bundle_of):
    bundle = bundle_of("two", "one", "three")
    expected = np.mean([simple_way(run, FRAME) for run in bundle.runs], axis=0)
    np.testing.assert_allclose(ku.predict_bundle(bundle, FRAME), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------
# The precision of a CPU

MANY = train_frame(20, seed=5)
EXACT = {"seconds": {"fp32": 1.0, "bf16": 0.6, "int8": 0.4}, "off": {"fp32": 0.0, "bf16": 0.001, "int8": 0.02}}


@pytest.fixture
def cpu(monkeypatch):
    """Function: seconds and distances of a probe -> a CPU with all instructions on which a probe finds these, where a
    few rows are enough for one, and whose int8 is exact: a stand-in for machines with and without VNNI."""

    def make(seconds=EXACT["seconds"], off=EXACT["off"]):
        probed = []

        def probe(model, tokens, cfg, precision):
            probed.append(precision)
            spread = np.where(np.arange(len(tokens)) % 2, 1, -1)[:, None]  # a root mean square of 1
            return seconds[precision], off[precision] * spread

        monkeypatch.setattr(ku, "cpu_flags", lambda: {"avx512_vnni", "avx512_bf16"})
        monkeypatch.setattr(ku, "PROBE_PAYS", 40)
        monkeypatch.setattr(ku, "int8_forward", lambda linear: torch.nn.Linear.forward.__get__(linear))
        monkeypatch.setattr(ku, "probe", probe)
        return probed

    return make


def in_units_of_the_target(bundle, sd=1.0):
    runs = [r._replace(record=r.record | {"oof": r.record["oof"] | {"target_sd": sd}}) for r in bundle.runs]
    return bundle._replace(runs=runs)


CHOICES = {  # what a probe finds -> what is used
    "int8 is fastest": ({}, {}, "int8"),
    "bf16 is fastest": (dict(int8=0.7), {}, "bf16"),
    "float32 is fastest": (dict(bf16=1.2, int8=1.1), {}, "fp32"),
    "int8 is fastest and off": ({}, dict(int8=0.05), "bf16"),
    "int8 is no number": ({}, dict(int8=np.nan), "bf16"),
    "both are off": ({}, dict(bf16=0.05, int8=0.05), "fp32"),
    "int8 is a little faster than bf16": (dict(int8=0.59), {}, "bf16"),
    "bf16 is a little faster than float32": (dict(bf16=0.97, int8=2.0), {}, "fp32"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_auto_takes_what_a_probe_finds_fastest_of_what_agrees(case, bundle_of, cpu, capsys):
    seconds, off, expected = CHOICES[case]
    probed = cpu(EXACT["seconds"] | seconds, EXACT["off"] | off)
    bundle = in_units_of_the_target(bundle_of("two", precision="auto"))
    capsys.readouterr()
    assert [run.precision for run in ku.choose_precision(bundle, MANY, 0).runs] == [expected]
    out = capsys.readouterr().out
    assert probed == ["fp32", "bf16", "int8"] and len([line for line in out.splitlines() if "two" in line]) == 2
    assert "two, 20 texts by one fold: fp32 1.00 s; bf16 " in out and f"two: predicted in {expected}" in out


def test_the_distance_that_is_allowed_grows_with_the_spread_of_the_target(bundle_of, cpu):
    cpu(off=EXACT["off"] | {"bf16": 0.3, "int8": 0.3})
    for sd, expected in ((1.0, "fp32"), (10.0, "int8")):
        bundle = in_units_of_the_target(bundle_of("two", precision="auto"), sd)
        assert ku.choose_precision(bundle, MANY, 0).runs[0].precision == expected


def test_a_fold_whose_golden_rows_disagree_keeps_its_run_in_the_next_precision_and_says_so(bundle_of, cpu, capsys):
    cpu()
    bundle = in_units_of_the_target(bundle_of("two", "three", precision="auto"))
    for row in bundle.runs[0].golden["rows"]:
        row["prediction"][0] += 0.05 * (row["fold"] == 1)
    capsys.readouterr()
    chosen = ku.choose_precision(bundle, MANY, 0)
    assert {run.name: run.precision for run in chosen.runs} == {"two": "fp32", "three": "int8"}
    out = capsys.readouterr().out
    for precision in ("int8", "bf16"):
        assert f"two: not in {precision}, golden rows are off training: fold 1 0.05 (0.04 allowed)" in out
    assert "two: predicted in fp32" in out and "three: predicted in int8" in out


def test_runs_of_one_architecture_are_probed_once(bundle_of, cpu):
    probed = cpu()
    ku.choose_precision(bundle_of("two", "one", "three", precision="auto"), MANY, 0)
    assert probed == ["fp32", "bf16", "int8"] * 2


def test_a_precision_that_fails_is_left_out_aloud(bundle_of, cpu, capsys, monkeypatch):
    cpu()
    real = ku.probe

    def probe(model, tokens, cfg, precision):
        if precision == "int8":
            raise AttributeError("'_OpNamespace' 'quantized' object has no attribute 'linear_prepack'")
        return real(model, tokens, cfg, precision)

    monkeypatch.setattr(ku, "probe", probe)
    bundle = in_units_of_the_target(bundle_of("two", precision="auto"))
    assert ku.choose_precision(bundle, MANY, 0).runs[0].precision == "bf16"
    assert "int8 fails ('_OpNamespace' 'quantized' object has no attribute" in capsys.readouterr().out


@pytest.mark.parametrize("why", ["few rows", "a GPU", "as trained", "forced"])
def test_nothing_is_probed_for(why, bundle_of, cpu, monkeypatch):
    probed = cpu()
    setting = {"as trained": "", "forced": "bf16"}.get(why, "auto")
    bundle = bundle_of("two", precision=setting)
    if why == "a GPU":
        monkeypatch.setattr(ku, "_pick_device", lambda: torch.device("cuda"))
    rows = MANY[:19] if why == "few rows" else MANY  # by two folds: 38 of 40
    chosen = ku.choose_precision(bundle, rows, 0)
    assert not probed and chosen.runs == bundle.runs
    assert chosen.runs[0].precision == {"as trained": "auto", "forced": "bf16"}.get(why, "fp32")


def test_a_real_probe_times_and_compares_what_it_says(bundle_of, monkeypatch, capsys):
    monkeypatch.setattr(ku, "PROBE_PAYS", 1)
    monkeypatch.setattr(ku, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(ku, "CLEARLY", 1e9)  # whatever the seconds are
    bundle = bundle_of("three", precision="auto")
    chosen = ku.choose_precision(bundle, MANY, 0)
    out, run = capsys.readouterr().out, bundle.runs[0]
    tokenizer, model = ku._open_run(run)
    ku._load_fold(model, run, 0)
    tokens = ku._tokenize_frame(MANY, tokenizer, run.cfg)
    exact, rough = (ku.predict(model, tokens, dataclasses.replace(run.cfg, precision=p)) for p in ("fp32", "bf16"))
    gap = np.sqrt(((exact - rough) ** 2).mean()) / run.record["oof"]["target_sd"]
    assert 0 < gap < ku.AGREEMENT and f"{gap:.2g} off" in out
    assert chosen.runs[0].precision == "bf16"


def test_a_forced_precision_is_checked_and_used(bundle_of, capsys):
    exact, forced = bundle_of("three"), bundle_of("three", precision="bf16")
    ku.check_golden(forced)
    assert "8 golden rows in bfloat16" in (out := capsys.readouterr().out) and "8 golden rows in float32" in out
    cfg = dataclasses.replace(exact.runs[0].cfg, precision="bf16")
    half = exact._replace(runs=[exact.runs[0]._replace(cfg=cfg, precision="bf16")])
    got = ku.predict_bundle(forced, FRAME)
    assert "bfloat16" in capsys.readouterr().out
    np.testing.assert_array_equal(got, ku.predict_bundle(half, FRAME))
    assert 0 < abs(got - ku.predict_bundle(exact, FRAME)).max() < 5e-2


def test_a_forced_int8_that_predicts_otherwise_is_refused_by_the_golden_rows(bundle_of, cpu, monkeypatch):
    cpu()
    bundle = bundle_of("three", precision="int8")
    ku.check_golden(bundle)
    monkeypatch.setattr(ku, "int8_forward", lambda linear: lambda states: -torch.nn.Linear.forward(linear, states))
    monkeypatch.setitem(ku._GOLDEN_TOLERANCES, "int8", 1e-3)  # an untrained backbone moves little
    with pytest.raises(ku.BundleError, match=r"three, fold .* in int8 the prediction is .* off that of training"):
        ku.check_golden(bundle)


@pytest.mark.parametrize(
    ("flags", "gpu", "why"), [(set(), False, "has no AVX-512 VNNI"), ({"avx512_vnni"}, True, "int8 is for CPUs")]
)
def test_a_forced_int8_is_refused_where_it_would_overflow_or_slow_down(flags, gpu, why, three, monkeypatch):
    monkeypatch.setattr(ku, "cpu_flags", lambda: flags)
    monkeypatch.setattr(ku.torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(ku.ConfigError, match=f"precision int8 cannot be used here: .*{why}"):
        ku.load_bundle(three["two"], "int8")


def test_a_cpu_without_instructions_for_less_than_float32_says_why_it_stays_there(bundle_of, cpu, monkeypatch, capsys):
    probed = cpu()
    monkeypatch.setattr(ku, "cpu_flags", set)
    assert ku.choose_precision(bundle_of("two", precision="auto"), MANY, 0).runs[0].precision == "fp32"
    out = capsys.readouterr().out
    assert "no bf16: " in out and "no int8: " in out and "AVX-512 VNNI" in out and "two: predicted in fp32" in out
    assert probed == ["fp32"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2"}, []),
        ({"avx512_vnni"}, ["int8"]),
        ({"avx512_vnni", "avx512_bf16"}, ["bf16", "int8"]),
        ({"amx_bf16"}, ["bf16"]),
        ({"avx_vnni"}, []),
    ],
)
def test_precisions_without_their_instructions_are_not_tried(flags, expected, monkeypatch):
    monkeypatch.setattr(ku, "cpu_flags", lambda: flags)
    assert [precision for precision, why in ku.cpu_precisions().items() if not why] == expected


def test_a_process_predicts_in_the_precision_that_its_parent_chose(bundle_of, monkeypatch, tmp_path):
    bundle = ku._with_precisions(bundle_of("three"), {"three": "bf16"})

    def start(number, kind, job, folder):
        ku._write_json(tmp_path / "1.json", job | {"device": ku._device_name(), "cells": FRAME.to_dict("list")})
        raise InterruptedError  # the rest is not needed

    monkeypatch.setattr(ku, "_start_process", start)
    with pytest.raises(InterruptedError):
        ku.predict_bundle(bundle, FRAME, processes=2)
    ku._predict_job(tmp_path / "1.json")
    np.testing.assert_array_equal(np.load(tmp_path / "1.npy"), ku._predict_runs(bundle, FRAME, 0))
    assert (np.load(tmp_path / "1.npy") != ku._predict_runs(bundle_of("three"), FRAME, 0)).any()


needs_vnni = pytest.mark.skipif(bool(ku._precision_error("int8")), reason="needs a CPU with AVX-512 VNNI")


@needs_vnni
@pytest.mark.parametrize(("outputs", "bias"), [(96, True), (96, False), (48, True), (48, False)])
def test_an_int8_layer_is_the_product_of_rounded_weights_and_inputs_rounded_by_batch_or_by_token(outputs, bias):
    torch.manual_seed(0)
    layer, states = torch.nn.Linear(64, outputs, bias), torch.randn(5, 7, 64)
    layer.weight.data[3] = 0
    weight, x = layer.weight.detach().double().numpy(), states.double().numpy()
    scale = np.maximum(abs(weight).max(1, keepdims=True) / 127, 1e-12)
    rounded = np.round(weight / scale) * scale
    size = abs(x).max(-1, keepdims=True) if outputs < 64 else 1.0
    step = ((x / size).max() - (x / size).min()) / 255
    zero = np.round(-(x / size).min() / step)
    seen = (np.clip(np.round(x / size / step) + zero, 0, 255) - zero) * step * size
    expected = seen @ rounded.T + (layer.bias.detach().numpy() if bias else 0)
    with torch.inference_mode():
        got = ku.int8_forward(layer)(states).numpy()
    np.testing.assert_allclose(got, expected, atol=5e-3)  # ties may round to the other side: a step by one weight
    assert 5e-3 < abs(got - layer(states).detach().numpy()).max() < 0.05


@needs_vnni
@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "t5", "albert", "gpt2"])
def test_a_model_in_int8_predicts_nearly_the_same_and_afterwards_exactly(kind, backbone_folder, tiny):
    cfg = dataclasses.replace(tiny(), backbone=str(backbone_folder(kind)))
    tokenizer = ku._load_tokenizer(backbone_folder(kind))
    model = ku.TextModel(cfg, ku._load_backbone(backbone_folder(kind), cfg), ku.MseLoss(cfg, 1))
    tokens = ku._tokenize_frame(FRAME, tokenizer, cfg)
    before = ku.predict(model, tokens, cfg)
    with ku._in_precision(model, tokens, cfg, "int8") as used:
        rough = ku.predict(model, tokens, used)
    np.testing.assert_array_equal(ku.predict(model, tokens, cfg), before)
    gap = abs(rough - before).max()
    assert gap < 0.1 and (gap > 0 or kind == "gpt2")  # whose layers are no nn.Linear
