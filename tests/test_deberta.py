"""DeBERTa's attention against Hugging Face's own, on the same weights."""

import copy
import io

import kernel_utils as ku
import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

V3 = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=90,
    relative_attention=True,
    share_att_key=True,
    pos_att_type="p2c|c2p",
    position_buckets=16,
    max_position_embeddings=64,
    max_relative_positions=-1,
    norm_rel_ebd="layer_norm",
    position_biased_input=False,
    type_vocab_size=0,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)
CASES = {
    "v3": {},
    "v3-256-buckets": {"position_buckets": 256, "max_position_embeddings": 512},
    "v2-separate": {"share_att_key": False, "type_vocab_size": 2, "position_biased_input": True},
    "xlarge-conv": {"share_att_key": True, "conv_kernel_size": 3, "conv_act": "gelu"},
    "c2p": {"pos_att_type": "c2p", "share_att_key": False},
    "p2c": {"pos_att_type": "p2c", "share_att_key": False},
    "shared-c2p": {"pos_att_type": "c2p"},
    "neither": {"pos_att_type": []},
    "no-relative": {"relative_attention": False, "position_biased_input": True},
    "no-buckets": {"position_buckets": -1},
    "no-buckets-short-table": {"position_buckets": -1, "max_relative_positions": 7},
    "short-span": {"position_buckets": 6, "max_relative_positions": 20},
    "odd-buckets": {"position_buckets": 5, "max_relative_positions": 12},
    "no-norm": {"norm_rel_ebd": "none"},
}
LENGTHS = [(40, 17, 1, 33), (1,), (1, 1), (8,), (23, 24)]


def models(**change):
    torch.manual_seed(0)
    theirs = DebertaV2Model(DebertaV2Config(**{**V3, **change})).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms too
            p.add_(torch.randn_like(p) * 0.1)
    ours = copy.deepcopy(theirs)
    ku._DebertaLayout.install(ours)
    return theirs, ours


