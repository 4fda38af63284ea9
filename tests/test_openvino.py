"""openvino_engine.py: prediction on a CPU with OpenVINO where it agrees with PyTorch, and only there."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import bundle
import kernel_utils as ku
import nbformat
import numpy as np
import openvino_engine
import pandas as pd
import pytest
import torch

from conftest import ARCHITECTURES, WORDS, papermill, printed, tiny_config, train_frame, trained

NAMES = ["--id", "me/my-bundle", "--title", "My bundle"]
FRAME = train_frame(20, seed=4)

needs_openvino = pytest.mark.skipif(
    not openvino_engine.importlib.util.find_spec("openvino"), reason="the package openvino is not installed"
)
needs_nncf = pytest.mark.skipif(
    not openvino_engine.importlib.util.find_spec("nncf"), reason="the package nncf is not installed"
)


@pytest.fixture(autouse=True)
def few_rows_pay(request, monkeypatch):
    if "few" not in request.node.name:
        monkeypatch.setattr(openvino_engine, "MIN_ROWS", 1)
    monkeypatch.setattr(openvino_engine, "MAX_SECONDS", float("inf"))  # tiny models are no faster


@pytest.fixture
def torch_bundle(runs):
    return ku.load_bundle(runs / "one")


@pytest.fixture
def engine(torch_bundle):
    return openvino_engine.OpenvinoBundle.of(torch_bundle)


def pack(run, target, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bundle.py", str(run), "-o", str(target), *NAMES, *options])
        bundle.main()
    return target


@pytest.fixture(scope="module")
def packed(runs, tmp_path_factory):
    """A bundle of the run `one` that is packed for OpenVINO; copy what you change."""
    target = tmp_path_factory.mktemp("dist") / "my-bundle"
    kernels = ["--kernels", str(target.with_name("kernels")), "--competition", "commonlit"]
    return pack(runs / "one", target, "--engine", "openvino", *kernels, "--model-source", "a/b/transformers/c/1")


def fold_predictions(bundle, frame=FRAME):
    ((_, predictions),) = bundle.predict_folds(frame)
    return predictions


# ---------------------------------------------------------------------------------------
# Agreement


@needs_openvino
def test_every_fold_is_predicted_as_by_pytorch_with_its_own_weights(torch_bundle, engine, capsys):
    expected, got = fold_predictions(torch_bundle), fold_predictions(engine)
    assert "one, fold 1: OpenVINO fp32 agrees: golden rows" in capsys.readouterr().out
    assert abs(expected[0] - expected[1]).max() > 1e-3, "the folds must differ for this test to mean anything"
    for fold in expected:
        np.testing.assert_allclose(got[fold], expected[fold], atol=1e-5)
        assert (got[fold] != expected[fold]).any(), "OpenVINO rounds in another order"


def slow_but(*first):
    return [kind if kind in first else pytest.param(kind, marks=pytest.mark.nightly) for kind in ARCHITECTURES]


@needs_openvino
@pytest.mark.parametrize("kind", slow_but("deberta-v2"))
def test_architectures_agree_on_texts_of_any_length_or_are_left_to_pytorch(
    kind, competition, backbone_folder, tmp_path, capsys
):
    cfg = tiny_config(
        competition, backbone_folder(kind), tmp_path, run_name="r", head="lstm", run_folds="0", max_length=150
    )
    run = trained(cfg)
    texts = [" ".join(WORDS * 8)[: 11 * n] for n in range(1, 70, 3)]  # up to 150 tokens
    frame = pd.DataFrame({"id": range(len(texts)), "excerpt": texts})
    loaded = ku.load_bundle(run)
    expected = fold_predictions(loaded, frame)
    capsys.readouterr()
    got = fold_predictions(openvino_engine.OpenvinoBundle.of(loaded), frame)
    words = "fp32 fails, not tried again: OpConversionFailure" if kind == "longformer" else "OpenVINO fp32 agrees"
    assert words in capsys.readouterr().out
    for fold in expected:
        np.testing.assert_allclose(got[fold], expected[fold], atol=1e-5)


@needs_openvino
@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings", [dict(task="multiclass", head="gru"), dict(target_columns="target,standard_error")]
)
def test_other_tasks_and_several_outputs_agree(settings, tmp_path, backbone_folder):
    folder = tmp_path / "data"
    folder.mkdir()
    frame = train_frame().assign(standard_error=lambda table: 0.5 + table["target"] / 9)
    if settings.get("task"):
        frame["target"] = np.tile(["low", "mid", "top", "mid"], 10)
    frame.to_csv(folder / "train.csv", index=False)
    cfg = tiny_config(folder, backbone_folder("tiny"), tmp_path, run_name="r", **settings)
    loaded = ku.load_bundle(ku.train(ku.make_folds(ku.read_competition(cfg)[0], cfg), cfg))
    expected, got = loaded.predict(FRAME), openvino_engine.OpenvinoBundle.of(loaded).predict(FRAME)
    assert expected.shape[1] > 1
    np.testing.assert_allclose(got, expected, atol=1e-5)


# ---------------------------------------------------------------------------------------
# Left to PyTorch, aloud


@needs_openvino
@pytest.mark.parametrize("wrong", [5.0, float("nan")])
def test_predictions_that_disagree_are_refused_with_numbers_and_pytorch_predicts(
    wrong, torch_bundle, engine, monkeypatch, capsys
):
    real = openvino_engine._CompiledBackbone.forward

    def forward(self, **inputs):
        out = real(self, **inputs)
        out.hidden_states[-1] = out.last_hidden_state = out.last_hidden_state + wrong
        return out

    expected = torch_bundle.predict(FRAME)
    monkeypatch.setattr(openvino_engine._CompiledBackbone, "forward", forward)
    np.testing.assert_array_equal(engine.predict(FRAME), expected)
    out = capsys.readouterr().out
    assert "one, fold 0: OpenVINO fp32 refused: golden rows" in out and "off, 0.04 allowed" in out
    assert "one, fold 0: predicted by PyTorch" in out and engine.precision_names() == ["float32"]


@needs_openvino
def test_an_exception_of_openvino_is_told_once_and_pytorch_predicts(torch_bundle, engine, monkeypatch, capsys):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise RuntimeError("no such operator")

    monkeypatch.setattr(openvino_engine, "convert_backbone", fail)
    np.testing.assert_array_equal(engine.predict(FRAME), torch_bundle.predict(FRAME))
    out = capsys.readouterr().out
    assert "one, fold 0: OpenVINO fp32 fails, not tried again: RuntimeError: no such operator" in out
    assert len(calls) == 1 and out.count("predicted by PyTorch") == 2


@needs_openvino
def test_an_exception_while_it_predicts_leaves_the_fold_to_pytorch(torch_bundle, engine, monkeypatch, capsys):
    real = openvino_engine._CompiledBackbone.forward

    def forward(self, **inputs):
        if len(inputs["input_ids"]) == len(FRAME):
            raise MemoryError("a batch is too large")
        return real(self, **inputs)

    monkeypatch.setattr(openvino_engine, "PROBE_ROWS", 5)
    monkeypatch.setattr(openvino_engine._CompiledBackbone, "forward", forward)
    np.testing.assert_array_equal(engine.predict(FRAME), torch_bundle.predict(FRAME))
    assert "fails, not tried again: MemoryError: a batch is too large" in capsys.readouterr().out


@needs_openvino
def test_a_precision_that_is_not_faster_is_not_used(torch_bundle, engine, monkeypatch, capsys):
    monkeypatch.setattr(openvino_engine, "MAX_SECONDS", 0)
    np.testing.assert_array_equal(engine.predict(FRAME), torch_bundle.predict(FRAME))
    assert capsys.readouterr().out.count("not faster, not used") == 1  # later folds need not try


@needs_openvino
def test_few_rows_are_predicted_by_pytorch(torch_bundle, engine, capsys):
    np.testing.assert_array_equal(ku.predict_bundle(engine, FRAME), ku.predict_bundle(torch_bundle, FRAME))
    out = capsys.readouterr().out
    assert "one: predicted by PyTorch: OpenVINO pays from 1000 texts on, here are 20" in out
    assert "OpenVINO" not in out.splitlines()[-1]


@needs_openvino
def test_a_gpu_is_left_to_pytorch(engine, monkeypatch):
    monkeypatch.setattr(ku, "_pick_device", lambda: torch.device("cuda"))
    assert "OpenVINO is for CPUs" in engine.skip_error(5000)


def test_without_the_package_the_engine_says_how_to_install_it(torch_bundle, monkeypatch):
    monkeypatch.setattr(openvino_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ku.ConfigError, match=r"pip install openvino.*tools/bundle.py --wheels"):
        openvino_engine.OpenvinoBundle.of(torch_bundle)


# ---------------------------------------------------------------------------------------
# Precisions


@needs_openvino
def test_bf16_is_tried_where_the_cpu_has_it_and_a_forced_precision_alone(engine, torch_bundle, monkeypatch):
    import openvino

    tried = {}
    for capabilities in (["FP32"], ["FP32", "BF16"]):
        monkeypatch.setattr(openvino.Core, "get_property", lambda *a, value=capabilities: value)
        for precision in ("auto", "bf16", "fp32", "fp16"):
            engine = openvino_engine.OpenvinoBundle.of(torch_bundle, precision)
            tried[len(capabilities), precision] = [*engine.precisions_for(engine.runs[0], 0)]
    assert tried[1, "auto"] == tried[1, "fp32"] == tried[2, "fp32"] == ["fp32"]
    assert tried[2, "auto"] == ["bf16", "fp32"] and tried[2, "bf16"] == ["bf16"]
    assert tried[1, "bf16"] == tried[1, "fp16"] == tried[2, "fp16"] == []


@needs_openvino
def test_bf16_that_agrees_is_used(torch_bundle, monkeypatch, capsys):
    engine = openvino_engine.OpenvinoBundle.of(torch_bundle)
    monkeypatch.setattr(engine, "precisions_for", lambda *a: ["bf16", "fp32"])
    np.testing.assert_allclose(ku.predict_bundle(engine, FRAME), torch_bundle.predict(FRAME), atol=0.05)
    out = capsys.readouterr().out
    assert "fold 0: OpenVINO bf16 agrees" in out
    assert engine.precision_names() == ["OpenVINO bf16"]


@needs_openvino
@needs_nncf
def test_a_bundle_packed_for_it_predicts_in_int8_near_pytorch(packed, capsys):
    loaded = ku.load_bundle(packed)
    expected = fold_predictions(loaded)
    engine = openvino_engine.OpenvinoBundle.of(loaded)
    ku.check_golden(engine)
    got = fold_predictions(engine)
    assert "one, fold 1: OpenVINO int8 agrees" in capsys.readouterr().out
    for fold in expected:
        gap = np.sqrt(np.square(got[fold] - expected[fold]).mean())
        assert 1e-6 < gap < 0.04 * loaded.runs[0].record["oof"]["target_sd"][0]


# ---------------------------------------------------------------------------------------
# Bundles


@needs_openvino
@needs_nncf
def test_a_bundle_carries_the_engine_and_int8_models_only_if_packed_for_it(packed, runs, tmp_path):
    plain = {path.name for path in pack(runs / "one", tmp_path / "plain").iterdir()}
    models = {f"one.fold{fold}.int8.{kind}" for fold in (0, 1) for kind in ("xml", "bin")}
    assert {path.name for path in packed.iterdir()} - plain == {"openvino_engine.py", *models}
    manifest = ku._read_bundle_manifest(packed)
    assert models < manifest["files"].keys() and manifest["runs"]["one"]["int8"].keys() == {"0", "1"}


@needs_openvino
@needs_nncf
def test_its_notebook_predicts_with_the_engine_on_a_machine_without_gpu(packed):
    folder = packed.with_name("kernels") / "infer"
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    assert metadata["enable_gpu"] is False and "machine_shape" not in metadata
    assert "\nengine: str = 'openvino'  # " in nbformat.read(folder / "infer.ipynb", 4).cells[2].source


@needs_openvino
@needs_nncf
@pytest.mark.nightly
def test_the_same_run_gives_the_same_bundle(packed, runs, tmp_path):
    again = pack(runs / "one", tmp_path / "again", "--engine", "openvino")
    assert (again / "manifest.json").read_bytes() == (packed / "manifest.json").read_bytes()


@needs_openvino
@needs_nncf
def test_without_the_training_texts_nothing_is_packed(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "one")
    path = tmp_path / "one" / "record.json"
    path.write_text(path.read_text().replace(str(runs.parent / "competition"), str(tmp_path / "gone")))
    with pytest.raises(SystemExit, match=r"(?s)one: int8 is calibrated on the training texts.*gone"):
        pack(tmp_path / "one", tmp_path / "target", "--engine", "openvino")
    assert not (tmp_path / "target").exists()


def test_a_starter_is_not_packed_for_an_engine(runs, tmp_path, capsys):
    arguments = ["bundle.py", "--starter", "-o", str(tmp_path / "kit"), *NAMES, "--engine", "openvino"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", arguments)
        bundle.main()
    assert "--engine goes with runs" in capsys.readouterr().err


@needs_openvino
@needs_nncf
def test_int8_files_that_the_manifest_does_not_list_are_refused(packed, monkeypatch):
    manifest = ku._read_bundle_manifest(packed)
    manifest["runs"]["one"]["int8"]["0"] = ["/etc/passwd", "../weights"]
    monkeypatch.setattr(ku, "_read_bundle_manifest", lambda folder: manifest)
    with pytest.raises(ku.BundleError, match=r"int8 is malformed \(KeyError: '/etc/passwd'\)"):
        openvino_engine._read_int8_files(packed)


# ---------------------------------------------------------------------------------------
# The module of a bundle


@pytest.fixture
def beside(monkeypatch):
    """Function: a folder -> `ku.load_sibling` as the kernel_utils.py of that folder would run it."""
    monkeypatch.setitem(sys.modules, "openvino_engine", openvino_engine)  # comes back afterwards

    def load(folder):
        monkeypatch.setattr(ku, "__file__", str(Path(folder) / "kernel_utils.py"))
        return ku.load_sibling("openvino_engine")

    return load


@needs_openvino
@needs_nncf
def test_the_engine_of_a_bundle_runs_as_it_was_packed(packed, beside):
    module = beside(packed)
    assert module.__file__ == str(packed / "openvino_engine.py") and module is sys.modules["openvino_engine"]
    assert issubclass(module.OpenvinoBundle, ku.Bundle)


@needs_openvino
@needs_nncf
def test_an_engine_that_is_not_the_file_that_was_packed_does_not_run(packed, beside, tmp_path):
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    with open(copy / "openvino_engine.py", "a") as file:
        file.write("\nraise SystemExit('it ran')\n")
    with pytest.raises(ku.BundleError, match=r"openvino_engine.py: expected \d+ bytes"):
        ku.load_bundle(copy)
    with pytest.raises(ku.BundleError, match=r"openvino_engine\.py is not the file that was packed"):
        beside(copy)


def test_an_engine_that_is_not_listed_does_not_run(runs, beside, tmp_path):
    plain = pack(runs / "one", tmp_path / "plain")
    with pytest.raises(ku.ConfigError, match=r"there is no .*openvino_engine.py: .*--engine, or set engine torch"):
        beside(plain)
    (plain / "openvino_engine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ku.BundleError, match="not the file that was packed"):
        beside(plain)


@needs_openvino
@needs_nncf
@pytest.mark.slow
def test_infer_predicts_with_the_engine_of_a_bundle(packed, runs, tmp_path):
    data = Path(shutil.copytree(runs.parent / "competition", tmp_path / "data"))
    test = train_frame(1000, seed=9)[["id", "excerpt"]]
    test.to_csv(data / "test.csv", index=False)
    test.assign(target=0.0)[["id", "target"]].to_csv(data / "sample_submission.csv", index=False)
    settings = [("bundle_dir", packed), ("data_dir", data), ("output_dir", tmp_path), ("engine", "openvino")]
    done, executed = papermill("infer.ipynb", tmp_path / "infer.ipynb", *settings)
    assert done.returncode == 0, done.stderr
    assert "fold 0: OpenVINO int8 agrees" in printed(executed)  # where it is slow, fold 1 has no trial
    submission = pd.read_csv(tmp_path / "submission.csv")
    expected = ku.load_bundle(packed).predict(test)[:, 0]
    sd = ku.load_bundle(packed).runs[0].record["oof"]["target_sd"][0]
    assert np.sqrt(np.square(submission["target"] - expected).mean()) < 0.04 * sd


def test_the_setting_takes_torch_and_openvino_alone():
    assert ku.InferConfig().engine == "torch"
    with pytest.raises(ku.ConfigError, match="engine"):
        dataclasses.replace(ku.InferConfig(), engine="onnx")
