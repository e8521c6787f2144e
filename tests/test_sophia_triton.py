"""SophiaG against a NumPy version written from the paper, on every backend.

Triton's interpreter must be chosen before triton is imported, so this process runs the "eager" and
"cpp" cases and starts a second pytest on this file, with TRITON_INTERPRET=1, for "triton".
"""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sophia_triton
from ops.parameter_table import BLOCK_SIZE
from ops.sophia_reference import cpp_library
from sophia_triton import SophiaG

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = cpp_library() is not None
BACKENDS = ["triton"] if INTERPRET else ["eager", "cpp"] if COMPILED else ["eager"]
REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "sophiag_trajectory.npz"
# The last has many blocks and a remainder; the interpreter is slow and gets two of them.
SHAPES = [(37, 19), (129,), (1,), (64, 64), (70, 71) if INTERPRET else (300, 301)]
SETTINGS = dict(lr=3e-3, rho=0.05, betas=(0.965, 0.99), bs=4096)
NAN = float("nan")

here_only = pytest.mark.skipif(INTERPRET, reason="runs in the parent process")
needs_compiler = pytest.mark.skipif(not COMPILED, reason="needs a C++ compiler")


class NumpySophiaG:
    """Algorithm 3 with the GNB estimator, in float64, one array at a time."""

    def __init__(
        self, theta, lr, rho, betas, bs, weight_decay, bias_correction=False, cautious=False
    ):
        self.theta = theta.astype(np.float64)
        self.m, self.h = np.zeros_like(self.theta), np.zeros_like(self.theta)
        self.lr, self.rho, self.betas, self.bs, self.wd = lr, rho, betas, bs, weight_decay
        self.clipped = self.unclipped = 0
        self.correct, self.cautious, self.updates = bias_correction, cautious, 0

    def update_hessian(self, g):
        self.updates += 1
        self.h = self.betas[1] * self.h + (1 - self.betas[1]) * g.astype(np.float64) ** 2

    def step(self, g):
        g = g.astype(np.float64)
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        h = self.h / (1 - self.betas[1] ** self.updates) if self.correct else self.h
        ratio = np.abs(self.m) / np.maximum(self.rho * self.bs * h, 1e-15)
        self.theta -= self.lr * self.wd * self.theta
        agrees = np.sign(self.m) == np.sign(g) if self.cautious else 1
        self.theta -= self.lr * np.sign(self.m) * np.minimum(ratio, 1) * agrees
        self.unclipped, self.clipped = np.sum(ratio < 1), np.sum(ratio >= 1)


def gradient(rng, shape):
    """Magnitudes from 1e-4 to 1, so that some coordinates clip and some do not."""
    return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 0, shape)).astype(np.float32)


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [torch.nn.Parameter(t) for t in tensors]


def advance(optimizer, steps, seed=1, every=3, **arguments):
    """`steps` steps on seeded gradients, with a Hessian update before every third."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        rng = np.random.default_rng((seed, step))
        for p in params:
            p.grad = torch.from_numpy(gradient(rng, p.shape)).to(p.device, p.dtype)
        if step % every == 0:
            optimizer.update_hessian(**arguments)
        for p in params:
            p.grad = torch.from_numpy(gradient(rng, p.shape)).to(p.device, p.dtype)
        optimizer.step(**arguments)


def snapshot(optimizer):
    """Every parameter and every state tensor, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [torch.as_tensor(value) for p in params for value in optimizer.state[p].values()]
    return [t.detach().clone() for t in params + states]