def make_pack(lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return ku._Pack(starts, max(lengths), None, mask.flatten().nonzero().squeeze(1), mask)


def batch(lengths, typed):
    pack = make_pack(list(lengths))
    ids = torch.randint(1, 90, pack.attention_mask.shape) * pack.attention_mask
    padded = {"input_ids": ids, "attention_mask": pack.attention_mask}
    if typed:
        padded["token_type_ids"] = torch.randint(0, 2, ids.shape)
    packed = {k: pack.unpad(v)[None] for k, v in padded.items()}
    packed["position_ids"] = pack.unpad(torch.arange(ids.shape[1]).expand(ids.shape))[None]
    return pack, padded, packed


def states(model, inputs, pack=None):
    """Hidden states of the real tokens, (layers + 1, N, H)."""
    if hasattr(model.encoder, "layout"):
        model.encoder.layout.pack = pack if inputs["input_ids"].shape[0] == 1 and "position_ids" in inputs else None
    out = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    return torch.stack([x[real] for x in out])


def gradients(model, value):
    model.zero_grad()
    torch.manual_seed(7)
    (value[1:] * torch.randn(value[1:].shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    """In float64 up to 1e-5 (Hugging Face's scale has only the precision of float32), in float32 up to its noise."""
    assert a.keys() == b.keys()
    biggest = max(g.abs().max() for g in a.values()).item()
    wide = next(iter(a.values())).dtype == torch.float64
    noise = 1e-7 if wide else 1e-5
    for name in a:
        x, y = a[name].flatten().double(), b[name].flatten().double()
        torch.testing.assert_close(
            y, x, rtol=1e-5 if wide else 1e-3, atol=noise * biggest, msg=lambda m, n=name: f"{n}: {m}"
        )
        if x.norm() > 1e-4 * biggest:  # key biases without p2c have gradient 0 but for rounding
            assert torch.cosine_similarity(x, y, dim=0) > 0.9999, name


def parity_cases():
    """Every case with every layout and with two of the lengths; the other pairs are nightly."""
    for number, case in enumerate(CASES):
        for place, lengths in enumerate(LENGTHS):
            for layout in ("padded", "packed"):
                other = place == 1 + number % 4 and layout == ("padded", "packed")[number // 4 % 2]
                marks = [] if place == 0 or other else [pytest.mark.nightly]
                yield pytest.param(case, lengths, layout, marks=marks, id=f"{layout}-{case}-{lengths}")


@pytest.mark.parametrize(("case", "lengths", "layout"), list(parity_cases()))
def test_states_and_gradients_equal_hugging_face(case, lengths, layout):
    theirs, ours = models(**CASES[case])
    pack, padded, packed = batch(lengths, CASES[case].get("type_vocab_size"))
    want, got = states(theirs, padded), states(ours, padded if layout == "padded" else packed, pack)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same_gradients(gradients(theirs, want), gradients(ours, got))
    theirs, ours = theirs.double(), ours.double()
    want, got = states(theirs, padded), states(ours, padded if layout == "padded" else packed, pack)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    same_gradients(gradients(theirs, want), gradients(ours, got))


@pytest.mark.parametrize("buckets", [16, -1])
def test_a_text_longer_than_the_table(buckets):
    theirs, ours = models(position_buckets=buckets, max_relative_positions=24)
    pack, padded, packed = batch((300, 90), False)  # more than one block of rows, too
    want = states(theirs, padded)
    torch.testing.assert_close(states(ours, padded), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states(ours, packed, pack), want, rtol=1e-5, atol=1e-5)
    theirs, ours = theirs.double(), ours.double()
    want = gradients(theirs, states(theirs, padded))
    same_gradients(want, gradients(ours, states(ours, padded)))
    same_gradients(want, gradients(ours, states(ours, packed, pack)))


@pytest.mark.parametrize("case", ["v3", "xlarge-conv"])
def test_packed_texts_do_not_read_each_other(case):
    _, ours = models(**CASES[case])
    pack, _, packed = batch((12, 20), False)
    before = states(ours, packed, pack)
    packed["input_ids"][0, 12:] = torch.randint(1, 90, (20,))
    after = states(ours, packed, pack)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().min(0).values.max() > 0


def test_unused_slots_and_masked_rows_stay_finite():
    theirs, ours = models()
    pack, padded, packed = batch((9, 5), False)
    want = states(theirs, padded)
    n, unused = 14, 6
    wide = pack._replace(
        scatter_index=torch.cat([pack.scatter_index, torch.full((unused,), pack.attention_mask.numel())])
    )
    ids = torch.nn.functional.pad(packed["input_ids"], (0, unused))
    ours.encoder.layout.pack = wide
    out = ours(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.stack(out)[:, 0, :n], want, rtol=1e-5, atol=1e-5)
    value = torch.stack(out)
    assert value.isfinite().all()
    value[:, 0, :n].sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
    ours.encoder.layout.pack = None
    padded["attention_mask"][1] = 0  # a row without any token
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = ours(**padded).last_hidden_state
        assert out.isfinite().all()
        ours.zero_grad()
        out.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gradient_checkpointing_recomputes_with_the_pack_of_its_forward(layout):
    theirs, ours = models()
    pack, padded, packed = batch((30, 11, 4), False)
    want = gradients(theirs, states(theirs, padded))
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    value = states(ours, padded if layout == "padded" else packed, pack)
    ours.encoder.layout.pack = make_pack([2, 43])  # of the next micro-batch
    same_gradients(want, gradients(ours, value))


def test_names_tensors_and_sharing_stay(tmp_path):
    theirs, _ours = models(**CASES["v2-separate"])
    before = theirs.state_dict()
    plain = copy.deepcopy(theirs)
    tensors = {name: p for name, p in plain.named_parameters()}
    ku._DebertaLayout.install(plain)
    assert list(plain.state_dict()) == list(before)
    assert all(p is tensors[name] for name, p in plain.named_parameters())
    assert plain.config.to_dict() == theirs.config.to_dict()
    assert plain.training == theirs.training
    assert all(isinstance(layer.attention.self, ku._DisentangledAttention) for layer in plain.encoder.layer)
    plain.train()
    assert all(m.training for m in plain.modules())


def test_saved_and_loaded(tmp_path):
    theirs, ours = models()
    _pack, padded, _ = batch((9, 5), False)
    ours.save_pretrained(tmp_path)
    again = DebertaV2Model.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(states(again, padded), states(theirs, padded))
    fresh = DebertaV2Model(theirs.config).eval()
    ku._DebertaLayout.install(fresh)
    fresh.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(states(fresh, padded), states(ours, padded))


def test_a_copy_has_a_layout_of_its_own():
    _, ours = models(**CASES["xlarge-conv"])
    twin = copy.deepcopy(ours)
    pack, padded, packed = batch((9, 5), False)
    twin.encoder.layout.pack = make_pack([3])
    want = states(ours, padded)
    torch.testing.assert_close(states(twin, packed, pack), want, rtol=1e-5, atol=1e-5)
    assert ours.encoder.layout.pack is None and twin.encoder.layout is not ours.encoder.layout
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def test_no_tensor_of_all_pairs_of_tokens_when_packed():
    _, ours = models()
    pack, _, packed = batch((8,) * 100, False)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
            return out

    ours.encoder.layout.pack = pack
    with Largest() as largest:
        ours(**packed)
    assert largest.size <= max(800 * 64, 100 * 4 * 8 * 16)  # feed-forward, products with positions


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_attention_dropout_works_in_training_only(layout):
    _, ours = models(attention_probs_dropout_prob=0.2)
    pack, padded, packed = batch((20, 13), False)
    inputs = padded if layout == "padded" else packed
    torch.testing.assert_close(states(ours, inputs, pack), states(ours, inputs, pack), rtol=0, atol=0)
    ours.train()
    a, b = states(ours, inputs, pack), states(ours, inputs, pack)
    assert (a[1] - b[1]).abs().max() > 1e-3


def test_position_dropout_works_in_training_only():
    _, ours = models(hidden_dropout_prob=0.2)
    _, padded, _ = batch((20, 13), False)
    for layer in ours.encoder.layer:
        layer.attention.self.train()  # the rest stays in evaluation mode
    assert (states(ours, padded)[1] - states(ours, padded)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_autocast_is_as_close_to_float32_as_hugging_face(dtype, layout):
    theirs, ours = models(initializer_range=0.1)
    pack, padded, packed = batch((40, 17, 33), False)
    exact = states(theirs, padded)
    with torch.autocast("cpu", dtype):
        reference = states(theirs, padded)
        got = states(ours, padded if layout == "padded" else packed, pack)
    grads = gradients(ours, got.float())
    assert got.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    ours_off, theirs_off = (got.float() - exact).norm(), (reference.float() - exact).norm()
    assert ours_off < 1.2 * theirs_off, (ours_off, theirs_off)


@pytest.mark.slow
@pytest.mark.nightly
def test_packed_rows_are_compiled_as_one_graph():
    theirs, ours = models()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True)
    for lengths in ((24, 13, 7), (24, 24, 7)):
        ours.encoder.layout.pack, padded, packed = batch(lengths, False)
        want = states(theirs, padded)
        out = compiled(**packed, output_hidden_states=True).hidden_states
        got = torch.stack([x[packed["attention_mask"].bool()] for x in out])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        same_gradients(gradients(theirs, want), gradients(ours, got))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_inference_mode_leaves_nothing_behind_that_training_cannot_use(layout):
    _, ours = models()
    pack, padded, packed = batch((12, 5), False)
    inputs = padded if layout == "padded" else packed
    with torch.inference_mode():
        a = states(ours, inputs, pack)
    b = states(ours, inputs, pack)
    b.sum().backward()
    torch.testing.assert_close(a.clone(), b, rtol=1e-5, atol=1e-5)
