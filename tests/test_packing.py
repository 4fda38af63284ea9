"""Packed rows against padded ones, and the training step in the shape that CUDA graphs and torch.compile want."""

import contextlib
import inspect
import types

import kernel_utils as ku
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from conftest import ARCHITECTURES, engine_of, weights

CPU = torch.device("cpu")
# those that take packed rows; ModernBERT not yet on transformers 5.0
PACKED = ["bert", "roberta", "deberta-v2", "distilbert", "albert", "electra", "modernbert", "gpt2", "llama"]
if not getattr(ku.transformers.ModernBertModel, "_supports_attention_backend", False):
    PACKED.remove("modernbert")


def packed(*kinds):
    return [kind for kind in kinds if kind in PACKED]


def gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    (output[:6] * torch.arange(1, 7)[:, None]).sum().backward()
    named = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), named


# ---------------------------------------------------------------------------------------
# Layout


def test_texts_are_packed_end_to_end_and_padded_for_the_heads_again(build):
    _, tokens = build("bert")
    rows = np.array([4, 0, 2])
    inputs = tokens.pack_rows(rows, CPU)
    spans = [tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows]
    assert inputs["input_ids"].tolist() == [np.concatenate(spans).tolist()]
    pack = inputs["pack"]
    assert pack.cu_seqlens.tolist() == [0, *np.cumsum([len(span) for span in spans])]
    assert pack.position_ids.tolist() == [[i for span in spans for i in range(len(span))]]
    assert pack.attention_mask.tolist() == tokens.batch(rows, CPU)["attention_mask"].tolist()
    padded = pack.pad(inputs["input_ids"][0])
    assert torch.equal(padded, tokens.batch(rows, CPU)["input_ids"] * pack.attention_mask)
    assert torch.equal(pack.unpad(padded), inputs["input_ids"][0])


@pytest.mark.parametrize(("slots", "filler"), [(200, 2), (97, 1), (96, 0)])
def test_slots_that_are_left_over_are_segments_of_their_own_that_go_nowhere(slots, filler, build):
    _, tokens = build("bert")
    rows = np.array([4, 0, 2])
    used = int(tokens.lengths[rows].sum())
    assert used < 96
    pack = tokens.pack(torch.tensor([*rows, *[-1] * filler]), slots, 40, spare=True)["pack"]
    segments = pack.cu_seqlens.diff()
    assert pack.cu_seqlens[0] == 0 and pack.cu_seqlens[-1] == slots and segments.min() >= 0 and segments.max() <= 40
    assert segments[: 3 + filler].tolist() == [*tokens.lengths[rows], *[0] * filler]
    x = torch.arange(1.0, slots + 1)
    assert pack.pad(x).sum() == x[:used].sum() and pack.attention_mask.sum() == used + filler
    assert torch.equal(pack.unpad(pack.pad(x)), x * (x <= used))


def test_a_gradient_passes_through_padding_and_back(build):
    _, tokens = build("bert")
    pack = tokens.pack(torch.tensor([1, 3, -1]), 120, 40, spare=True)["pack"]
    x = torch.randn(120, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack.unpad(pack.pad(x) ** 2), x)


def test_budgets_hold_every_batch_and_are_few():
    totals = np.random.default_rng(0).integers(1000, 3000, 500)
    budgets = ku._capture_sizes(totals)
    assert len(budgets) <= 4 and budgets == sorted(budgets) and all(budget % 64 == 0 for budget in budgets)
    chosen = np.array([next(budget for budget in budgets if budget >= total) for total in totals])
    assert totals.sum() / chosen.sum() > 0.85
    assert ku._capture_sizes([64, 64]) == [64]


# ---------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize(
    ("kind", "head"),
    [*((kind, "mean") for kind in ARCHITECTURES), *(("bert", head) for head in ("weighted", "conv1d", "lstm"))],
)
def test_packed_rows_give_the_outputs_and_gradients_of_padded_ones(kind, head, build):
    model, tokens = build(kind, head=head)
    if not model.can_pack(tokens, torch.float32):
        assert kind not in PACKED
        pytest.skip(f"{kind} gets padded rows: {model.packing_errors}")
    padded, slopes = gradients(model, tokens.batch(np.arange(6), CPU))
    static = tokens.pack(torch.tensor([*range(6), -1, -1]), 256, 40, spare=True)
    for inputs in (tokens.pack_rows(np.arange(6), CPU), static):
        packed, got = gradients(model, inputs)
        torch.testing.assert_close(packed[:6], padded, atol=1e-5, rtol=0)
        assert packed.isfinite().all() and got.keys() == slopes.keys()
        for name, slope in slopes.items():
            assert (got[name] - slope).norm() <= 1e-4 * slope.norm() + 1e-6, name
        both = [torch.cat(list(part.values())) for part in (slopes, got)]
        assert F.cosine_similarity(*both, dim=0) > 0.9999


