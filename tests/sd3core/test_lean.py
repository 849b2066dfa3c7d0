"""The lean forms give what the plain ones give, values and gradients, and keep less."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL_BACKBONES, randomise, small_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from sd3core.mmdit import layers, lean, make_model

ALL_LEAN, ALL_PLAIN = 1, 10**9  # values of MIN_TOKENS
MIN_SIZE = 136  # tokens: at width 256 enough for the lean forms and for compiling them
B, L, H, K, HEADS, D = 2, 5, 6, 7, 3, 4


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z.to(dtype).requires_grad_()


def plain_modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(layers.modulate(layers.layer_norm(x), shift, scale), weight, bias)


def plain_gelu_linear(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(u, approximate="tanh"), weight, bias)


def plain_gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * update


def lean_attention(*heads: Tensor) -> Tensor:
    """Of the heads of one stream, or of several: q, k, v, q, k, v, ... -> (B, L, n * d), the streams one after the other."""
    return torch.cat(lean.attention(*zip(heads[0::3], heads[1::3], heads[2::3], strict=True)), dim=1)


def plain_attention(*heads: Tensor) -> Tensor:
    q, k, v = (torch.cat(heads[i::3], dim=2) for i in range(3))
    return lean.plain_attention(q, k, v).transpose(1, 2).flatten(2)


def linear_of(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return draw(outputs, inputs, seed=8), draw(outputs, seed=9)


def modulated(tokens: int = L, width: int = H, outputs: int = K) -> list[Tensor]:
    return [draw(B, tokens, width), draw(B, width, seed=1), draw(B, width, seed=2), *linear_of(width, outputs)]


def heads(queries: int = L, keys: int = L, width: int = D, seed: int = 0) -> list[Tensor]:
    shapes = [(B, HEADS, n, width) for n in (queries, keys, keys)]
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


CASES = {
    "modulated_linear": (lean.modulated_linear, plain_modulated_linear, modulated()),
    "gelu_linear": (lean.gelu_linear, plain_gelu_linear, [3 * draw(B, L, K).detach(), *linear_of(K, H)]),
    "gated_add": (lean.gated_add, plain_gated_add, [draw(B, L, H), draw(B, H, seed=1), draw(B, L, H, seed=2)]),
    "attention": (lean_attention, plain_attention, heads()),
    "attention, more keys": (lean_attention, plain_attention, heads(keys=33)),
    "attention, no padding": (lean_attention, plain_attention, heads(keys=32)),
    "attention, three streams": (
        lean_attention,
        plain_attention,
        [*heads(2, 2), *heads(3, 17, seed=3), *heads(2, 6, seed=6)],
    ),
}


@pytest.fixture(params=["one piece", "small pieces"])
def pieces(request, monkeypatch):
    """The same work at once, and in pieces of which the last is smaller."""
    if request.param == "small pieces":
        monkeypatch.setattr(lean, "HEADS_BYTES", 4 * 8 * L * 32)  # 4 of B * HEADS heads, of 32 keys


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_exact(name, pieces):
    """Against the plain form's own, and against differences (fast: along a random direction)."""
    form, plain, inputs = CASES[name]
    inputs = [z.detach().requires_grad_() for z in inputs]
    values = [way(*inputs) for way in (form, plain)]
    torch.testing.assert_close(*values, atol=1e-13, rtol=1e-12)
    weights = draw(*values[0].shape, seed=10).detach()
    gradients = [torch.autograd.grad(value, inputs, weights) for value in values]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-11)
    assert torch.autograd.gradcheck(form, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_inputs_of_any_layout(name):
    form, plain, inputs = CASES[name]
    turned = [z.detach().transpose(-1, -2).contiguous().transpose(-1, -2) if z.ndim > 1 else z.detach() for z in inputs]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(form(*turned), plain(*turned), atol=1e-13, rtol=1e-12)


def test_gelu_in_bf16_is_as_near_as_the_kernel():
    u = torch.linspace(-12, 12, 50_001).to(torch.bfloat16)[None]
    exact = F.gelu(u.double(), approximate="tanh")
    own, kernel = ((z.double() - exact).abs() for z in (lean.gelu(u), F.gelu(u, approximate="tanh")))
    assert own.max() <= kernel.max() and own.mean() <= 1.001 * kernel.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_at_the_ends_of_the_numbers(dtype):
    """Zeros, the smallest numbers, inf, nan, and where u^3 overflows: what the kernel gives, nan for nan."""
    sizes = torch.tensor([0.0, 1e-38, 1e-30, 1e-3, 1.0, 20.0, 1e3, 1e6, 1e12])
    u = torch.cat([-sizes, sizes, torch.tensor([torch.nan])]).to(dtype)[None].requires_grad_()
    value = F.gelu(u, approximate="tanh")
    value.sum().backward()
    own, own_gradient = lean.gelu_and_gradient(u.detach(), torch.ones_like(u))
    near = {"atol": 1e-30, "rtol": 1e-6 if dtype == torch.float32 else 8e-3, "equal_nan": True}
    torch.testing.assert_close(own, value.detach(), **near)
    torch.testing.assert_close(lean.gelu(u.detach()), value.detach(), **near)
    torch.testing.assert_close(own_gradient, u.grad, **near)
    for size in (1e13, 1e16, 1e20, 3e38):  # where the kernel's u^3 overflows
        far = torch.tensor([[size, -size]], dtype=dtype)
        own, own_gradient = lean.gelu_and_gradient(far, torch.ones_like(far))
        assert own.tolist() == [[far[0, 0].item(), 0.0]] and own_gradient.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e3, 1e15, 1e20])
