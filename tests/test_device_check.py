"""The check of a GPU, tried out without one: its parts run, and one that fails or hangs takes nothing from others."""

import json
import subprocess
import time
import types

import benchmark
import device_check
import kernel_utils as ku
import numpy as np
import pytest
import torch
import transformers

from conftest import Forked, save_competition


@pytest.fixture
def forked_parts(monkeypatch):
    """Processes of parts and of the command line are forks of this one."""

    def popen(command, **options):
        words = [str(word) for word in command]
        module = device_check if device_check.__file__ in words else ku
        arguments = words[words.index(module.__file__) + 1 :]
        return Forked(lambda: module.main(arguments), **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


def check(*arguments):
    """Exit code and report of a dry run."""
    code = device_check.main(["--cpu", *arguments])
    return code, json.loads(arguments[arguments.index("-o") + 1].read_text())


@pytest.mark.slow
@pytest.mark.nightly
def test_a_dry_run_makes_every_figure_and_says_them(forked_parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(device_check.PARTS, "tests", lambda args, report, save: report.update(summary="2 passed"))
    monkeypatch.setattr(device_check, "STEPS", 3)
    monkeypatch.setattr(torch._dynamo.config, "disable", True)  # compilation takes long, and is not what is tried out
    monkeypatch.setitem(benchmark.QUICK, "rounds", 1)
    data = save_competition(tmp_path / "data")
    code, report = check(data, "-o", tmp_path / "new" / "check.json")
    out = capsys.readouterr().out
    parts = report["parts"]
    assert code == 0 and report["is_dry_run"] and list(parts) == list(device_check.LIMITS)
    assert "path/to/data" in report["command"] and str(tmp_path) not in report["command"]
    losses = parts["losses"]
    assert len(losses["dropout 0"]["plain_losses"]) == 3
    assert losses["dropout 0"]["captured_to_plain"]["cosine"] == pytest.approx(1)
    assert losses["dropout 0.1"]["plain_to_plain"]["cosine"] < 0.999
    groups = {name: list(parts[name]["groups"]) for name in ("bert-base", "deberta-v3-base", "compile")}
    assert groups == {
        "bert-base": ["trainer", "graphs"],
        "deberta-v3-base": ["trainer", "own attention", "graphs"],
        "compile": ["compile"],
    }
    assert parts["compile"]["groups"]["compile"]["contenders"]["kit-compile"]["setup"]["is_compiled"]
    own = parts["deberta-v3-base"]["groups"]["own attention"]["contenders"]
    assert own["kit-eager"]["setup"]["is_packed"] and not own["kit-hf"]["setup"]["is_packed"]
    assert parts["whole"]["wall_seconds"] > 0 and parts["whole"]["record"]["oof"]
    for text in ("2 passed", "dropout 0.1, plain to plain", "Trainer, tuned", "own attention: ", "graphs: not in use"):
        assert text in out


def hang(args, report, save):
    report["figures"] = 3
    save()
    print("starting to wait", flush=True)
    time.sleep(60)


def fail(args, report, save):
    raise ValueError("no such kernel")


def work(args, report, save):
    report["summary"] = "all well"


def test_a_part_that_hangs_or_fails_is_told_and_the_others_go_on(forked_parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(device_check, "PARTS", {"hangs": hang, "fails": fail, "works": work})
    monkeypatch.setattr(device_check, "LIMITS", {"hangs": 2, "fails": 10, "works": 10})
    start = time.monotonic()
    code, report = check("-o", tmp_path / "check.json")
    assert code == 1 and time.monotonic() - start < 20
    hangs, fails, works = report["parts"].values()
    assert hangs["figures"] == 3 and works["failures"] == []
    assert hangs["failures"] == ["stopped after its 2 seconds\nstarting to wait"]
    assert fails["failures"][0] == "ValueError: no such kernel" and "Traceback" in fails["failures"][1]
    out = capsys.readouterr().out
    assert "FAILED ValueError: no such kernel" in out and "all well" in out


def trace(losses, movement):
    return {"losses": losses, "movement": torch.tensor(movement)}


@pytest.mark.parametrize(
    ("movement", "is_right"), [([3.0, 4.0], True), ([-3.0, 4.0], False), ([6.0, 8.0], False), ([np.nan, 4.0], False)]
)
def test_captured_steps_that_move_the_weights_otherwise_are_a_failure(movement, is_right):
    plain = trace([1.0, 0.5], [3.0, 4.0])
    found = {
        "setup": {"is_captured": True},
        "captured_to_plain": device_check.compare_traces(trace([1.0, 0.75], movement), plain),
        "plain_to_plain": device_check.compare_traces(trace([1.0, 0.5], [3.01, 4.0]), plain),
    }
    assert found["captured_to_plain"]["largest_difference"] == 0.25
    cuda = torch.device("cuda")
    assert (device_check.loss_errors(found, 0.1, cuda) == []) is is_right
    found["setup"] = {"is_captured": False, "fallbacks": {"cuda_graphs": "it waits"}}
    assert "not captured" in device_check.loss_errors(found, 0.1, cuda)[0]


def side(ratio, peak, **setup):
    return {"ratio": {"median": ratio}, "memory": {"peak_bytes": peak}, "setup": setup}


@pytest.mark.parametrize(
    ("speed", "memory", "is_worth"), [(1.2, 1.0, True), (1.1, 0.9, False), (1.1, 0.7, True), (0.9, 1.3, False)]
)
def test_what_is_neither_faster_nor_smaller_is_not_worth_its_code(speed, memory, is_worth):
    race = {"contenders": {"a": side(1.0, 10 * memory, is_captured=True), "b": side(speed, 10, is_captured=False)}}
    text = device_check.describe_gain("graphs", race)
    assert text.startswith(f"{speed:.2f} times the speed, {memory:.2f} of the memory")
    assert ("not worth" in text) is not is_worth


def test_figures_of_what_was_not_in_use_or_did_not_fit_are_a_failure():
    def errors(group, **setup):
        setups = [side(1, 1, **{"micro_batch_size": 32, "is_captured": True} | setup), {"ratio": 1}]
        return list(device_check.setup_errors(group, {"contenders": dict(zip("ab", setups, strict=True))}, 32))

    assert errors("graphs") == [] == errors("trainer", is_captured=False)
    assert "graphs: not in use" in errors("graphs", is_captured=False)[0]
    assert "memory was too small for 32 rows" in errors("trainer", micro_batch_size=16)[0]


@pytest.mark.parametrize(("code", "last"), [(0, "== 3 passed in 2s =="), (1, "== 1 failed, 2 passed in 2s ==")])
def test_the_gpu_tests_that_fail_are_named(code, last, monkeypatch, tmp_path):
    python = tmp_path / "python"
    lines = ["tests/test_a.py::test_b", "FAILED tests/test_a.py::test_b - it waits" if code else "", last]
    python.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(device_check.sys, "executable", str(python))
    report = {"failures": []}
    device_check.check_tests(None, report, None)
    assert report["summary"] == last.strip("= ")
    assert report["failures"] == ["FAILED tests/test_a.py::test_b - it waits"] * code


@pytest.mark.parametrize(("gigabytes", "batch_size", "start"), [(80, 32, 40), (15, 8, 5)])
def test_a_small_gpu_gets_fewer_rows_and_steps(gigabytes, batch_size, start, monkeypatch):
    properties = types.SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    args = device_check.parse(["path/to/clear"])
    options = device_check.make_options(args, "deberta-v3-base")
    assert (options.batch_size, options.start, options.data) == (batch_size, start, "path/to/clear")
    assert device_check.make_options(args, "bert-base", makes_shapes=True).start == 40


def test_the_memory_of_a_contender_is_told_from_that_of_the_others(monkeypatch):
    memory, now, peak = benchmark.GpuMemory(), [100], [0]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    for before, most, after in ((100, 130, 110), (260, 300, 265)):  # others came to have 150 more in between
        now[0] = before
        with memory:
            now[0], peak[0] = after, most
    assert (memory.now, memory.peak) == (15, 50)


def test_without_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        device_check.main([])


def test_the_parts_end_in_less_than_eight_minutes():
    assert list(device_check.LIMITS) == list(device_check.PARTS) and sum(device_check.LIMITS.values()) <= 450


@pytest.mark.parametrize(
    ("size", "mflops"), [("minilm", (70, 78)), ("bert-base", (534, 566)), ("deberta-v3-base", (591, 623))]
)
def test_flops_a_token_are_those_of_the_layers_and_the_attention(size, mflops):
    with torch.device("meta"):
        backbone = transformers.AutoModel.from_config(benchmark.size_config(size))
    for length, expected in zip((225, 512), mflops, strict=True):  # worked out by hand, to a million
        assert benchmark.training_flops(backbone, [length]) / length / 1e6 == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "kernel, options", [("flash", {}), ("flash", {"window_size": 3, "scale": 0.2}), ("mem_efficient", {})]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_calls_of_a_gpus_kernels_fit_their_signatures(kernel, options, is_causal):
    """Forward and backward on meta tensors, as torch.compile traces them."""
    query, key, value = (torch.empty(1, 4, 64, 32, device="meta", requires_grad=True) for _ in range(3))
    pack = ku._Pack(torch.empty(5, dtype=torch.int32, device="meta"), 16, None, None, None)
    call = {"dropout": 0.0, "scale": None, "window_size": -1, "is_causal": is_causal} | options
    attend = getattr(ku, f"_varlen_{kernel}")
    output = attend(query.half(), key.half(), value.half(), pack, **call)
    assert output.shape == (1, 64, 4, 32)
    slopes = torch.autograd.grad(output.sum(), (query, key, value))
    assert [slope.shape for slope in slopes] == 3 * [(1, 4, 64, 32)]


@pytest.mark.parametrize("scaling, expected", [(32**-0.5, None), (None, None), (0.2, 0.2)])
def test_a_kernel_is_told_a_scale_that_is_not_the_usual_one_only(scaling, expected, monkeypatch):
    scales = []

    def attend(query, key, value, pack, dropout, scale, window_size, is_causal):
        scales.append(scale)
        return query.transpose(1, 2)

    monkeypatch.setattr(ku, "_pick_attention_kernel", lambda *_: attend)
    rows = 3 * [torch.zeros(1, 4, 8, 32)]
    ku._packed_attention(torch.nn.Identity(), *rows, None, scaling=scaling, pack="a pack")
    assert scales == [expected]


def test_where_there_is_no_minilm_its_size_and_a_tokenizer_of_the_texts_are_made(monkeypatch, tmp_path):
    def find(name):
        raise ku.ConfigError(f"backbone {name!r} was not found")

    data = save_competition(tmp_path / "data")
    monkeypatch.setattr(ku, "_find_backbone", find)
    monkeypatch.setitem(benchmark.SIZES, "minilm", benchmark.SIZES["tiny"])
    folder, weights = benchmark.find_or_make("minilm", tmp_path, str(data))
    tokenizer = ku._load_tokenizer(folder)
    assert weights == "random" and tokenizer.tokenize("the cat sat quickly") == ["the", "cat", "sat", "quickly"]
    assert tokenizer("cat")["input_ids"][0] == tokenizer.cls_token_id