def assert_identical(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (t.reshape(-1).view(torch.uint8) for t in (a, b))  # tells -0.0 and NaNs apart
        assert torch.equal(a, b)


def compare_with_numpy(
    backend, device="cpu", shapes=SHAPES, steps=12, scale=None, sign=1.0, **options
):
    """Runs both on seeded gradients; parameters, moments and win rate agree, both branches hit."""
    params = parameters(shapes, device=device)
    groups = [dict(params=[p], weight_decay=0.2 * (p.dim() == 2)) for p in params]
    settings = SETTINGS | options
    optimizer = SophiaG(groups, **settings, backend=backend, maximize=sign < 0)
    theirs = [
        NumpySophiaG(p.detach().cpu().numpy(), **settings, weight_decay=0.2 * (p.dim() == 2))
        for p in params
    ]
    rng = np.random.default_rng(5)
    factor = np.float32(1.0 if scale is None else float(scale))
    clipped = unclipped = 0
    for step in range(steps):
        if step % 5 == 0:
            for p, reference in zip(params, theirs, strict=True):
                g = gradient(rng, p.shape) / 20
                p.grad = torch.from_numpy(g).to(device)
                reference.update_hessian(factor * g)
            optimizer.update_hessian(grad_scale=scale)
        for p, reference in zip(params, theirs, strict=True):
            g = gradient(rng, p.shape)
            p.grad = torch.from_numpy(g).to(device)
            reference.step(sign * factor * g)
            clipped, unclipped = clipped + reference.clipped, unclipped + reference.unclipped
        optimizer.step(grad_scale=scale)
        share = sum(r.unclipped for r in theirs) / sum(r.theta.size for r in theirs)
        # a ratio within float32 rounding of 1 may fall on either side
        assert abs(float(optimizer.win_rate) - share) < 1e-4
    total = clipped + unclipped
    assert 0.03 < clipped / total < 0.97
    for p, reference in zip(params, theirs, strict=True):
        state = optimizer.state[p]
        assert float(state["step"]) == steps
        # float32 against float64: half an ulp of a value of 4, twice a step, and lr times the
        # rounding of a ratio near 1
        np.testing.assert_allclose(p.detach().cpu().numpy(), reference.theta, rtol=0, atol=4e-6)
        np.testing.assert_allclose(
            state["exp_avg"].cpu().numpy(), reference.m, rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(
            state["hessian"].cpu().numpy(), reference.h, rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.37)])