def test_attention_at_the_ends_of_the_numbers(dtype, scale):
    """From equal weights to a single one; queries and keys whose products overflow give nan in both forms."""
    q, k, v = (z.detach().to(dtype) for z in heads(keys=33))
    runs = []
    for form in (lean_attention, plain_attention):
        inputs = [(scale * q).requires_grad_(), (scale * k).requires_grad_(), v.clone().requires_grad_()]
        out = form(*inputs)
        out.backward(torch.ones_like(out))
        runs.append([out.detach(), *(z.grad for z in inputs)])
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for own, plain in zip(*runs, strict=True):
        size = plain.abs().nan_to_num().max().clamp(min=1.0)  # gradients grow with the scale
        torch.testing.assert_close(own / size, plain / size, **near, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_attention_is_nan_where_the_plain_form_is(bad):
    q, k, v = (z.detach().float() for z in heads(keys=33))
    q[0, 0, 0, 0] = k[1, 2, 3, 0] = bad
    own, plain = lean_attention(q, k, v), plain_attention(q, k, v)
    assert plain.isnan().any() and not plain.isnan().all()
    torch.testing.assert_close(own, plain, equal_nan=True)


def bf16_errors(form, exact_form, inputs: list[Tensor]) -> list[float]:
    """Of the value and each gradient in bf16, against `exact_form` in fp64 from the same rounded inputs."""

    def run(form, dtype: torch.dtype) -> list[Tensor]:
        own = [z.detach().to(torch.bfloat16).to(dtype).requires_grad_() for z in inputs]
        value = form(*own)
        value.backward(draw(*value.shape, seed=20).detach().to(torch.bfloat16).to(dtype))
        return [value.detach().double(), *(z.grad.double() for z in own)]

    pairs = zip(run(form, torch.bfloat16), run(exact_form, torch.float64), strict=True)
    return [float((got - exact).norm() / exact.norm()) for got, exact in pairs]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("modulated_linear", modulated(tokens=130, width=96, outputs=64)),
        ("gelu_linear", [draw(B, 130, 96), *linear_of(96, 64)]),
        ("attention", heads(queries=130, keys=130, width=64)),
    ],
)
def test_in_bf16_the_error_is_that_of_the_plain_form(name, inputs):
    form, plain, _ = CASES[name]
    own, others = (bf16_errors(f, plain, inputs) for f in (form, plain))
    assert all(a < 1.15 * b for a, b in zip(own, others, strict=True)), (own, others)
    assert max(own) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "autocast", "fp32"])
