"""The merge contract. Oracle: an fp64 softmax over the concatenated keys, written out here.

The error bound is twice that of PyTorch's scaled_dot_product_attention in the same dtype on the same inputs, so that no
tolerance is tuned by hand.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bifurcated_attention import (
    SCORES_AT_ONCE,
    attend_heads,
    bifurcated_attention,
    has_fused,
    merge_partials,
    partial_attention,
    shared_attention,
)

# Every N, P, D, T and L of the contract occurs, in combinations that no shape's roundness hides. (N, P, D, T, L)
SHAPES = [
    (1, 1, 64, 4096, 1),
    (1, 8, 59, 129, 15),
    (2, 2, 80, 127, 128),
    (3, 4, 96, 4096, 127),
    (5, 1, 128, 1, 129),
    (17, 2, 59, 128, 1),
    (17, 8, 64, 15, 4096),
    (64, 4, 80, 129, 15),
    (127, 1, 96, 128, 127),
    (129, 8, 128, 127, 1),
    (1025, 2, 64, 15, 15),
    (1025, 1, 59, 129, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [N,H,S,D], k and v [N,G,L,D], mask broadcastable to [N,1,S,L] -> fp64 out [N,H,S,D] and lse [N,H,S,1]."""
    q, k, v = q.double(), k.double(), v.double()
    P = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(P, 1), v.repeat_interleave(P, 1)  # [N,H,L,D]
    scores = torch.einsum("nhsd,nhld->nhsl", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("nhsl,nhld->nhsd", scores.softmax(-1), v), scores.logsumexp(-1, keepdim=True)


def draw(N: int, P: int, D: int, T: int, L: int, S: int, dtype: torch.dtype) -> list[Tensor]:
    """q [N,2P,S,D], k and v of a shared context [1,2,T,D], and of the decoded part [N,2,L,D]."""
    generator = torch.Generator().manual_seed(hash((N, P, D, T, L, S)) % 2**31)
    shapes = [(N, 2 * P, S, D), (1, 2, T, D), (1, 2, T, D), (N, 2, L, D), (N, 2, L, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def side_by_side(context: Tensor, decoded: Tensor) -> Tensor:
    return torch.cat([context.expand(decoded.shape[0], -1, -1, -1), decoded], 2)


def assert_error_at_most_twice(actual: Tensor, plain: Tensor, expected: Tensor) -> None:
    """Root mean square over all elements. The largest of many rounding errors is a matter of luck: in bfloat16 it was
    seen at 2.1 times that of SDPA, whose result is rounded once where a merged one is rounded twice."""
    error, bound = ((tensor.double() - expected).square().mean().sqrt() for tensor in (actual, plain))
    assert error <= 2 * bound, f"{error:.3g} is {error / bound:.2f} times the error of SDPA"


# Scaled queries let few keys dominate, where rounded scores would show. In fp32 the log-sum-exp's own rounding would.
@pytest.mark.parametrize(
    "dtype,scale",
    [(torch.float32, 1), (torch.bfloat16, 4)]
    + [pytest.param(*each, marks=slow) for each in ((torch.float16, 4), (torch.bfloat16, 1), (torch.bfloat16, 16))],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_sdpa(shape, dtype, scale):
    q, k_context, v_context, k_decoded, v_decoded = draw(*shape, S=1, dtype=dtype)
    q = q * scale
    k, v = side_by_side(k_context, k_decoded), side_by_side(v_context, v_decoded)
    expected, _ = oracle(q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_error_at_most_twice(bifurcated_attention(q, k_context, v_context, k_decoded, v_decoded), plain, expected)


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_bound_holds_compiled(dtype):
    """The same bound for what torch.compile makes of it: one dynamic kernel for several sizes, and N = 1."""
    compiled = torch.compile(bifurcated_attention, dynamic=True)
    for N, T, L in ((17, 4096, 15), (64, 129, 127), (1, 4096, 15)):
        q, k_context, v_context, k_decoded, v_decoded = draw(N, 2, 64, T, L, S=1, dtype=dtype)
        q = q * (4 if dtype == torch.bfloat16 else 1)
        k, v = side_by_side(k_context, k_decoded), side_by_side(v_context, v_decoded)
        expected, _ = oracle(q, k, v)
        plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert_error_at_most_twice(compiled(q, k_context, v_context, k_decoded, v_decoded), plain, expected)


@pytest.mark.parametrize("P,S", list(itertools.product((1, 2, 8), (1, 3))))
def test_masked_decoded_part_equals_the_oracle(P, S):
    q, k_context, v_context, k_decoded, v_decoded = draw(5, P, 59, 33, 7, S=S, dtype=torch.float64)
    mask = torch.rand(5, 1, S, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    everything = torch.cat([mask.new_ones(5, 1, S, 33), mask], -1)
    expected, _ = oracle(q, side_by_side(k_context, k_decoded), side_by_side(v_context, v_decoded), everything)
    actual = bifurcated_attention(q, k_context, v_context, k_decoded, v_decoded, mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# A head has 2 x 6 x 33 scores.
@pytest.mark.parametrize("at_once,heads", [(1, [1] * 5), (1000, [2, 2, 1]), (396 * 3, [3, 2]), (396 * 5, [5])])
def test_heads_taken_some_at_a_time_give_the_same(monkeypatch, at_once, heads):
    """As many as there is room for. Oracle: fp64 over all heads, with a mask of its own for each."""
    generator, taken = torch.Generator().manual_seed(0), []
    q = torch.randn(2, 5, 6, 59, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 5, 33, 59, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 5, 6, 33, generator=generator) < 0.7
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(
        "bifurcated_attention.attend_heads", lambda q, *rest: taken.append(q.shape[1]) or attend_heads(q, *rest)
    )
    scores = (q @ k.mT / math.sqrt(59)).masked_fill(~mask, -math.inf)
    out, lse = partial_attention(q, k, v, mask)
    assert taken == heads
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1, keepdim=True), rtol=0, atol=1e-12)
    everything, _ = partial_attention(q, k, v)
    torch.testing.assert_close(everything, (q @ k.mT / math.sqrt(59)).softmax(-1) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows,heads,S", [(1, 1, 1), (1, 6, 3), (2, 6, 1), (2, 1, 3), (6, 6, 3), (6, 1, 1)])
@pytest.mark.parametrize("P", [1, 2, 3])
def test_a_mask_may_be_of_query_rows_or_key_rows_and_of_heads(rows, heads, S, P):
    """What is added to the scores of 6 rows that share 2 rows of keys. Oracle: fp64 over repeated keys."""
    generator = torch.Generator().manual_seed(rows + heads + S)
    q = torch.randn(6, 6, S, 10, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 6 // P, 7, 10, generator=generator, dtype=torch.float64)
    mask = torch.randn(rows, heads, S, 7, generator=generator, dtype=torch.float64)
    every_k, every_v = (tensor.repeat_interleave(3, 0).repeat_interleave(P, 1) for tensor in (k, v))
    scores = q @ every_k.mT / math.sqrt(10) + mask.repeat_interleave(6 // rows, 0)
    out, lse = shared_attention(q, k, v, mask)
    torch.testing.assert_close(out, scores.softmax(-1) @ every_v, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1, keepdim=True), rtol=0, atol=1e-12)


def test_a_mask_of_fewer_dimensions_is_refused():
    q, k, v, _, _ = draw(1, 1, 8, 5, 1, S=3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 5\): expected four dimensions"):
        partial_attention(q, k, v, torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "device,dtype,head_dim,major,expected",
    [
        ("cuda", torch.bfloat16, 64, 8, True),
        ("cuda", torch.float16, 256, 9, True),
        ("cuda", torch.bfloat16, 264, 8, False),
        ("cuda", torch.bfloat16, 60, 8, False),
        ("cuda", torch.bfloat16, 72, 7, False),
        ("cuda", torch.float32, 64, 8, False),
        ("cpu", torch.bfloat16, 64, 8, False),
    ],
)
def test_fused_kernels_are_the_way_for_what_they_take(monkeypatch, device, dtype, head_dim, major, expected):
    """A GPU of that compute capability is made believe."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(major=major))
    assert has_fused(torch.device(device), dtype, head_dim) == expected


def test_lse_is_the_natural_log_in_fp32():
    q, k, v, _, _ = draw(1, 4, 64, 129, 1, S=3, dtype=torch.bfloat16)
    out, lse = shared_attention(q, k, v)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), oracle(q, k, v)[1], rtol=0, atol=1e-3)


def test_a_query_that_sees_nothing_gives_zero_and_minus_infinity():
    q, _, _, k, v = draw(3, 2, 64, 1, 15, S=2, dtype=torch.float32)
    mask = torch.ones(3, 1, 2, 15, dtype=torch.bool)
    mask[1, :, 1] = False
    out, lse = shared_attention(q, k, v, mask)
    assert (out[1, :, 1] == 0).all() and (lse[1, :, 1] == -math.inf).all()
    assert out.isfinite().all() and lse[0].isfinite().all() and lse[1, :, 0].isfinite().all()


def test_no_keys_at_all_is_nothing():
    q, _, _, k, v = draw(3, 2, 64, 1, 15, S=2, dtype=torch.bfloat16)
    out, lse = shared_attention(q, k[:, :, :0], v[:, :, :0])
    assert out.dtype == torch.float32 and (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("at_once", [1, 10**6])
def test_gradients(monkeypatch, at_once):
    """Oracle: finite differences in fp64 (gradcheck). Two contexts, grouped heads, a row that sees none of its own
    keys; all heads at once and one by one; with a soft cap; and where nothing at all is seen, zeros."""
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 4, 1, 2), (2, 2, 3, 2), (2, 2, 3, 2), (4, 2, 2, 2), (4, 2, 2, 2)]
    q, *keys = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.bool)[:, None, None]  # [4,1,1,2]
    assert torch.autograd.gradcheck(lambda *inputs: bifurcated_attention(*inputs, mask), (q, *keys))
    assert torch.autograd.gradcheck(lambda *inputs: shared_attention(*inputs, softcap=0.7), (q, *keys[:2]))
    shared_attention(q, *keys[2:], torch.zeros_like(mask))[0].sum().backward()
    assert all((tensor.grad == 0).all() for tensor in (q, *keys[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_with_gradients_are_those_without(dtype):
    """To the last bit, but for scores of bfloat16, which are made in fp32 where they are differentiated."""
    inputs = draw(5, 2, 64, 129, 7, S=2, dtype=dtype)
    expected = bifurcated_attention(*inputs)
    actual = bifurcated_attention(*(tensor.requires_grad_() for tensor in inputs))
    assert actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=0, atol=2**-7 if dtype == torch.bfloat16 else 0)


def test_merging_with_nothing_changes_nothing():
    q, _, _, k, v = draw(3, 2, 64, 1, 15, S=2, dtype=torch.float32)
    something = shared_attention(q, k, v)
    nothing = torch.zeros_like(something[0]), torch.full_like(something[1], -math.inf)
    for merged in (merge_partials([something, nothing]), merge_partials([nothing, something])):
        assert torch.equal(merged[0], something[0]) and torch.equal(merged[1], something[1])
    out, lse = merge_partials([nothing, nothing])
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [1, 15, 64, 127, 128])
def test_splitting_the_keys_anywhere_changes_only_rounding(split, dtype):
    q, _, _, k, v = draw(3, 4, 80, 1, 129, S=1, dtype=dtype)
    parts = [shared_attention(q, k[:, :, part], v[:, :, part]) for part in (slice(split), slice(split, None))]
    expected, expected_lse = oracle(q, k, v)
    out, lse = merge_partials(parts)
    assert_error_at_most_twice(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 1e-5)


def test_merging_is_associative():
    q, _, _, k, v = draw(3, 2, 64, 1, 90, S=1, dtype=torch.float64)
    a, b, c = (shared_attention(q, k[:, :, part], v[:, :, part]) for part in (slice(20), slice(20, 33), slice(33, 90)))
    left, right = merge_partials([merge_partials([a, b]), c]), merge_partials([a, merge_partials([b, c])])
    torch.testing.assert_close(left, right, rtol=0, atol=1e-14)
    torch.testing.assert_close(left[0], merge_partials([a, b, c])[0], rtol=0, atol=1e-14)


def test_several_contexts_are_each_shared_by_consecutive_rows():
    q, _, _, _, _ = draw(6, 2, 64, 1, 1, S=2, dtype=torch.float64)
    _, _, _, k, v = draw(3, 2, 64, 1, 21, S=2, dtype=torch.float64)
    out, _ = shared_attention(q, k, v)
    expected, _ = oracle(q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_do_not_overflow(dtype):
    """Scores beyond the range of float16, and sums over the keys beyond it; oracle: all keys and values are equal."""
    q = k = torch.full((1, 2, 3, 128), 25.0, dtype=dtype)
    out, lse = shared_attention(q, k, k)
    assert (out == 25).all() and lse.isfinite().all()
    out, _ = shared_attention(q * 0, q[:, :, :1].expand(-1, -1, 4096, -1), q[:, :, :1].expand(-1, -1, 4096, -1))
    assert (out == 25).all()


@pytest.mark.parametrize(
    "q,k",
    [
        ((3, 4, 1, 8), (2, 4, 5, 8)),
        ((3, 4, 1, 8), (3, 3, 5, 8)),
        ((3, 4, 1, 8), (3, 4, 5, 16)),
        ((3, 4, 1, 8), (0, 4, 5, 8)),
    ],
    ids=["rows", "heads", "head_dim", "no rows"],
)
def test_shapes_that_do_not_fit_are_named(q, k):
    with pytest.raises(ValueError, match=r"does not fit k \("):
        shared_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k))


def test_a_mask_of_another_form_and_rows_that_do_not_match_are_refused():
    q, k_context, v_context, k_decoded, v_decoded = draw(4, 2, 64, 9, 5, S=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="mask of four dimensions"):
        bifurcated_attention(q, k_context, v_context, k_decoded, v_decoded, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="q has 4 rows and k_decoded 2"):
        bifurcated_attention(q, k_context, v_context, k_decoded[:2], v_decoded[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_product_holds_a_copy_of_the_context_per_row(dtype):
    """Oracle: the operands of every batched product that PyTorch runs; the context's keys enter with one row."""
    seen: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm_.default):
                seen.append(max(operand.numel() for operand in args[-2:]))
            return func(*args, **(kwargs or {}))

    inputs = draw(16, 2, 64, 128, 4, S=1, dtype=dtype)
    with Products():
        bifurcated_attention(*inputs)
    assert seen and max(seen) <= max(inputs[1].numel(), 16 * 4 * 128)  # the context's keys, or all rows' scores


def test_partial_attention_takes_any_batch_shape_of_its_contract():
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    out, lse = partial_attention(q, k, k)
    assert out.shape == (2, 3, 5, 8) and lse.shape == (2, 3, 5, 1)