def test_matches_the_paper(backend, scale):
    compare_with_numpy(backend, scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cautious", [False, True])
def test_bias_corrected_hessian_and_cautious_updates(backend, cautious):
    options = {"bias_correction": True, "cautious": cautious, "rho": 1e-3}  # some clip again
    compare_with_numpy(backend, shapes=SHAPES[:4], scale=0.5, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maximize_goes_up(backend):
    compare_with_numpy(backend, shapes=SHAPES[:3], steps=4, sign=-1.0)


# Sums of |theta|, exp_avg and hessian after 10 seeded steps of the NumPy version, to 7 digits.
PINNED = [476.9482, 77.06322, 11.246285, 0.6599716]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pinned_trajectory(backend):
    params = parameters(SHAPES[:4])
    rng = np.random.default_rng(7)
    for p in params:
        p.data = torch.from_numpy(gradient(rng, p.shape))
    optimizer = SophiaG(params, **SETTINGS, weight_decay=0.1, backend=backend)
    advance(optimizer, 10)
    states = [optimizer.state[p] for p in params]
    sums = [
        sum(float(p.detach().double().abs().sum()) for p in params),
        sum(float(s["exp_avg"].double().abs().sum()) for s in states),
        sum(float(s["hessian"].double().sum()) for s in states),
        float(optimizer.win_rate),
    ]
    np.testing.assert_allclose(sums, PINNED, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_authors_trajectory(backend):
    if not REFERENCE.exists():
        pytest.skip("the recorded run of the authors' optimizer is not on this machine")
    data = np.load(REFERENCE)
    params = [torch.nn.Parameter(torch.from_numpy(data[f"init_{i}"])) for i in range(4)]
    groups = [
        dict(params=[p], weight_decay=float(wd))
        for p, wd in zip(params, data["weight_decay"], strict=True)
    ]
    lr, rho, bs = float(data["lr"]), float(data["rho"]), int(data["bs"])
    optimizer = SophiaG(groups, lr=lr, rho=rho, betas=tuple(data["betas"]), backend=backend)
    for step in range(int(data["steps"])):
        for kind in ("hess_grad", "grad"):  # the file's order: the Hessian first
            if f"{kind}_{step}_0" in data:
                for i, p in enumerate(params):
                    p.grad = torch.from_numpy(data[f"{kind}_{step}_{i}"])
                optimizer.step(bs=bs) if kind == "grad" else optimizer.update_hessian()
    for i, p in enumerate(params):
        state = optimizer.state[p]
        ours = dict(final=p.detach(), exp_avg=state["exp_avg"], hessian=state["hessian"])
        for name, value in ours.items():
            np.testing.assert_allclose(value.numpy(), data[f"{name}_{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [NAN, float("inf"), torch.tensor(NAN), torch.tensor(-torch.inf)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nonfinite_scale_changes_nothing(backend, scale, state_dtype):
    shapes = SHAPES[1:] if state_dtype == torch.float32 else SHAPES[:3]
    optimizer = SophiaG(parameters(shapes), **SETTINGS, backend=backend, state_dtype=state_dtype)
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].view(-1)[0] = -0.0
    advance(optimizer, 2)
    optimizer.param_groups[0]["params"][0].grad.view(-1)[-1] = NAN
    before, rate = snapshot(optimizer), optimizer.win_rate.clone()
    optimizer.update_hessian(grad_scale=scale)
    optimizer.update_hessian(grad_scale=scale, squared=True)
    optimizer.step(grad_scale=scale)
    assert_identical(before, snapshot(optimizer))
    assert torch.equal(rate, optimizer.win_rate)
    optimizer.step(grad_scale=0.5)  # not vacuous: a finite one moves
    assert not torch.equal(before[1], snapshot(optimizer)[1])


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_undefined_ratio_is_no_update(backend, cautious):
    """m = h = 0 stays put; h = 0 alone moves by the full lr; a NaN gradient is not hidden."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SophiaG([p], lr=0.1, weight_decay=0.0, backend=backend, cautious=cautious)
    p.grad = torch.tensor([0.0, 2.0, NAN])
    optimizer.step()
    assert p[0] == 1 and p[1] == torch.tensor(1.0) - 0.1 and p[2].isnan()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_is_exact(backend, param_dtype, state_dtype):
    """8 steps equal 4, a save, a load into fresh objects and 4; gradients are new tensors."""
    shapes = SHAPES if backend == "cpp" and param_dtype == torch.float32 else SHAPES[:4]

    def build():
        params = parameters(shapes, param_dtype)
        groups = [dict(params=params[:2], lr=1e-2), dict(params=params[2:], weight_decay=0.0)]
        settings = SETTINGS | {"state_dtype": state_dtype, "bias_correction": True}
        return SophiaG(groups, **settings, backend=backend)

    whole, half = build(), build()
    advance(whole, 4), advance(half, 4)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = build()
    for old, new in zip(half.param_groups, resumed.param_groups, strict=True):
        for p, q in zip(old["params"], new["params"], strict=True):
            q.data = p.data.clone()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(s["hessian"].dtype == state_dtype for s in resumed.state.values())
    assert_identical(snapshot(half), snapshot(resumed))
    advance(whole, 4, seed=2), advance(resumed, 4, seed=2)
    assert_identical(snapshot(whole), snapshot(resumed))
    assert torch.equal(whole.win_rate, resumed.win_rate)


@here_only
def test_loading_copies():
    saved = SophiaG(parameters(SHAPES[:2]))
    advance(saved, 1)
    state = saved.state_dict()
    before = snapshot(saved)
    other = SophiaG(parameters(SHAPES[:2]))
    other.load_state_dict(state)
    advance(other, 2)
    assert_identical(before, snapshot(saved))


@here_only
def test_old_states_are_upgraded():
    optimizer = SophiaG(parameters(SHAPES[:2]), **SETTINGS)
    advance(optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for name in ("eps", "bs", "maximize", "cautious", "bias_correction"):
        del old["param_groups"][0][name]
    old["param_groups"][0]["capturable"] = True
    old["state"][0]["step"], old["state"][1]["step"] = 2, torch.tensor([2.0])
    loaded = SophiaG(parameters(SHAPES[:2]), bs=SETTINGS["bs"])
    with torch.no_grad():
        torch._foreach_copy_(*(o.param_groups[0]["params"] for o in (loaded, optimizer)))
    loaded.load_state_dict(old)
    assert_identical(snapshot(optimizer), snapshot(loaded))
    advance(optimizer, 2), advance(loaded, 2)
    assert_identical(snapshot(optimizer), snapshot(loaded))
    del old["state"][1]["hessian"]  # the authors' code creates it late
    loaded.load_state_dict(old)
    advance(loaded, 1)
    clone = copy.deepcopy(optimizer)
    assert_identical(snapshot(optimizer), snapshot(clone))
    assert clone.backend == "auto" and torch.equal(clone.win_rate, optimizer.win_rate)
    with pytest.raises(ValueError, match="another model"):
        SophiaG(parameters([(129,), (37, 19)])).load_state_dict(optimizer.state_dict())


@here_only
@needs_compiler
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cautious", [False, True])
def test_cpp_equals_pytorch_bit_for_bit(cautious, param_dtype, state_dtype):
    """With any number of threads, and where gradients are NaN, infinite or zero."""
    full_nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    special = torch.tensor([full_nan, torch.inf, -torch.inf, 0.0, -0.0, 1e38, 1e-45])
    runs = []
    for backend, threads in (("eager", 1), ("cpp", 1), ("cpp", 3)):
        params = parameters([(300, 301), (5,), (BLOCK_SIZE * 40,)], param_dtype)
        options = {"backend": backend, "state_dtype": state_dtype, "cautious": cautious}
        optimizer = SophiaG(params, **SETTINGS, **options)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            advance(optimizer, 3, grad_scale=0.7)
            for p in params[1:]:
                p.grad = torch.linspace(-1, 1, p.numel(), dtype=param_dtype)
                p.grad[: len(special)] = special[: p.numel()]
            optimizer.update_hessian(0.3)
            optimizer.step(grad_scale=torch.tensor(-0.9))
            optimizer.update_hessian(squared=True)
        finally:
            torch.set_num_threads(before)
        runs.append([t.float() for t in [*snapshot(optimizer), optimizer.win_rate]])
    for others in zip(*runs, strict=True):
        nan, *nans = (t.isnan() for t in others)
        assert all(torch.equal(nan, other) for other in nans)  # whose bits may be any
        assert_identical(*[[t.nan_to_num(nan=0.5) for t in others[i : i + 2]] for i in (0, 1)])
    assert runs[0][-2].isnan().any() and 0.03 < runs[0][-1] < 0.97


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_layouts(backend):
    """Transposed, strided, empty and half-precision parameters step as contiguous ones do."""
    shape = (300, 302) if backend == "cpp" else (19, 38)
    plain = parameters([shape, shape, (shape[0], shape[1] // 2), (0, 5), (7,)])
    odd = [
        plain[0].detach().clone(),
        plain[1].detach().t().contiguous().t(),  # dense, in another order
        torch.zeros(shape)[:, ::2].copy_(plain[2].detach()),  # with gaps
        plain[3].detach().clone(),
        plain[4].detach().clone(),
    ]
    base = torch.zeros(shape)
    odd[2] = base[:, ::2].copy_(plain[2].detach())
    odd = [torch.nn.Parameter(t) for t in odd]
    optimizers = [SophiaG(group, **SETTINGS, backend=backend) for group in (plain, odd)]
    for step in range(3):
        rng = np.random.default_rng(step)
        for p, q in zip(plain, odd, strict=True):
            p.grad = torch.from_numpy(gradient(rng, p.shape))
            q.grad = p.grad.clone()
        odd[0].grad = odd[0].grad.t().contiguous().t()  # a gradient in another order
        odd[4].grad = torch.stack([odd[4].grad] * 2, 1)[:, 0]  # and one with gaps
        for optimizer in optimizers:
            optimizer.update_hessian()
            optimizer.step()
    assert not odd[2].is_contiguous() and odd[2].data_ptr() == base.data_ptr()
    assert not base[:, 1::2].any()  # what lies in the gaps is not ours
    for p, q in zip(plain, odd, strict=True):
        # an element's place in memory decides whether it runs in the vector loop or its remainder
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        if p.numel():
            state = [optimizer.state[x] for optimizer, x in zip(optimizers, (p, q), strict=True)]
            torch.testing.assert_close(state[0]["hessian"], state[1]["hessian"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_squared_gradients_enter_the_hessian_as_they_are(backend):
    """h = beta2 h + (1 - beta2) scale g / bs with the group's bs, also for negative g."""
    params = parameters(SHAPES)
    groups = [dict(params=params[:2], bs=512), dict(params=params[2:])]
    optimizer = SophiaG(groups, **SETTINGS, backend=backend)
    rng, beta2 = np.random.default_rng(3), SETTINGS["betas"][1]
    hessians = [np.zeros(p.shape) for p in params]
    for scale in (None, 0.25, torch.tensor(3.0)):
        for i, p in enumerate(params):
            g = gradient(rng, p.shape)
            p.grad = torch.from_numpy(g)
            factor = 1.0 if scale is None else float(scale)
            bs = 512 if i < 2 else SETTINGS["bs"]
            hessians[i] = beta2 * hessians[i] + (1 - beta2) * factor * g.astype(np.float64) / bs
        optimizer.update_hessian(grad_scale=scale, squared=True)
    for p, h in zip(params, hessians, strict=True):
        np.testing.assert_allclose(optimizer.state[p]["hessian"].numpy(), h, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_mixed_parameters(backend):
    """One group of three dtypes: float32 arithmetic, then rounding of the parameter."""
    wide = parameters(SHAPES[:3])
    for p in wide:
        p.data = p.data.bfloat16().float()
    mixed = [torch.nn.Parameter(wide[0].detach().bfloat16()), *parameters(SHAPES[:3])[1:]]
    mixed[1].data, mixed[2].data = wide[1].data.clone(), wide[2].data.half()
    rng = np.random.default_rng(0)
    for p, q in zip(wide, mixed, strict=True):
        q.grad = torch.from_numpy(gradient(rng, p.shape)).to(q.dtype)
        p.grad = q.grad.float()
    for params in (wide, mixed):
        optimizer = SophiaG(params, lr=0.1, backend=backend)
        optimizer.step()
        assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
    for p, q in zip(wide, mixed, strict=True):
        if INTERPRET and q.dtype == torch.bfloat16:  # the interpreter cuts instead of rounding
            torch.testing.assert_close(p.to(q.dtype), q, rtol=2**-7, atol=0)
        else:
            assert torch.equal(p.to(q.dtype), q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_come_late(backend):
    """No gradient, no step and no state; the Hessian may come before the first step."""
    params = parameters(SHAPES[:3])
    optimizer = SophiaG(params, **SETTINGS, backend=backend)
    optimizer.step()
    assert not optimizer.state and optimizer.win_rate.isnan()
    params[0].grad = torch.ones_like(params[0])
    optimizer.update_hessian()
    assert float(optimizer.state[params[0]]["step"]) == 0
    optimizer.step()
    before = params[1].detach().clone()
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert not torch.equal(before, params[1])
    assert [float(optimizer.state[p]["step"]) for p in params[:2]] == [2, 1]
    assert params[2] not in optimizer.state
    version = params[0]._version
    optimizer.step()
    assert params[0]._version > version  # autograd must see the write


@here_only  # Triton's bits are compared with these below
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_moments_are_unbiased(backend):
    """With stochastic rounding h follows 1 - 0.99^n on average; rounded to nearest it stalls."""
    shape = (300, 300) if backend == "cpp" else (40, 40)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SophiaG([p], lr=0.0, state_dtype=torch.bfloat16, backend=backend)
    p.grad = torch.ones(shape)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    steps = 200
    for _ in range(steps):
        optimizer.step()
        optimizer.update_hessian()
        nearest = (0.99 * nearest.float() + 0.01).bfloat16()
    h, m = (optimizer.state[p][name].float() for name in ("hessian", "exp_avg"))
    expected = 1 - 0.99**steps
    assert nearest < expected - 0.04
    # the noise of one value is about 1 %, that of the mean of 1,600 about 0.03 %
    assert abs(float(h.mean()) - expected) < 1e-3 and abs(float(m.mean()) - 1) < 1e-3
    assert 0.001 < float(h.std()) < 0.05
    row, neighbour = h.flatten()[:-1], h.flatten()[1:]
    assert abs(float(torch.corrcoef(torch.stack([row, neighbour]))[0, 1])) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_bits_are_a_function_of_the_step(backend):
    """The same on every backend, different for each parameter and step, no global random state."""
    shapes = [(9, 15), (9, 15)]
    runs = [backend, "eager"]
    results = []
    for name in runs:
        state = torch.get_rng_state()
        optimizer = SophiaG(parameters(shapes), backend=name, state_dtype=torch.bfloat16, rho=0.5)
        for p in optimizer.param_groups[0]["params"]:
            p.data.zero_()
            p.grad = torch.full_like(p, 0.3)
        optimizer.step(), optimizer.update_hessian()
        results.append(snapshot(optimizer))
        assert torch.equal(state, torch.get_rng_state())
    assert_identical(*results)
    moments = [t for t in results[0] if t.dtype == torch.bfloat16]
    assert not torch.equal(moments[0], moments[2])


@here_only
def test_settings_are_checked():
    p = torch.nn.Parameter(torch.ones(2))
    bad = [dict(lr=-1.0), dict(rho=-1.0), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1))]
    bad += [dict(eps=0.0), dict(bs=0), dict(weight_decay=NAN), dict(state_dtype=torch.float16)]
    bad += [dict(backend="cuda"), dict(betas=(0.9,))]
    for arguments in bad:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            SophiaG([p], **arguments)
    optimizer = SophiaG([p])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(1))], lr=-1.0))
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="bs"):
        optimizer.step(bs=0)
    for dtype in (torch.complex64, torch.float64):
        q = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        q.grad = torch.ones_like(q)
        with pytest.raises(ValueError, match="another optimizer"):
            SophiaG([q]).step()
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@here_only
def test_closure_and_scheduler():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SophiaG([p], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    scheduler.step()
    optimizer.step(closure)
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 - 0.05))