@pytest.mark.parametrize("kind", PACKED)
def test_a_text_does_not_move_with_its_neighbours(kind, build):
    model, tokens = build(kind)
    with torch.no_grad():
        alone = model(**tokens.pack_rows(np.array([3]), CPU))
        for neighbours in ([3, 1, 2], [3, 5], [3, 0, 4, 1]):
            together = model(**tokens.pack_rows(np.array(neighbours), CPU))
            torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=0)


def leaky(query, key, value, pack, dropout, scale, window_size, is_causal):
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def everywhere(query, key, value, pack, dropout, scale, window_size, is_causal):
    return ku._sdpa_per_sequence(query, key, value, pack, dropout, scale, -1, is_causal)


@pytest.mark.parametrize(
    ("kind", "fault", "told"),
    [
        (
            "bert",
            lambda model, patch: patch.setattr(ku, "_pick_attention_kernel", lambda *_: leaky),
            "states of packed and padded",
        ),
        (
            "modernbert",
            lambda model, patch: patch.setattr(ku, "_pick_attention_kernel", lambda *_: everywhere),
            "states of packed and padded",
        ),
        ("roberta", lambda model, patch: setattr(model, "first_position", 0), "states of packed and padded"),
        (
            "bert",
            lambda model, patch: patch.setattr(ku, "_pick_attention_kernel", lambda *_: absent_kernel),
            "TypeError: no op",
        ),
    ],
    ids=["texts see each other", "local attention lost", "positions from 0", "no kernel"],
)
def test_a_fault_of_packed_rows_is_found_at_the_start_and_rows_are_padded(
    kind, fault, told, build, monkeypatch, capsys
):
    if kind not in PACKED:
        pytest.skip(f"{kind} gets padded rows")
    model, tokens = build(kind)
    with torch.no_grad():
        for layer in ku.transformer_layers(model.backbone):
            for parameter in layer.parameters():  # as in a trained model, not the small ones of the beginning
                if parameter.ndim > 1:
                    parameter.mul_(10)
    padded = model(**tokens.batch(np.arange(6), CPU))
    fault(model, monkeypatch)
    assert not model.can_pack(tokens, torch.float32)
    assert f"Model in float32: padded rows, {told}" in capsys.readouterr().out
    predictions = ku.predict(model, tokens, ku.Config())
    torch.testing.assert_close(torch.from_numpy(predictions).float(), padded.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window_size", [-1, 0, 2, 6, 7, 100])
def test_each_text_attends_to_itself_within_the_window(window_size, is_causal):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 20, 4)
    pack = ku._Pack(torch.tensor([0, 8, 9, 9, 20], dtype=torch.int32), 11, None, None, None)
    text, position = torch.tensor([0] * 8 + [1] + [3] * 11), torch.arange(20)
    behind = position[:, None] - position
    mask = text[:, None] == text
    if window_size >= 0:
        mask &= behind.abs() <= window_size
    if is_causal:
        mask &= behind >= 0
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    got = ku._sdpa_per_sequence(query, key, value, pack, 0.0, 0.3, window_size, is_causal)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return -slope


def test_a_kernel_that_is_wrong_backwards_only_is_found_before_training(build, monkeypatch, capsys):
    model, tokens = build("bert")
    wrong = lambda *arguments: Backwards.apply(ku._sdpa_per_sequence(*arguments))  # noqa: E731
    assert model.packing_error(tokens, torch.float32, gradients=True) is None
    monkeypatch.setattr(ku, "_pick_attention_kernel", lambda *_: wrong)
    assert model.packing_error(tokens, torch.float32) is None
    assert "gradients have a cosine of" in model.packing_error(tokens, torch.float32, gradients=True)


