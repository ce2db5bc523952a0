"""Tests of the kernels room. Numbers are compared with float64; a result's budget is the error that
the plain version (full logits, autograd) makes at the same inputs in the same precision."""

import math
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import bench, fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# On a GPU the Triton kernels run here. On a CPU they run in a process of their own with
# TRITON_INTERPRET=1, which makes their compilation (tested here too) impossible.
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("torch", id="backend_torch"),
        pytest.param(
            "triton",
            id="backend_triton",
            marks=pytest.mark.skipif(
                DEVICE == "cpu" and not INTERPRETED, reason="run by test_kernels_interpreted"
            ),
        ),
    ],
)
methods = pytest.mark.parametrize("method", kernels.METHODS)

SHAPES = [  # R, V, D: ragged against tiles of 128 x 256 x 64, blocks of 4096 and rows of 64
    (1, 1, 1),
    (3, 2, 5),
    (130, 257, 64),
    (127, 300, 33),
    (40, 4099, 16),
    (4, 32000, 32),
    (4, 32064, 32),
    (6, 300, 4096),
    (6, 70, 5120),
]


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch):
    """Once as shipped, once cut so that small inputs take several chunks and slices."""
    if request.param == "pieces":
        monkeypatch.setattr(fused, "chunk_rows", lambda weight: 7)
        monkeypatch.setattr(fused, "slice_columns", lambda hidden: 200)
    return request.param


def dtypes_of(backend, shape, pieces):
    """All three, but for Triton's interpreter: tl.dot gives garbage on bfloat16 there (3.9), and
    a large vocabulary takes it seconds."""
    if backend == "torch" or not INTERPRETED:
        return (torch.float32, torch.float16, torch.bfloat16)
    if shape[1] < 1000:
        return (torch.float32, torch.float16)
    return (torch.float16,) if pieces == "whole" else ()


def make_head(R, V, D, dtype, seed=0):
    """Hidden states, a vocabulary matrix that gives logits of size 3, targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 3 / math.sqrt(D)
    target = torch.randint(V, (R,), generator=generator)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, target.to(DEVICE)


def make_pairs(R, pairs, seed=0):
    """Segment weights, groups of uneven length, reference scores."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.where(torch.rand(R, generator=generator) < 0.3, 5.0, 1.0)
    extra = torch.randint(2 * pairs, (R - 2 * pairs,), generator=generator)
    group = torch.cat([torch.arange(2 * pairs), extra]).sort().values
    scores = torch.randn(2 * pairs, generator=generator) - 5
    return weight.to(DEVICE), group.to(DEVICE), scores.to(DEVICE)


def exact(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def assert_within(ours, plain, truth, dtype, what):
    """ours is no further from the truth than plain is, but for chance: another order of the same
    sum may round a logit the other way. One rounding (float32: 1e-6) more is allowed."""

    def error(x):
        return (x.detach().double() - truth).norm().item()

    slack = max(torch.finfo(dtype).eps / 2, 1e-6) * truth.norm().item() + 1e-12
    assert error(ours) <= error(plain) + slack, f"{what}, {dtype}: {error(ours)} > {error(plain)}"


# token_logp ----------------------------------------------------------------------------------


@backends
@methods
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_token_logp_ragged(shape, method, backend, pieces):
    for dtype in dtypes_of(backend, shape, pieces):
        hidden, weight, target = make_head(*shape, dtype)
        upstream = torch.linspace(-1, 1, shape[0], device=DEVICE)
        wide = exact(hidden, weight)

        ours = kernels.token_logp(hidden, weight, target, method, backend)
        plain, truth = (reference.token_logp(*x, target) for x in ((hidden, weight), wide))
        assert ours.dtype == torch.float32 and ours.shape == target.shape
        assert_within(ours, plain, truth, dtype, "log p")
        gradients = [
            torch.autograd.grad((logp * upstream).sum(), inputs)
            for logp, inputs in ((ours, (hidden, weight)), (plain, (hidden, weight)), (truth, wide))
        ]
        for name, *three in zip(("dH", "dW"), *gradients):
            assert three[0].dtype == dtype
            assert_within(*three, dtype, name)


@backends
def test_kernels_token_logp_large_logits(backend):
    """The online softmax subtracts the peak: logits of 10,000 are no matter, nor are equal ones."""
    hidden = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[100.0, 0.0], [99.0, 0.0], [-100.0, 0.0]], device=DEVICE)
    logp = kernels.token_logp(hidden, weight, torch.tensor([1, 2, 0], device=DEVICE), None, backend)
    assert logp.tolist() == pytest.approx([-100.0, 0.0, -math.log(3)])