def test_compiled_steps_give_what_they_are_written_as(mode, monkeypatch):
    """At sizes that are compiled, in bf16 then with one token more: a block's forward and backward."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    assert lean.can_compile()
    block = layers.JointBlock(256, 4, "rms")
    lean.use_lean_steps(block)
    block = randomise(block).bfloat16() if mode == "bf16" else randomise(block)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    assert MIN_SIZE * 256 * 2 >= lean.MIN_FUSED
    for tokens in (MIN_SIZE, MIN_SIZE + 1) if mode == "bf16" else (MIN_SIZE,):
        x, c, y = (draw(*shape, dtype=dtype).detach() for shape in ((2, tokens, 256), (2, MIN_SIZE, 256), (2, 256)))
        runs = []
        for least in (lean.MIN_FUSED, 10**9):
            monkeypatch.setattr(lean, "MIN_FUSED", least)
            block.zero_grad()
            own = [z.clone().requires_grad_() for z in (x, c, y)]
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                out = torch.cat(block(*own), dim=1)
            out.backward(draw(*out.shape, seed=3).detach().to(out.dtype))
            runs.append([out.detach(), *(z.grad for z in own), *(p.grad.clone() for p in block.parameters())])
        monkeypatch.undo()
        for compiled, written in zip(*runs, strict=True):
            assert compiled.dtype == written.dtype
            error = float((compiled.double() - written.double()).norm() / written.double().norm())
            assert error < (1e-5 if mode == "fp32" else 0.01), error


def test_without_a_compiler_the_steps_run_as_they_are_written(monkeypatch, caplog):
    def no_compiler(plain):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin ...")

    monkeypatch.setattr(lean, "_compiled", no_compiler)
    lean.can_compile.cache_clear()
    u = torch.randn(1, lean.MIN_FUSED)
    torch.testing.assert_close(lean.gelu(u), F.gelu(u, approximate="tanh"))
    lean.gelu(u)
    lean.can_compile.cache_clear()
    [told] = caplog.messages
    assert told.endswith("install g++ (InvalidCxxCompiler: No working C++ compiler found)")


def test_what_all_keys_share_costs_no_precision():
    """One channel is large in every key, which makes logits of up to 60 that hardly differ; then none is, and nothing changes."""
    q, k, v = (z.detach() for z in heads(queries=130, keys=130, width=64))
    assert not lean.common_part([k]).any()
    q[..., 3], k[..., 3] = q[..., 3] + 16, k[..., 3] + 20
    own, plain = (bf16_errors(form, plain_attention, [q, k, v]) for form in (lean_attention, plain_attention))
    assert max(own) < 0.012 and min(plain) > 0.03, (own, plain)


def lean_model(config) -> layers.nn.Module:
    model = randomise(make_model(config))
    lean.use_lean_steps(model)
    return model


def run_model(model: layers.nn.Module, inputs: tuple[Tensor, ...], autocast: bool = False) -> dict[str, Tensor]:
    """The velocity and the gradients of all weights."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity = model(*inputs)
    velocity.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach(), **gradients}