def test_a_kernel_that_cannot_train_with_dropout_is_found_before_training(build, monkeypatch):
    def kernel(device, dtype, dropout):
        return absent_kernel if dropout else ku._sdpa_per_sequence

    model, tokens = build("bert", backbone_dropout=0.1)
    monkeypatch.setattr(ku, "_pick_attention_kernel", kernel)
    before = torch.get_rng_state()
    assert model.packing_error(tokens, torch.float32) is None
    assert "TypeError: no op" in model.packing_error(tokens, torch.float32, gradients=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_head_alone_can_be_trained_on_packed_rows(build):
    model, tokens = build("bert", freeze_layers=4, freeze_embeddings=True)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.can_pack(tokens, torch.float32, gradients=True)


def test_memory_that_runs_out_in_the_test_of_gradients_is_no_fault_of_packed_rows(build, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, tokens = build("bert")
    monkeypatch.setattr(torch.autograd, "grad", full)
    assert model.packing_error(tokens, torch.float32, gradients=True) is None


def absent_kernel(*_):
    raise TypeError("no op of this name")


def test_a_text_that_moves_with_its_neighbour_is_found_even_where_its_states_were_right(build, monkeypatch):
    model, tokens = build("bert")
    states, last = torch.randn(2, tokens.lengths.max(), 4), []

    def encode(input_ids, pack=None, **_):
        last.extend([input_ids[0, -1]] if pack else [])
        return (states + (last[-1] - last[0] if pack else 0),), pack and pack.attention_mask

    monkeypatch.setattr(model, "encode", encode)
    assert "a text moves with its neighbour by" in model.packing_error(tokens, torch.float32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_is_set_gets_padded_rows_and_predicts_the_same(attention, build, capsys):
    model, tokens = build("bert")
    expected = ku.predict(model, tokens, ku.Config())
    assert "BertModel in float32: packed rows" in capsys.readouterr().out
    model, tokens = build("bert", attention=attention)
    assert model.backbone.config._attn_implementation == attention
    np.testing.assert_allclose(ku.predict(model, tokens, ku.Config()), expected, atol=1e-6)
    assert "packed" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", packed("bert", "modernbert"))
def test_checkpointed_gradients_of_packed_rows_are_the_same(kind, build):
    model, tokens = build(kind)
    again, _ = build(kind, gradient_checkpointing=True)
    _, expected = gradients(model.train(), tokens.pack_rows(np.arange(6), CPU))
    _, got = gradients(again.train(), tokens.pack_rows(np.arange(6), CPU))
    for name, slope in expected.items():
        torch.testing.assert_close(got[name], slope, atol=1e-6, rtol=1e-5)


def test_dropout_of_the_attention_is_kept(build):
    model, tokens = build("bert", backbone_dropout=0.0)
    inputs = tokens.pack_rows(np.arange(6), CPU)
    for layer in ku.transformer_layers(model.backbone):
        layer.attention.self.dropout.p = 0.5
    assert torch.equal(model(**inputs), model(**inputs))
    assert not torch.equal(model.train()(**inputs), model(**inputs))


def test_saved_folds_do_not_name_our_attention(tiny, build):
    model, _ = build("bert")
    assert ku._PACKED_ATTENTION not in model.backbone.config.to_json_string()


# ---------------------------------------------------------------------------------------
# The step


def static(monkeypatch):
    """Static shapes and a resident model, as graphs and compiled code have them."""
    monkeypatch.setattr(ku.OptimizerStep, "has_static_shapes", property(lambda engine: engine.is_packed))


def test_static_shapes_and_a_resident_model_train_as_if_they_were_not(tiny, monkeypatch):
    settings = dict(epochs=2, batch_size=5, micro_batch_size=3, n_folds=3)
    results = []
    for patch in (None, static):
        if patch:
            patch(monkeypatch)
        cfg = tiny(run_name=f"run{len(results)}", **settings)
        train, _, _ = ku.read_competition(cfg)
        folder = ku.train(ku.make_folds(train, cfg), cfg)
        results.append(ku.pd.read_csv(folder / "oof.csv").set_index("id"))
    np.testing.assert_allclose(results[1]["prediction"], results[0]["prediction"], atol=1e-5)
    assert results[0]["prediction"].std() > 0


def test_a_resident_model_begins_a_fold_with_fresh_weights_and_moments(tiny, monkeypatch):
    static(monkeypatch)
    engine, fresh = (engine_of(tiny(epochs=3)) for _ in range(2))
    engine.setup_fold(0, lambda text: None)
    model, place = engine.model, next(engine.model.parameters()).data_ptr()
    for step in range(3):
        engine(step, np.arange(1, 9, 2))
    engine.setup_fold(1, lambda text: None)
    fresh.setup_fold(1, lambda text: None)
    assert engine.model is model and next(model.parameters()).data_ptr() == place and fresh.model is not model
    assert torch.equal(weights(engine), weights(fresh))
    for other in (engine, fresh):
        for step in range(3):
            other(step, np.arange(0, 8, 2))
    assert torch.equal(weights(engine), weights(fresh))


@pytest.mark.parametrize("loss", ["mse", "mse_rank"])
def test_a_loss_of_fillers_counts_nothing_even_where_it_is_not_finite(loss, tiny, monkeypatch):
    static(monkeypatch)
    plain, filled = engine_of(tiny(loss=loss)), engine_of(tiny(loss=loss, micro_batch_size=8))
    for engine in (plain, filled):
        engine.setup_fold(0, lambda text: None)
    plain.micro_batch_size = 3
    plain.bind_buffers()
    logs = [engine(0, np.array([1, 3, 5])).values[0] for engine in (plain, filled)]
    torch.testing.assert_close(logs[0], logs[1])
    torch.testing.assert_close(weights(plain), weights(filled), atol=1e-6, rtol=0)


class Recorder(TorchDispatchMode):
    """What a piece of code asks of a device: operators, shapes, and the numbers that a graph would freeze."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        told = tree_map(lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if "profiler" not in str(func):  # marks in a trace
            self.calls.append((str(func), repr(told)))
        return func(*args, **kwargs)


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default", "_to_cpu")


def attend_dense(query, key, value, pack, dropout, scale, window_size, is_causal):
    """Attention in static shapes, standing in for the kernels of a GPU."""
    segment = torch.searchsorted(
        pack.cu_seqlens[1:].contiguous(), torch.arange(query.shape[2]), right=True, out_int32=True
    )
    mask = segment[:, None] == segment
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale).transpose(1, 2)


STEPS = [
    dict(head="mean"),
    dict(head="conv1d", llrd=0.9, head_dropout=0.1, dropout_samples=2),
    dict(head="concat", concat_layers=2, loss="rmse", max_grad_norm=0.0, backbone_dropout=0.1),
    dict(head="attention", loss="smooth_l1", freeze_embeddings=True, precision="bf16"),
    dict(head="max", awp=0.1, adversarial_start=0, ema=0.9, mixout=0.1, rdrop=0.5, head_dropout=0.1),
    dict(head="gem", fgm=0.1, adversarial_start=0, swa_start=1.0, loss="rmse"),
    dict(head="cls", loss="mse_rank", error_column="standard_error", error_weights=True, label_noise=1.0),
    dict(head="meanmax", loss="gaussian", error_column="standard_error"),
]


def step_cases():
    """All settings with BERT, two of them with the others; a head sees no difference, so the rest is nightly."""
    for kind in ("tiny", *packed("roberta", "modernbert", "deberta-v2")):
        for settings in STEPS:
            quick = kind == "tiny" or settings["head"] in ("mean", "max")
            marks = [] if quick else [pytest.mark.nightly]
            yield pytest.param(kind, settings, marks=marks, id=f"{kind}-{settings['head']}")


@pytest.mark.parametrize(("kind", "settings"), list(step_cases()))
def test_a_step_never_waits_and_has_no_number_that_a_graph_would_freeze(
    kind, settings, tiny, backbone_folder, monkeypatch
):
    """Two steps with other rows, other lengths, other learning rates ask for the same operators with the same numbers,
    and none of them brings a value from the device to Python."""
    monkeypatch.setattr(ku, "_pick_attention_kernel", lambda *_: attend_dense)
    if kind == "modernbert":  # its window is wider than these texts
        settings = settings | dict(max_length=8)
    cfg = ku.dataclasses.replace(tiny(micro_batch_size=3, epochs=3, **settings), backbone=str(backbone_folder(kind)))
    engine = engine_of(cfg)
    engine.setup_fold(0, lambda text: None)
    assert engine.is_packed, engine.model.packing_errors
    recorded, places = [], []

    def record(function, *arguments):
        with Recorder() as recorder:
            output = function(*arguments)
        numbers = [value for value in arguments if not isinstance(value, torch.Tensor)]
        recorded[-1].append(((function.__name__, *numbers), recorder.calls))
        return output

    engine.run, engine.is_captured = record, True
    engine.graphs = types.SimpleNamespace(on_stream=contextlib.nullcontext)
    engine.is_adversarial = engine.adversary is not None
    engine.capture_sizes = [128]
    engine.model.train()
    for step, rows in enumerate([[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23]]):
        recorded.append([])
        engine(step, np.array(rows))
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        places.append([gradient.data_ptr() for gradient in gradients])
        assert len(gradients) > 10 and not any(gradient.any() for gradient in gradients)
    assert places[0] == places[1] == places[2]
    first, second = recorded[1:]  # the first step makes the state of the optimiser
    once = [("forward_backward_packed", 128, min(engine.max_seqlen, 128))] * 2
    second_pass = [("remember",), ("perturb",), *once, ("restore",)] if engine.is_adversarial else []
    assert [key for key, _ in first] == once + second_pass + [("update",)]
    for (key, calls), (_, others) in zip(first, second, strict=True):
        assert len(calls) > (0 if key in (("remember",), ("restore",)) else 10) and calls == others
        assert not [call for call, _ in calls if any(word in call for word in WAITING)]


def test_the_recorder_finds_what_waits_and_what_would_be_frozen():
    def scale(x, rate):
        return x * rate.item()

    calls = []
    for rate in (0.1, 0.2):
        with Recorder() as recorder:
            scale(torch.ones(3), torch.tensor(rate))
        calls.append(recorder.calls)
    assert calls[0] != calls[1] and any(word in name for name, _ in calls[0] for word in WAITING)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_compiled_step_trains_as_the_one_that_is_not_and_is_made_once_for_all_folds(tiny):
    results, counters = [], []
    for compiled in (False, True):
        cfg = tiny(run_name=f"compiled{compiled}", compile=compiled, n_folds=3)
        train, _, _ = ku.read_competition(cfg)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        folder = ku.train(ku.make_folds(train, cfg), cfg)
        counters.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        results.append(ku.pd.read_csv(folder / "oof.csv").set_index("id")["prediction"])
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    layers, budgets = 4, 4
    assert counters[0] == 0 < counters[1] <= (layers + 2) * budgets  # not times three folds


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dtype", "window_size"),
    [
        ("flash", "bfloat16", -1),
        ("flash", "bfloat16", 3),
        ("mem_efficient", "float32", -1),
        ("mem_efficient", "float16", -1),
    ],
)
def test_kernels_of_a_gpu_attend_as_the_cpu_does_text_by_text(kernel, dtype, window_size, is_causal):
    dtype = getattr(torch, dtype)
    if kernel == "flash" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no flash attention on this GPU")
    if kernel == "flash" and "scale" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("torch 2.10 has neither scale nor window")
    torch.manual_seed(0)
    rows = [torch.randn(1, 4, 40, 32, requires_grad=True) for _ in range(3)]
    starts = torch.tensor([0, 7, 8, 8, 24, 40], dtype=torch.int32)
    pack = ku._Pack(starts, 16, None, None, None)
    expected = ku._sdpa_per_sequence(*rows, pack, 0.0, 0.2, window_size, is_causal)
    slopes = torch.autograd.grad(expected.square().sum(), rows)
    there = [row.detach().cuda().to(dtype).requires_grad_() for row in rows]
    attend = getattr(ku, f"_varlen_{kernel}")
    got = attend(*there, pack._replace(cu_seqlens=starts.cuda()), 0.0, 0.2, window_size, is_causal)
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.float().cpu(), expected.detach(), atol=atol, rtol=atol)
    for slope, other in zip(slopes, torch.autograd.grad(got.float().square().sum(), there), strict=True):
        torch.testing.assert_close(other.float().cpu(), slope, atol=4 * atol, rtol=4 * atol)


@gpu
@pytest.mark.parametrize("kind", packed("bert", "roberta", "deberta-v2", "modernbert"))
def test_packed_rows_on_a_gpu_give_the_outputs_of_padded_ones(kind, build):
    dtype, atol = torch.float32, 1e-4
    if kind == "modernbert":  # only flash attention has its window
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("no flash attention on this GPU")
        dtype, atol = torch.bfloat16, 0.1
    model, tokens = build(kind)
    model, device = model.cuda(), torch.device("cuda")
    assert model.can_pack(tokens, dtype), model.packing_errors
    with torch.no_grad(), ku._autocast(device, dtype):
        padded = model(**tokens.batch(np.arange(6), device))
        torch.testing.assert_close(model(**tokens.pack_rows(np.arange(6), device)), padded, atol=atol, rtol=0)