@backends
def test_kernels_many_tiles(backend):
    """More than one group of 8 row tiles, in the order that tl.swizzle2d gives them."""
    hidden, weight, target = make_head(11 * 64 + 3, 150, 8, torch.float32)
    with torch.no_grad():
        ours = kernels.token_logp(hidden, weight, target, None, backend)
    assert torch.allclose(ours, reference.token_logp(hidden, weight, target), atol=1e-5)


@backends
@methods
def test_kernels_without_rows_or_gradient(method, backend):
    hidden, weight, target = make_head(20, 30, 8, torch.float32)
    empty = kernels.token_logp(hidden[:0], weight, target[:0], method, backend)
    assert empty.shape == (0,)
    empty.sum().backward()
    assert not weight.grad.any()
    with torch.no_grad():
        silent = kernels.token_logp(hidden, weight, target, method, backend)
    assert not silent.requires_grad
    graded = kernels.token_logp(hidden, weight, target, method, backend)
    assert graded.requires_grad and torch.allclose(silent, graded, rtol=1e-5, atol=1e-5)


# ddpo_loss -----------------------------------------------------------------------------------


def by_hand(logp, weights, group, scores_ref, beta, normalize):
    """Eq. 5 and Eq. 3 of RLHF-V, token by token in Python floats."""
    sums, totals = [0.0] * len(scores_ref), [0.0] * len(scores_ref)
    for value, weight, k in zip(logp.tolist(), weights.tolist(), group.tolist()):
        sums[k] += weight * value
        totals[k] += weight
    scores = [s / n if normalize else s for s, n in zip(sums, totals)]
    rewards = [beta * (s - r) for s, r in zip(scores, scores_ref.tolist())]
    chosen, rejected = rewards[0::2], rewards[1::2]
    losses = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected)]
    return sum(losses) / len(losses), chosen, rejected, scores


@backends
@methods
@pytest.mark.parametrize("normalize", [True, False])
def test_kernels_ddpo_by_hand(normalize, method, backend, pieces):
    hidden, weight, target = make_head(61, 40, 8, torch.float32)
    weights, group, scores_ref = make_pairs(61, 4)
    scores_ref = scores_ref if normalize else 20 * scores_ref
    wide_hidden, wide_weight = exact(hidden.detach(), weight.detach())
    logits = wide_hidden @ wide_weight.T
    logp = [row[t] - row.exp().sum().log() for row, t in zip(logits, target)]

    expected = by_hand(torch.stack(logp), weights, group, scores_ref, 0.2, normalize)
    result = kernels.ddpo_loss(
        hidden, weight, target, weights, group, scores_ref, 0.2, normalize, method, backend
    )
    for ours, truth in zip(result, expected):
        assert ours.dtype == torch.float32
        assert ours.tolist() == pytest.approx(truth, rel=1e-5, abs=1e-5)
    assert [x.requires_grad for x in result] == [True, False, False, False]