@pytest.mark.parametrize("kind", SMALL_BACKBONES)
@pytest.mark.parametrize("qk_norm", [None, "rms"])
def test_every_backbone_trains_alike_with_either(kind, qk_norm, monkeypatch):
    config = SMALL_BACKBONES[kind](qk_norm=qk_norm)
    model, inputs = lean_model(config), small_inputs(config=config)
    runs = []
    for tokens in (ALL_LEAN, ALL_PLAIN):
        monkeypatch.setattr(lean, "MIN_TOKENS", tokens)
        runs.append(run_model(model, inputs))
    own, plain = runs
    assert own.keys() == plain.keys()
    for name in own:
        torch.testing.assert_close(
            own[name], plain[name], atol=2e-6, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_bf16_and_autocast_stay_as_near_to_fp32(mode, monkeypatch):
    config = SMALL_BACKBONES["mmdit-dual"]()
    exact = run_model(lean_model(config), small_inputs(config=config))
    errors = []
    for tokens in (ALL_LEAN, ALL_PLAIN):
        monkeypatch.setattr(lean, "MIN_TOKENS", tokens)
        model = lean_model(config)
        got = run_model(model.bfloat16() if mode == "bf16" else model, small_inputs(config=config), mode == "autocast")
        assert mode == "bf16" or all(
            got[name].dtype == torch.float32 for name, _ in model.named_parameters() if name in got
        )
        errors.append(
            {name: float((got[name].float() - z).norm() / z.norm()) for name, z in exact.items() if z.norm() > 0}
        )
    own, plain = errors
    assert own["velocity"] < 1.3 * plain["velocity"] < 0.05
    # Under autocast the plain form modulates in fp32, the lean one in bf16, as both do where all is bf16.
    assert sum(own.values()) < (1.1 if mode == "bf16" else 1.2) * sum(plain.values())


def kept_bytes(run) -> int:
    """What autograd keeps between forward and backward, but for weights: each storage once."""
    kept: dict[int, int] = {}

    def note(z: Tensor) -> Tensor:
        if not isinstance(z, torch.nn.Parameter):
            kept[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes()
        return z

    alive = []  # a freed storage's address would be another's
    with torch.autograd.graph.saved_tensors_hooks(lambda z: alive.append(z) or note(z), lambda z: z):
        run()
    return sum(kept.values())


def test_a_block_keeps_no_more_than_it_must(monkeypatch):
    """Per token of width H in bf16: normalised twice 2, q, k, v 3, attention's output and its projection 2, GELU's input
    4 and the MLP's output 1 make 12 H. (B, H) modulations and the norms' deviations are small beside them."""
    width, tokens = 128, 256
    block = layers.SelfBlock(width, 2, None).bfloat16()
    lean.use_lean_steps(block)
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(1, width, dtype=torch.bfloat16)
    unit = x.nbytes
    kept = []
    for least in (ALL_LEAN, ALL_PLAIN):
        monkeypatch.setattr(lean, "MIN_TOKENS", least)
        kept.append(kept_bytes(partial(block, x, y)) / unit)
    assert 11 < kept[0] < 13 and kept[1] > 20, kept


def test_blocks_can_be_recomputed_whole(monkeypatch):
    monkeypatch.setattr(lean, "MIN_TOKENS", ALL_LEAN)
    config = SMALL_BACKBONES["mmdit"]()
    model, inputs = lean_model(config), small_inputs(config=config)
    plain = run_model(model, inputs)
    for block in model.recomputable():
        block.forward = partial(recompute, block.forward, use_reentrant=False)
    for name, value in run_model(model, inputs).items():
        assert torch.equal(value, plain[name]), name


def test_a_model_is_plain_until_it_is_told_and_keeps_its_weights(monkeypatch):
    monkeypatch.setattr(lean, "MIN_TOKENS", ALL_LEAN)
    config = SMALL_BACKBONES["mmdit"]()
    model, inputs = randomise(make_model(config)), small_inputs(config=config)
    calls = []
    monkeypatch.setattr(
        lean, "gated_add", lambda x, gate, update: calls.append(1) or torch.addcmul(x, gate.unsqueeze(1), update)
    )
    before, names = model(*inputs), list(model.state_dict())
    assert not calls
    lean.use_lean_steps(model)
    lean.use_lean_steps(model)  # twice is once
    after = model(*inputs)
    assert len(calls) == 4 * config.depth - 2 and list(model.state_dict()) == names
    torch.testing.assert_close(before, after, atol=2e-6, rtol=2e-4)


def test_a_gpu_and_short_sequences_take_the_plain_forms():
    assert lean.applies_to(torch.empty(1, lean.MIN_TOKENS, 2)) and not lean.applies_to(
        torch.empty(1, lean.MIN_TOKENS - 1, 2)
    )
    assert not lean.applies_to(torch.empty(1, lean.MIN_TOKENS, 2, device="meta"))