@here_only
def test_bs_of_a_step_is_for_that_step():
    results = []
    for default, given in ((512, None), (8192, 512), (8192, None)):
        optimizer = SophiaG(parameters(SHAPES[:1]), lr=1e-2, rho=1.0, bs=default)
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.from_numpy(gradient(np.random.default_rng(0), p.shape))
        optimizer.update_hessian()
        optimizer.step(bs=given)
        assert optimizer.param_groups[0]["bs"] == default
        results.append(p.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.skipif(not INTERPRET, reason="runs in the child process")
def test_the_table_follows_the_gradients():
    """Sent again when a gradient has moved, kept when it has not; the block map is kept."""
    (p,) = parameters(SHAPES[:1])
    optimizer = SophiaG([p], backend="triton", weight_decay=0.0, lr=0.1)
    first = p.grad = torch.ones_like(p)
    tables = []
    for grad in (first, first, -20 * first):
        p.grad = grad
        optimizer.step()
        ((_, bucket),) = optimizer._buckets()
        tables.append((bucket, bucket.table, bucket.block_rows))
    assert all(a is b for a, b in zip(tables[0], tables[1], strict=True))
    assert tables[1][1] is not tables[2][1] and tables[1][2] is tables[2][2]
    assert (optimizer.state[p]["exp_avg"] < 0).all() and first.eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_moved_tensors_and_missing_states(backend):
    """Parameters, moments and gradients in new memory, states lost and gradients gone."""

    def new_data(optimizer, params):
        params[0].data = params[0].data.clone()

    def new_moment(optimizer, params):
        state = optimizer.state[params[1]]
        state["exp_avg"], state["hessian"] = state["exp_avg"] / 2, state["hessian"].clone()

    def odd_address(optimizer, params):
        for p in params[:2]:
            p.grad = torch.cat([torch.zeros(1), p.grad.flatten()])[1:].view(p.shape)

    def other_order(optimizer, params):
        params[0].grad = params[0].grad.t().contiguous().t()

    def no_gradient(optimizer, params):
        params[1].grad = None

    def no_state(optimizer, params):
        del optimizer.state[params[2]]

    snapshots = []
    for name in (backend, "eager"):
        params = parameters([(12, 16), (64, 32), (48,)])
        optimizer = SophiaG(params, **SETTINGS, backend=name)
        advance(optimizer, 1)
        for move in (new_data, new_moment, odd_address, other_order, no_gradient, no_state):
            for p in params:
                p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
            move(optimizer, params)
            optimizer.step()
            aligned = {id(p): b.is_aligned for _, b in optimizer._buckets() for p in b.params}
            assert aligned[id(params[0])] == (move is not odd_address)
            optimizer.update_hessian()
        snapshots.append(snapshot(optimizer))
    torch.testing.assert_close(*snapshots, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_made_smaller_in_place_is_refused(backend):
    """Its address and strides are as before; its moments and, at first, its gradient are not."""
    (p,) = parameters([(64,)])
    optimizer = SophiaG([p], backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.data = p.data[:16]
    p.grad = torch.ones(16)
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step()


@here_only
def test_without_a_compiler_there_is_one_warning(monkeypatch):
    monkeypatch.setattr(sophia_triton, "cpp_library", lambda: None)
    with pytest.raises(ValueError, match="install a C"):
        SophiaG(parameters(), backend="cpp")
    slow, eager = (SophiaG(parameters(), backend=b) for b in ("auto", "eager"))
    with pytest.warns(UserWarning, match="no compiler") as caught:
        advance(slow, 2)
    assert len(caught) == 1 and caught[0].filename == __file__
    advance(eager, 2)
    assert_identical(snapshot(slow), snapshot(eager))


@here_only
def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import sophia_triton as s, torch\n"
    code += "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); s.SophiaG([p]).step()\n"
    code += "try: s.SophiaG([p], backend='triton')\n"
    code += "except ValueError as error: print(error, 'torch._inductor.compile_fx' in sys.modules)"
    root = Path(sophia_triton.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "install" in done.stdout and done.stdout.endswith("False\n"), done.stderr


@here_only
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", __file__]
    root = Path(sophia_triton.__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


@here_only
@pytest.mark.parametrize(("moment", "squared"), [("float32", True), ("bfloat16", False)])
def test_kernels_compile_for_an_h100(moment, squared):
    """Without a device. Each thread moves 8 elements of a tensor, 128 bits at a time."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = dict(PARAM=tl.float32, GRAD=tl.float32, MOMENT=getattr(tl, moment), ALIGNED=True)
    constants |= dict(
        squared=squared, cautious=squared, BLOCK_SIZE=BLOCK_SIZE, COUNTERS=sophia_triton.COUNTERS
    )
    kinds = dict(table_ptr="*i64", block_rows_ptr="*i32", counters_ptr="*i32", n_rows="i32")
    n_moment = 2 if moment == "float32" else 1
    accesses = dict(
        step_kernel=(4 + 2 * n_moment, 2 + n_moment), hessian_kernel=(2 + n_moment, n_moment)
    )
    for name, expected in accesses.items():
        kernel = getattr(sophia_triton, name)
        signature = {x: "constexpr" if x in constants else kinds.get(x) for x in kernel.arg_names}
        signature = {
            x: kind or ("*fp32" if "_ptr" in x else "fp32") for x, kind in signature.items()
        }
        used = {x: value for x, value in constants.items() if x in signature}
        source = ASTSource(kernel, signature, used)
        built = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8))
        wide = [built.asm["ptx"].count(f"{access}.global.v4.b32") for access in ("ld", "st")]
        assert tuple(wide) == expected, (name, wide)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_on_the_device(backend, scale):
    if INTERPRET or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and compiled Triton")
    scale = None if scale is None else torch.tensor(scale, device="cuda")
    shapes, options = [*SHAPES, (1024, 640)], {"scale": scale, "cautious": scale is not None}
    compare_with_numpy(backend, device="cuda", shapes=shapes, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_without_waiting(state_dtype):
    """A NaN clip factor on the device skips the step, and nothing waits for the device."""
    if INTERPRET or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and compiled Triton")
    optimizer = SophiaG(parameters(device="cuda"), **SETTINGS, state_dtype=state_dtype)
    advance(optimizer, 2)
    before, scale = snapshot(optimizer), torch.tensor(NAN, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.update_hessian(grad_scale=scale)
        optimizer.step(grad_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_identical(before, snapshot(optimizer))
