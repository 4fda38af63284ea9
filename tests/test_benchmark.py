"""The benchmark of training and prediction: what it times is the same for all, and its figures can be checked."""

import json
import subprocess
import sys

import benchmark
import kernel_utils as ku
import numpy as np
import pytest
import transformers

from conftest import ROOT, make_tokenizer, save_competition

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

QUICK = ["--quick", "--loads", "mixed"]


def fill(lengths, size):
    """Real tokens by slots of batches padded to the longest row."""
    batches = lengths.reshape(-1, size)
    return batches.sum() / (size * batches.max(1).sum())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The report of a quick run over both loads, and the rows that each training data set of the Trainer was asked for,
    as well as those of the steps of the others, block after block."""
    folder, seen = tmp_path_factory.mktemp("benchmark"), {}
    patch = pytest.MonkeyPatch()
    step, item, padded = ku.OptimizerStep.__call__, benchmark.Rows.__getitem__, benchmark.Lab.padded

    def note(name, rows):
        seen.setdefault(name, []).extend(np.atleast_1d(rows).tolist())

    def optimizer_step(engine, number, rows):
        note("kit", rows)
        return step(engine, number, rows)

    def getitem(rows, index):
        note("trainers", rows.rows[index])
        return item(rows, index)

    def pad(lab, rows, length=None):
        if lab.model.training:
            note("padded", rows)
        return padded(lab, rows, length)

    patch.setattr(ku.OptimizerStep, "__call__", optimizer_step)
    patch.setattr(benchmark.Rows, "__getitem__", getitem)
    patch.setattr(benchmark.Lab, "padded", pad)
    benchmark.main(["--quick", "-o", str(folder / "results" / "quick.json")])
    patch.undo()
    report = json.loads((folder / "results" / "quick.json").read_text())
    return report, seen, folder / "results" / "quick.png"


def test_the_report_says_how_it_was_made_and_has_every_figure(done):
    report, _, picture = done
    assert report["command"].startswith("python tools/dev/benchmark.py --quick -o ")
    assert {"torch", "transformers", "accelerate", "kernel_utils"} <= set(report["versions"])
    assert report["device"]["type"] == "cpu" and report["precision"] == "float32"
    (model,) = report["models"]
    assert [load["load"] for load in model["loads"]] == ["narrow", "mixed"] and model["weights"] == "random"
    for load in model["loads"]:
        assert set(load["training"]["contenders"]) == {"kit", "padded", "dynamic", "tuned"}
        assert set(load["prediction"]["contenders"]) == {"kit", "sorted", "padded"}
        assert load["parity"]["fp32"]["tuned"] < 1e-5 and load["parity"]["after_first_steps"]["tuned"] < 1e-3
        for result in load["training"]["contenders"].values():
            assert result["memory"] is None and result["one_time_seconds"] >= 0  # memory was not asked for
        assert load["training"]["contenders"]["kit"]["setup"]["is_packed"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rates_and_ratios_follow_from_the_raw_seconds(done):
    for load in done[0]["models"][0]["loads"]:
        for part in (load["training"], load["prediction"]):
            rounds, kit = part["rounds"], part["contenders"]["kit"]["seconds"]
            for result in part["contenders"].values():
                ratios = [a / b for a, b in zip(result["seconds"], kit, strict=True)]
                rates = [n / s for n, s in zip(rounds["tokens"], result["seconds"], strict=True)]
                assert result["ratio"]["median"] == pytest.approx(np.median(ratios))
                assert (result["ratio"]["smallest"], result["ratio"]["largest"]) == (min(ratios), max(ratios))
                assert result["tokens_per_second"]["median"] == pytest.approx(np.median(rates))
                shares = [n / s for n, s in zip(rounds["flops"], result["seconds"], strict=True)]
                assert result["share_of_matmul"] == pytest.approx(np.median(shares) / part["matmul_flops"])


def test_all_contenders_train_on_the_same_rows(done):
    report, seen, _ = done
    blocks = benchmark.PARITY_STEPS + 2 * 3  # batches of a load: two rounds of one step before and two in the window
    assert len(seen["kit"]) == 2 * 4 * blocks
    assert sorted(seen["padded"]) == sorted(seen["kit"])
    assert sorted(seen["trainers"]) == sorted(2 * seen["kit"])
    first = report["models"][0]["loads"][0]["training"]["rounds"]["first"]
    assert first == ["kit", "padded"]  # another one begins each round


def test_the_table_has_a_row_for_each_contender(done):
    lines = benchmark.table(done[0]).splitlines()
    assert len([line for line in lines if line.startswith("| tiny |")]) == 2 * (4 + 3)
    assert all(line.count("|") == 11 for line in lines)


def test_texts_and_a_backbone_of_a_folder(tmp_path, monkeypatch):
    transformers.AutoModel.from_config(benchmark.size_config("tiny")).save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    data = save_competition(tmp_path / "data")
    seen, make_tokens = [], benchmark.make_tokens
    monkeypatch.setattr(benchmark, "make_tokens", lambda *args: seen.append(make_tokens(*args)) or seen[-1])
    words = [*QUICK, "--contenders", "tuned", "--rounds", "1", "--size", tmp_path / "backbone", "--data", data]
    benchmark.main([*words, "-o", tmp_path / "out.json"])
    report = json.loads((tmp_path / "out.json").read_text())
    (model,) = report["models"]
    assert model["weights"] == "its own" and f"--data path/to/{data.name} " in report["command"]
    assert list(model["loads"][0]["training"]["contenders"]) == ["kit", "tuned"]
    assert set(seen[0].ids) <= set(range(len(make_tokenizer())))


def test_the_memory_of_a_contender_is_measured_in_a_process_of_its_own(tmp_path):
    folder, _ = benchmark.find_or_make("tiny", tmp_path, "")
    _, options = benchmark.parse([*QUICK, "--memory-steps", "2"])
    large = np.ones(2**28)  # 2 GB that are this process's alone
    memory = benchmark.measure_memory(options, folder, "mixed", "tuned")
    assert 50e6 < memory["before_bytes"] < memory["peak_bytes"] < large.nbytes


@pytest.mark.parametrize("what", ["another model", "another training"])
def test_contenders_that_do_not_compute_the_same_are_not_timed(what, monkeypatch, tmp_path):
    class Wrong(benchmark.PaddedLoop):
        def outputs(self, rows, precision):
            return super().outputs(rows, precision) + (1e-3 if what == "another model" else 0)

        def run(self, warm, batches, window):
            super().run([*warm, *warm] if what == "another training" else warm, batches, window)

    monkeypatch.setitem(benchmark.CONTENDERS, "padded", Wrong)
    monkeypatch.setattr(benchmark.Race, "make_rounds", None)  # would fail
    with pytest.raises(SystemExit, match=r"(?s)do not compute the same, nothing is measured.*padded differs by"):
        benchmark.main([*QUICK, "--contenders", "padded", "-o", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_mixed_lengths_are_log_normal_around_150_from_16_to_512():
    lengths = benchmark.mixed_lengths(32_000, np.random.default_rng(0))
    assert (lengths.min(), lengths.max()) == (16, 512) and abs(np.median(lengths) - 150) < 3
    assert np.log(lengths[(lengths > 16) & (lengths < 512)]).std() == pytest.approx(0.65, abs=0.05)
    assert fill(lengths, 32) == pytest.approx(0.37, abs=0.02)  # performance.md, section 6
    assert fill(np.sort(lengths), 32) > 0.97


def test_narrow_lengths_are_those_of_clear():
    lengths = benchmark.narrow_lengths(32_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(225, abs=1) and lengths.std() == pytest.approx(24, abs=1)
    assert lengths.min() >= 150 and lengths.max() <= 320
    assert lengths.mean() / 320 == pytest.approx(0.70, abs=0.02)


@pytest.mark.parametrize("count", [7, 20, 200])
def test_a_block_is_grouped_as_in_a_long_run_and_the_others_shuffle_its_rows(count):
    size, lab, rng = 16, object.__new__(benchmark.Lab), np.random.default_rng(0)
    lab.options = benchmark.parse(["--quick", "--batch-size", str(size)])[1]
    n = size * benchmark.in_groups(count)
    lab.tokens, lab.left = ku.Tokens([np.ones(k, int) for k in benchmark.mixed_lengths(n, rng)], None, 0), np.arange(n)
    block = lab.deal(count)
    tuned, dynamic = (np.concatenate(benchmark.HfTrainer(lab, t).arrange(block, rng)) for t in (True, False))
    assert len(set(tuned)) == size * count and sorted(tuned) == sorted(dynamic) and len(lab.left) == 0
    lengths = lab.tokens.lengths
    assert fill(lengths[tuned], size) == pytest.approx(0.97, abs=0.015) and fill(lengths[dynamic], size) < 0.5
    assert lengths[tuned].mean() == pytest.approx(183, rel=0.05)  # that of all rows


def test_unknown_contenders_and_loads_are_refused():
    for words in (["--contenders", "kit,tunde"], ["--loads", "wide"]):
        with pytest.raises(SystemExit, match=r"takes .*; got (tunde|wide)"):
            benchmark.main(["--quick", *words])
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--rounds", "0"])


def test_help():
    command = [sys.executable, ROOT / "tools" / "dev" / "benchmark.py", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--contenders" in help_text and "--alone" not in help_text