@backends
@methods
@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_kernels_ddpo_gradients(shape, method, backend, pieces):
    weights, group, scores_ref = make_pairs(shape[0], min(4, shape[0] // 2))
    for dtype in dtypes_of(backend, shape, pieces):
        hidden, weight, target = make_head(*shape, dtype)
        wide = exact(hidden, weight)
        results, gradients = [], []
        for function, inputs, more in (
            (kernels.ddpo_loss, (hidden, weight), dict(method=method, backend=backend)),
            (reference.ddpo_loss, (hidden, weight), {}),
            (reference.ddpo_loss, wide, {}),
        ):
            numbers = (weights, scores_ref) if inputs is not wide else exact(weights, scores_ref)
            results.append(function(*inputs, target, numbers[0], group, numbers[1], 0.5, **more))
            # 1024 keeps plain float16 clear of its smallest numbers, as a loss scale would.
            gradients.append(torch.autograd.grad(1024 * results[-1][0], inputs))
        for name, *three in zip(("loss", "chosen", "rejected", "scores"), *results):
            assert_within(*three, dtype, name)
        for name, *three in zip(("dH", "dW"), *gradients):
            assert three[0].dtype == dtype
            assert_within(*three, dtype, name)


@methods
def test_kernels_ddpo_small_coefficients_survive_float16(method):
    """beta / (P N) here is far below what float16 can hold; a loss scale brings it back exactly."""
    weights, group, scores_ref = make_pairs(60, 4)
    hidden, weight, target = make_head(60, 50, 16, torch.float16)
    wide = exact(hidden, weight)
    pairs = (weights, group, scores_ref, 1e-6)
    loss = kernels.ddpo_loss(hidden, weight, target, *pairs, method=method)
    truth = reference.ddpo_loss(*wide, target, *exact(weights), group, *exact(scores_ref), 1e-6)
    scale = 2.0**24
    ours = torch.autograd.grad(loss[0] * scale, (hidden, weight))
    expected = torch.autograd.grad(truth[0] * scale, wide)
    for a, b in zip(ours, expected):
        assert float((a - b).norm() / b.norm()) < 3e-3


@backends
@methods
def test_kernels_frozen_parts(method, backend, pieces):
    """No dW for a frozen head, no dH for frozen hidden states; the other one does not change."""
    weights, group, scores_ref = make_pairs(50, 3)
    args = (weights, group, scores_ref, 0.5, True, method, backend)
    hidden, weight, target = make_head(50, 200, 8, torch.float32)

    def gradients(*trained):
        for tensor in (hidden, weight):
            tensor.grad = None
            tensor.requires_grad_(any(tensor is t for t in trained))
        kernels.ddpo_loss(hidden, weight, target, *args)[0].backward()
        kernels.token_logp(hidden, weight, target, method, backend).sum().backward()
        return hidden.grad, weight.grad

    d_hidden, d_weight = gradients(hidden, weight)
    head_frozen, rest_frozen = gradients(hidden), gradients(weight)
    assert head_frozen[1] is None and torch.equal(head_frozen[0], d_hidden)
    assert rest_frozen[0] is None and torch.equal(rest_frozen[1], d_weight)


@backends
@methods
def test_kernels_deterministic(method, backend, pieces):
    weights, group, scores_ref = make_pairs(90, 5)
    runs = []
    for _ in range(2):
        hidden, weight, target = make_head(90, 300, 16, torch.float16)
        result = kernels.ddpo_loss(
            hidden, weight, target, weights, group, scores_ref, 0.5, True, method, backend
        )
        result[0].backward()
        logp = kernels.token_logp(hidden, weight, target, method, backend)
        logp.sum().backward()
        runs.append([*result, logp, hidden.grad, weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@backends
def test_kernels_equal_policy_and_reference_score_alike(backend):
    """The reference pass (A) and the training pass (B) round alike: rewards start at zero."""
    hidden, weight, target = make_head(64, 500, 32, torch.float16)
    weights, group, zeros = make_pairs(64, 4)
    args = (hidden, weight, target, weights, group)
    with torch.no_grad():
        scores = kernels.ddpo_loss(*args, 0 * zeros, 0.5, backend=backend)[3]
    loss, chosen, rejected, _ = kernels.ddpo_loss(*args, scores, 0.5, backend=backend)
    assert torch.cat([chosen, rejected]).abs().max() < 1e-3
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)


def test_kernels_backward_once():
    hidden, weight, target = make_head(10, 20, 4, torch.float32)
    loss = kernels.ddpo_loss(hidden, weight, target, *make_pairs(10, 2), 0.5)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU kernels/bench.py measures this")
@methods
@pytest.mark.parametrize("job", ["log p", "log p, gradients", "ddpo"])
def test_kernels_never_hold_the_logits(job, method, monkeypatch):
    """Peak memory beside inputs and gradients is below a quarter of the (R, V) logits."""
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr(fused, "SLICE_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr(fused, "SLICE_LEAST", 64)
    hidden, weight, target = make_head(1024, 2048, 16, torch.float32)
    pairs = make_pairs(1024, 64)

    def run():
        if job == "ddpo":
            kernels.ddpo_loss(hidden, weight, target, *pairs, 0.5, method=method)[0].backward()
        elif job == "log p":
            with torch.no_grad():
                kernels.token_logp(hidden, weight, target, method)
        else:
            kernels.token_logp(hidden, weight, target, method).sum().backward()

    assert bench.peak_cpu_memory(run) < 1024 * 2048 * 4 / 4


def test_kernels_flops():
    """Matrix products at the size of a 7B model, counted on the meta device: B is at the floor."""
    R, V, D, pairs = 6400, 32064, 4096, 32
    hidden = torch.empty(R, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(V, D, device="meta", dtype=torch.bfloat16, requires_grad=True)
    row, number = (torch.empty(R, device="meta", dtype=x) for x in (torch.float32, torch.long))
    scores = torch.empty(2 * pairs, device="meta")

    def products(method, frozen=False):
        weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            args = (hidden, weight, number, row, number, scores, 0.5)
            kernels.ddpo_loss(*args, method=method)[0].backward()
        return counter.get_total_flops() / (2 * R * V * D)

    assert products("chunks") == 3
    assert products("chunks", frozen=True) == 2
    assert products("slices") == 4
    assert products("slices", frozen=True) == 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        kernels.token_logp(hidden, weight, number)
    assert counter.get_total_flops() == 2 * R * V * D


# Which path runs -----------------------------------------------------------------------------


def test_kernels_choice_of_backend(monkeypatch):
    cpu = torch.zeros(1, 1)
    monkeypatch.delenv("PLUMBLINE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.choose_backend(None, cpu).logp_rows is reference.logp_rows
    with pytest.raises(ValueError, match="needs a GPU, hidden is on cpu: set TRITON_INTERPRET=1"):
        kernels.choose_backend("triton", cpu)
    monkeypatch.setenv("PLUMBLINE_KERNELS", "triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        kernels.choose_backend(None, cpu)
    assert kernels.choose_backend("torch", cpu).forward_logp is None  # the argument wins
    monkeypatch.setenv("PLUMBLINE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="must be one of .*, got 'cuda'"):
        kernels.choose_backend(None, cpu)
    monkeypatch.delenv("PLUMBLINE_KERNELS")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.choose_backend("triton", cpu)
    with pytest.raises(ValueError, match="method must be one of .*, got 'fast'"):
        kernels.choose_method("fast")


# Bad input -----------------------------------------------------------------------------------


def spoil(**changes):
    """Arguments of ddpo_loss that are right but for `changes`: functions of the right value."""
    hidden, weight, target = (x.detach() for x in make_head(12, 20, 4, torch.float32))
    good = dict(
        hidden=hidden,
        weight=weight,
        target=target,
        segment_weight=torch.ones(12, device=DEVICE),
        group=torch.arange(12, device=DEVICE) // 3,
        reference=torch.zeros(4, device=DEVICE),
        beta=0.5,
    )
    return good | {name: change(good[name]) for name, change in changes.items()}


def put(place, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


BAD = [
    (dict(target=put(7, 20)), "target 20 in row 7 is outside the vocabulary of 20 tokens"),
    (dict(target=put(3, -100)), "target -100 in row 3 is outside"),
    (dict(target=lambda x: x.float()), "token ids as torch.long, got torch.float32"),
    (dict(target=lambda x: x[:5]), r"target must have one entry per row of hidden, \(12,\)"),
    (dict(hidden=lambda x: x[None]), "hidden must be"),
    (dict(hidden=lambda x: x[:, :3]), r"same D, got \(12, 3\) and \(20, 4\)"),
    (dict(hidden=put((2, 1), math.nan)), "hidden states of row 2 contain NaN or infinity"),
    (dict(hidden=put((5, 0), math.inf)), "hidden states of row 5 contain NaN or infinity"),
    (dict(weight=put((6, 3), math.nan)), "vocabulary matrix .* row of token 6"),
    (dict(weight=lambda x: x.half()), "share one dtype .* got torch.float32 and torch.float16"),
    (dict(weight=lambda x: x.to("meta")), "one device, got hidden on .*, weight on meta"),
    (dict(weight=lambda x: x[:0]), "V and D at least 1"),
    (
        dict(hidden=lambda x: x.half() * 3e4, weight=lambda x: x.half() * 100),
        "logits of row 0 overflow torch.float16",
    ),
    (dict(group=put(slice(6, 9), 1)), "response 2 is empty"),
    (dict(group=put(4, 3)), "group falls from 3 to 1 after row 4"),
    (dict(group=put(11, 4)), "group 4 in row 11 is not one of the 4 responses"),
    (dict(group=lambda x: x.int()), "group must hold response numbers as torch.long"),
    (dict(segment_weight=put(slice(3, 6), 0.0)), "segment weights of response 1 sum to zero"),
    (dict(segment_weight=put(8, -1.0)), "segment weight -1.0 in row 8"),
    (dict(segment_weight=put(8, math.nan)), "segment weight nan in row 8"),
    (dict(segment_weight=lambda x: x[1:]), "segment_weight must have one entry per row"),
    (dict(segment_weight=lambda x: x.long()), "must be floating point"),
    (dict(reference=lambda x: x[:3]), r"G is even and at least 2; got shape \(3,\)"),
    (dict(reference=lambda x: x[:0]), "G is even and at least 2"),
    (dict(reference=lambda x: x[:2]), "group 2 in row 6 is not one of the 2 responses"),
    (dict(reference=put(1, math.inf)), "reference score inf of response 1 is not finite"),
    (dict(beta=lambda x: 0.0), "beta must be a finite number above 0"),
]


@methods
@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_kernels_bad_input(changes, message, method):
    args = spoil(**changes)
    with pytest.raises(ValueError, match=message):
        kernels.ddpo_loss(**args, method=method)
    if changes.keys() <= {"hidden", "weight", "target"}:
        with pytest.raises(ValueError, match=message):
            kernels.token_logp(args["hidden"], args["weight"], args["target"], method)


def test_kernels_ignore_autocast():
    hidden, weight, target = make_head(30, 40, 8, torch.float32)
    pairs = make_pairs(30, 3)
    expected = kernels.ddpo_loss(hidden, weight, target, *pairs, 0.5)[3]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, *_, scores = kernels.ddpo_loss(hidden, weight, target, *pairs, 0.5)
        loss.backward()
    assert torch.equal(scores, expected) and hidden.grad.dtype == torch.float32


# Triton without a GPU ------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly")
def test_kernels_interpreted():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "backend_triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert re.search(r"\d\d passed", run.stdout), run.stdout


def compile_kernel(kernel, types, constants, arch, warps, stages):
    """A kernel as its first launch would compile it for sm_<arch>, on any machine.

    types: Triton's names of the arguments' types; all but R are known to be multiples of 16.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | dict(zip(names, types.split()))
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name != "R"
    }
    return compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True),
    )


def stack_and_local_bytes(compiled):
    """What the binary keeps outside registers: zero unless registers are spilled.

    Read from the cubin itself: Triton ships two ptxas (one of them for sm_90 and newer), and only
    the one it used knows the PTX.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)]


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
without_interpreter = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")


@without_interpreter
@pytest.mark.parametrize("D", [4096, 80])  # a whole number of steps, and not
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_ahead_of_time_a(arch, dtype, D):
    pytest.importorskip("triton")
    from kernels import triton_forward

    tile = triton_forward.choose_tile(dtype, divmod(arch, 10), D)
    shape = dict(TILE_R=tile.rows, TILE_V=tile.vocab, TILE_D=tile.width)
    kind = TYPES[dtype]
    compiled = compile_kernel(
        triton_forward.tile_logp_kernel,
        f"*{kind} *{kind} *i64 *fp32 *fp32 i32 i32 i32",
        shape | dict(WHOLE_D=D % tile.width == 0, PRECISION="ieee"),
        arch,
        tile.warps,
        tile.stages,
    )
    assert stack_and_local_bytes(compiled) == [0, 0]
    assert compiled.metadata.shared <= SHARED_LIMIT[arch]
    if arch == 90 and dtype != torch.float32:
        assert "wgmma" in compiled.asm["ptx"]


@without_interpreter
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_ahead_of_time_rows(arch, dtype):
    pytest.importorskip("triton")
    from kernels import triton_rows

    for kernel, types in (
        (triton_rows.logp_rows_kernel, "*i64 *fp32 *fp32 i32 i32"),
        (triton_rows.gradient_rows_kernel, "*fp32 *i64 *fp32 i32 i32"),
    ):
        types = f"*{TYPES[dtype]} {types}"
        compiled = compile_kernel(kernel, types, dict(BLOCK=triton_rows.BLOCK), arch, 8, 3)
        assert stack_and_local_bytes(compiled) == [0, 0]
        assert compiled.metadata.shared <= SHARED_LIMIT[arch]


# The benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--frozen"]], ids=str)
def test_kernels_bench(flags, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # half a minute for nothing
    sizes = "--pairs 2 --response 5 --width 8 --vocab 30 --repeats 1".split()
    bench.table(bench.parse([*sizes, *flags]))
    lines = capsys.readouterr().out.splitlines()
    ours = [line.split() for line in lines if "ours" in line]
    assert len(ours) == 5 and "R = 20 response tokens" in lines[1]
    limit = 1e-5 if "float32" in lines[1] else 0.05
    assert all(float(row[-1]) < limit for row in ours), lines
