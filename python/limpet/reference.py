"""The specification: every op in plain torch, with the signature it has in :mod:`limpet.ops`.

Tests compare the kernels with these functions in float64, the benches time them beside the kernels, and devices for
which there is no kernel run them. They are written to be read, not to be fast. ``N`` counts samples, ``T`` the places
where a sample uses a weight (tokens, pixels), ``O`` and ``I`` are a weight's rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results are given: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- narrow storage --------------------------------------------------------------------------------------------------
# Formats of importances and anchors in fewer bytes; csrc/math/narrow.h reads them. A packed tensor has one dimension:
# the codes of all elements in row-major order, zeros up to a multiple of 16 bytes, and what remains.

NARROW_BLOCK = 1024  # elements that share a top or a scale
_DEPTH = 4096  # what a code's squared distance from 255 counts, in units of the last place of a float32


def _blocks(values: Tensor) -> Tensor:  # [*] -> [blocks, 1024] float32
    flat = values.flatten().float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % NARROW_BLOCK)).view(-1, NARROW_BLOCK)


def _packed(first: Tensor, second: Tensor) -> Tensor:  # [n], [m] -> [bytes] uint8
    one, two = (part.contiguous().view(torch.uint8) for part in (first, second))
    return torch.cat([one, one.new_zeros(-one.numel() % 16), two])


def _unpacked(packed: Tensor, first_bytes: int) -> tuple[Tensor, Tensor]:  # [bytes] uint8 each
    return packed[:first_bytes].clone(), packed[first_bytes + -first_bytes % 16 :].clone()  # aligned for other dtypes


def _float_of(bits: Tensor) -> Tensor:  # [*] int32 -> [*] float32
    return bits.contiguous().view(torch.float32)


def pack_log8(
    importance: Tensor,  # [*], at least 0
    generator: torch.Generator | None = None,
) -> Tensor:  # [bytes] uint8
    """Eight bits an element: ``bits(value) = bits(top) - 4096 (255 - code)^2`` of float32s; code 0 is 0.

    ``top`` is the block's largest value, cut to bfloat16. Float32's bits are a logarithm in straight pieces, on which
    this rounds to the nearest code; with a generator to either neighbour at random, the nearer the likelier, and so
    does the top. What is below half of the smallest positive code becomes 0.
    """
    values = _blocks(importance.abs())  # no negative zeros
    bits = values.view(torch.int32)
    largest = bits.amax(dim=1, keepdim=True)  # [blocks, 1]
    threshold: Tensor | float = 0.5
    if generator is not None:
        dropped = torch.rand(largest.shape, generator=generator, device=bits.device)
        largest = largest + (dropped * 0x10000).int()
        threshold = torch.rand(bits.shape, generator=generator, device=bits.device)
    top = largest >> 16 << 16
    lowest = (top / _DEPTH).sqrt().floor().clamp(max=254)  # [blocks, 1]; deeper would be below the float 0
    square = (top - bits).clamp(min=0) / _DEPTH
    depth = square.sqrt().floor()
    depth = (depth + ((square - depth * depth) / (2 * depth + 1) > threshold)).minimum(lowest).int()
    decoded = _float_of(top - _DEPTH * depth * depth)
    codes = torch.where((values == 0) | (values < decoded / 2), 0, 255 - depth).to(torch.uint8)
    return _packed(codes.flatten()[: importance.numel()], (top.flatten() >> 16).to(torch.int16))


def unpack_log8(
    packed: Tensor,  # [bytes] uint8
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values of :func:`pack_log8`."""
    codes, tops = _unpacked(packed, math.prod(shape))
    top = tops.view(torch.int16).int().repeat_interleave(NARROW_BLOCK)[: codes.numel()] << 16
    depth = 255 - codes.int()
    return _float_of(torch.where(codes > 0, top - _DEPTH * depth * depth, 0)).view(list(shape))


def pack_fixed16(
    anchor: Tensor,  # [*]
) -> Tensor:  # [bytes / 2] int16
    """Sixteen bits an element: an integer times ``scale``, the block's largest magnitude / 32767 as a bfloat16.

    The product of 15 and 8 bits is exact in float32. The scale is rounded up.
    """
    values = _blocks(anchor)
    largest = values.abs().amax(dim=1, keepdim=True)
    scale = _float_of(((largest * (1 / 32767)).view(torch.int32) + 0xFFFF) >> 16 << 16)  # [blocks, 1]
    codes = torch.where(scale > 0, values / scale, 0.0).round().clamp(-32767, 32767).to(torch.int16)
    scales = (scale.flatten().view(torch.int32) >> 16).to(torch.int16)
    return _packed(codes.flatten()[: anchor.numel()], scales).view(torch.int16)


def unpack_fixed16(
    packed: Tensor,  # [bytes / 2] int16
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values of :func:`pack_fixed16`."""
    codes, scales = (part.view(torch.int16) for part in _unpacked(packed.view(torch.uint8), 2 * math.prod(shape)))
    scale = _float_of(scales.int() << 16).repeat_interleave(NARROW_BLOCK)[: codes.numel()]
    return (codes.float() * scale).view(list(shape))


def pack_split24(
    anchor: Tensor,  # [*]
) -> Tensor:  # [bytes] uint8
    """Twenty-four bits an element: a float32 rounded to its upper 24, as a bfloat16 and 8 more bits of mantissa."""
    bits = anchor.flatten().float().view(torch.int32)
    rounded = (bits + 0x7F + (bits >> 8 & 1)) >> 8  # to nearest even
    return _packed((rounded >> 8).to(torch.int16), (rounded & 0xFF).to(torch.uint8))


def unpack_split24(
    packed: Tensor,  # [bytes] uint8
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values of :func:`pack_split24`."""
    high, low = _unpacked(packed, 2 * math.prod(shape))
    return _float_of(high.view(torch.int16).int() << 16 | low.int() << 8).view(list(shape))


def dense_importance(stored: Tensor, like: Tensor) -> Tensor:  # [*] or packed -> [*]
    """The values of an importance, however it is stored, in the dtype that results for ``like`` are given in."""
    values = unpack_log8(stored, like.shape) if stored.dtype == torch.uint8 else stored
    return values.to(wide(like.dtype))


def dense_anchor(stored: Tensor, like: Tensor) -> Tensor:  # [*] or packed -> [*]
    """The values of an anchor, however it is stored, in the dtype that results for ``like`` are given in."""
    if stored.dtype == torch.int16:
        stored = unpack_fixed16(stored, like.shape)
    elif stored.dtype == torch.uint8:
        stored = unpack_split24(stored, like.shape)
    return stored.to(wide(like.dtype))


# --- quadratic -------------------------------------------------------------------------------------------------------


def quadratic_penalty(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """``strength / 2 * sum_i F_i (theta_i - anchor_i)^2`` (Kirkpatrick et al. 2017, eq. 3), summed in float64."""
    if not params:
        return torch.zeros((), dtype=torch.float32)
    value = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for theta, anchor, importance in zip(params, anchors, importances, strict=True):
        dtype = wide(theta.dtype)
        difference = theta.to(dtype) - dense_anchor(anchor, theta)
        value = value + (dense_importance(importance, theta) * difference.square()).sum(dtype=torch.float64)
    return (0.5 * strength * value).to(wide(params[0].dtype))


def quadratic_penalty_grad(
    params: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
    scale: Tensor,  # []
) -> list[Tensor]:  # [*] each
    """The penalty's gradient ``scale * strength * F_i (theta_i - anchor_i)``, in each parameter's dtype."""
    grads = []
    for theta, anchor, importance in zip(params, anchors, importances, strict=True):
        dtype = wide(theta.dtype)
        difference = theta.to(dtype) - dense_anchor(anchor, theta)
        grads.append((scale.to(dtype) * strength * dense_importance(importance, theta) * difference).to(theta.dtype))
    return grads


def add_quadratic_penalty_grad_(
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each, added to in place
    anchors: Sequence[Tensor],  # [*] or packed, each
    importances: Sequence[Tensor],  # [*] or packed, each
    strength: float,
) -> Tensor:  # []
    """Add the penalty's gradient to ``grads`` and return the penalty."""
    for theta, grad, anchor, importance in zip(params, grads, anchors, importances, strict=True):
        dtype = wide(theta.dtype)
        difference = theta.to(dtype) - dense_anchor(anchor, theta)
        grad.copy_(grad.to(dtype) + strength * dense_importance(importance, theta) * difference)
    return quadratic_penalty(params, anchors, importances, strength)


# --- path integral ---------------------------------------------------------------------------------------------------


def path_integral_update_(
    integrals: Sequence[Tensor],  # [*] each, added to in place
    previous: Sequence[Tensor],  # [*] each, becomes params
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
) -> None:
    """One step's share ``-(g - strength * F (theta_before - anchor)) (theta - theta_before)`` of each path integral.

    (Zenke et al. 2017, eq. 3; ``g`` holds the gradient of the penalty ``strength / 2 * sum F (theta - anchor)^2``
    too, which is taken out.) What did not move adds nothing, whatever its gradient is.
    """
    for k, (integral, before, theta, grad) in enumerate(zip(integrals, previous, params, grads, strict=True)):
        dtype = wide(theta.dtype)
        g, old = grad.to(dtype), before.to(dtype)
        if anchors:
            g = g - strength * importances[k].to(dtype) * (old - anchors[k].to(dtype))
        moved = theta.to(dtype) - old
        integral.copy_(integral.to(dtype) - torch.where(moved == 0, 0.0, g * moved))
        before.copy_(theta)


# --- optimizers ------------------------------------------------------------------------------------------------------


def adamw_step_(
    params: Sequence[Tensor],  # [*] each, changed in place
    grads: Sequence[Tensor],  # [*] each
    exp_avgs: Sequence[Tensor],  # [*] each, changed in place
    exp_avg_sqs: Sequence[Tensor],  # [*] each, changed in place
    max_exp_avg_sqs: Sequence[Tensor],  # [*] each, changed in place; or none at all: AMSGrad
    steps: Sequence[Tensor],  # [] each, raised by 1
    integrals: Sequence[Tensor],  # [*] each, added to in place; or none at all
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
    lr: Tensor,  # []
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,  # []
    found_inf: Tensor | None,  # []
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) on the task's loss and a quadratic penalty, as torch counts it."""
    if found_inf is not None and found_inf.item():
        return
    for k, theta in enumerate(params):
        before, task_grad, grad = _grads(k, theta, grads, anchors, importances, strength, maximize, grad_scale)
        steps[k].add_(1)
        t = steps[k].double()
        first = exp_avgs[k].to(before.dtype).lerp(grad, 1 - beta1)
        second = exp_avg_sqs[k].to(before.dtype) * beta2 + (1 - beta2) * grad * grad
        largest = second
        if max_exp_avg_sqs:
            largest = torch.maximum(max_exp_avg_sqs[k].to(before.dtype), second)
            max_exp_avg_sqs[k].copy_(largest)
        exp_avgs[k].copy_(first)
        exp_avg_sqs[k].copy_(second)
        denominator = largest.sqrt() / (1 - beta2**t).sqrt() + eps
        theta.copy_(before * (1 - lr * weight_decay) - lr / (1 - beta1**t) * first / denominator)
        if integrals:
            _add_path(integrals[k], task_grad, before, theta)


def sgd_step_(
    params: Sequence[Tensor],  # [*] each, changed in place
    grads: Sequence[Tensor],  # [*] each
    momentum_buffers: Sequence[Tensor],  # [*] each, changed in place; or none at all
    integrals: Sequence[Tensor],  # [*] each, added to in place; or none at all
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
    lr: Tensor,  # []
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,  # []
    found_inf: Tensor | None,  # []
) -> None:
    """One step of SGD on the task's loss and a quadratic penalty, as torch counts it.

    On the ``first_step`` the momentum becomes the gradient, whatever its buffer held.
    """
    if found_inf is not None and found_inf.item():
        return
    for k, theta in enumerate(params):
        before, task_grad, grad = _grads(k, theta, grads, anchors, importances, strength, maximize, grad_scale)
        grad = grad + weight_decay * before
        if momentum_buffers:
            buffer = momentum_buffers[k].to(before.dtype)
            buffer = grad if first_step else momentum * buffer + (1 - dampening) * grad
            momentum_buffers[k].copy_(buffer)
            grad = grad + momentum * buffer if nesterov else buffer
        theta.copy_(before - lr * grad)
        if integrals:
            _add_path(integrals[k], task_grad, before, theta)


def _grads(
    k: int,
    theta: Tensor,  # [*]
    grads: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
    maximize: bool,
    grad_scale: Tensor | None,  # []
) -> tuple[Tensor, Tensor, Tensor]:  # [*] each
    """The parameter before the step, the gradient of the task's loss, and that of the loss with the penalty.

    What is maximized is minus a loss: its gradient changes sign, and the penalty still pulls to the anchor.
    """
    before = theta.to(wide(theta.dtype), copy=True)
    task_grad = grads[k].to(before.dtype)
    if grad_scale is not None:
        task_grad = task_grad / grad_scale
    if maximize:
        task_grad = -task_grad
    if not anchors:
        return before, task_grad, task_grad
    pull = strength * importances[k].to(before.dtype) * (before - anchors[k].to(before.dtype))
    return before, task_grad, task_grad + pull


def _add_path(integral: Tensor, task_grad: Tensor, before: Tensor, theta: Tensor) -> None:  # [*] each
    moved = theta.to(before.dtype) - before
    integral.sub_(torch.where(moved == 0, 0.0, task_grad * moved))


# --- fisher ----------------------------------------------------------------------------------------------------------


def sum_grad_squared_linear(
    output_grad: Tensor,  # [N, *, O]
    input: Tensor,  # [N, *, I]
) -> Tensor:  # [O, I]
    """``sum_n (sum_t d[n,t,:] a[n,t,:]^T)^2`` for a weight used as ``y = x W^T``."""
    samples, rows, columns = output_grad.shape[0], output_grad.shape[-1], input.shape[-1]
    dtype = wide(output_grad.dtype)
    total = output_grad.new_zeros((rows, columns), dtype=dtype)
    for n in range(samples):
        d = output_grad[n].flatten(0, -2).to(dtype) if output_grad.dim() > 2 else output_grad[n : n + 1].to(dtype)
        a = input[n].flatten(0, -2).to(dtype) if input.dim() > 2 else input[n : n + 1].to(dtype)
        total += (d.T @ a).square()
    return total


def sum_grad_squared_conv(
    output_grad: Tensor,  # [N, O, *spatial_out]
    input: Tensor,  # [N, C, *spatial_in]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # [O, C / groups, *kernel_size]
    """The sum over samples of the squared weight gradient of a convolution in 1, 2 or 3 dimensions."""
    dtype = wide(output_grad.dtype)
    shape = (output_grad.shape[1], input.shape[1] // groups, *kernel_size)
    total = output_grad.new_zeros(shape, dtype=dtype)
    if output_grad.numel() == 0 or total.numel() == 0:
        return total
    for n in range(output_grad.shape[0]):
        d, x = output_grad[n : n + 1].to(dtype), input[n : n + 1].to(dtype)
        grad = torch.ops.aten.convolution_backward(
            d,
            x,
            total,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [False, True, False],
        )[1]
        total += grad.square()
    return total


def sum_grad_squared_bias(
    output_grad: Tensor,  # [N, A, C, B]
) -> Tensor:  # [C]
    """``sum_n (sum_{a,b} d[n,a,:,b])^2`` for a bias added along the third dimension."""
    return output_grad.to(wide(output_grad.dtype)).sum(dim=(1, 3)).square().sum(dim=0)


def sum_grad_squared_scale(
    output_grad: Tensor,  # [N, A, C, B]
    input: Tensor,  # [N, A, C, B]
    shift: Tensor | None = None,  # [C], the result's dtype
) -> Tensor:  # [C]
    """``sum_n (sum_{a,b} d[n,a,:,b] (x[n,a,:,b] - shift))^2`` for a factor multiplied along the third dimension."""
    dtype = wide(output_grad.dtype)
    x = input.to(dtype) if shift is None else input.to(dtype) - shift.view(-1, 1)
    return (output_grad.to(dtype) * x).sum(dim=(1, 3)).square().sum(dim=0)


def sum_grad_squared_embedding(
    output_grad: Tensor,  # [N, T, E]
    indices: Tensor,  # [N, T], int64
    num_embeddings: int,
    padding_idx: int = -1,
) -> Tensor:  # [num_embeddings, E]
    """``sum_n (sum_{t: indices[n,t] = v} d[n,t,:])^2`` for each row ``v``; zero for ``padding_idx``."""
    dtype = wide(output_grad.dtype)
    total = output_grad.new_zeros((num_embeddings, output_grad.shape[-1]), dtype=dtype)
    for n in range(output_grad.shape[0]):
        total += torch.zeros_like(total).index_add_(0, indices[n], output_grad[n].to(dtype)).square()
    if padding_idx >= 0:
        total[padding_idx] = 0
    return total


# --- random numbers --------------------------------------------------------------------------------------------------

_WORD = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: Tensor,  # [*, 4], int64, each word below 2^32
    key: tuple[int, int],  # each word below 2^32
) -> Tensor:  # [*, 4], int64, each word below 2^32
    """Philox 4x32-10, the counter-based generator of Salmon et al. (2011): four random words for each counter."""
    a, b, c, d = counter.unbind(-1)
    first, second = key
    for _ in range(10):
        (a_high, a_low), (c_high, c_low) = _product(a, _FACTORS[0]), _product(c, _FACTORS[1])
        a, b, c, d = c_high ^ b ^ first, c_low, a_high ^ d ^ second, a_low
        first, second = (first + _WEYL[0]) & _WORD, (second + _WEYL[1]) & _WORD
    return torch.stack([a, b, c, d], dim=-1)


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product."""
    high, low = word * (factor >> 16), word * (factor & 0xFFFF)  # 48 bits; the whole product would overflow
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _WORD


# --- reservoir -------------------------------------------------------------------------------------------------------

_RESERVOIR, _SAMPLE, _KEY = 1, 2, 3  # what a draw is for, so that those of one seed are independent


def _bounded(
    ranges: Tensor,  # int64 [n], each in [1, 2^63)
    second: Tensor,  # bool [n], whether a draw takes the second half of its block
    counter: Tensor,  # int64 [n, 4], of its block
    seed: int,
) -> Tensor:  # int64 [n]
    """Uniform integers in [0, range): 2^63 values cut into ``range`` equal runs, what is left over drawn again."""
    key, largest = (seed & _WORD, seed >> 32), 2**63 - 1
    result = torch.where(ranges == 1, 0, -1)  # its one run of 2^63 values is more than int64 holds
    runs = torch.div(largest - (ranges - 1), ranges, rounding_mode="floor") + 1
    attempt = 0
    while (missing := result < 0).any():
        words = philox(counter[missing] + counter.new_tensor([0, 0, 0, attempt]), key)
        high, low = torch.where(second[missing, None], words[:, 2:], words[:, :2]).unbind(1)
        values = torch.div((high << 31) | (low >> 1), runs[missing], rounding_mode="floor")
        result[missing] = torch.where(values < ranges[missing], values, -1)
        attempt += 1
    return result


def reservoir_slots_(
    slots: Tensor,  # int64 [count], written
    seen: int,
    capacity: int,
    seed: int,
) -> None:
    """Algorithm R (Vitter 1985): item t goes to slot t while there are free ones, then to a uniform u in {0..t} if that
    is a slot (u < capacity), else nowhere (-1). The draw depends on (seed, t) alone.
    """
    items = seen + torch.arange(slots.numel(), device=slots.device)
    pairs = items >> 1
    counter = torch.stack([pairs & _WORD, pairs >> 32, 0 * pairs, 0 * pairs + (_RESERVOIR << 16)], dim=1)
    drawn = _bounded(items + 1, items % 2 == 1, counter, seed)
    slots.copy_(torch.where(items < capacity, items, torch.where(drawn < capacity, drawn, -1)))


def reservoir_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each, written
    items: Tensor,  # int64 [capacity], the number of the item in each slot or -1, written
    seen: Tensor,  # int64 [], raised by count
    batch: Sequence[Tensor],  # [count, *] each
    seed: int,
) -> None:
    """Give each item of the batch its slot; of those that get the same, the last one stays."""
    count = batch[0].shape[0]
    numbers = seen + torch.arange(count, device=items.device)
    slots = torch.empty_like(numbers)
    reservoir_slots_(slots, int(seen), items.numel(), seed)
    kept = slots >= 0
    items.scatter_reduce_(0, slots[kept], numbers[kept], "amax")
    kept[kept.clone()] = items[slots[kept]] == numbers[kept]
    for rows, new in zip(stored, batch, strict=True):
        rows[slots[kept]] = new[kept]
    seen += count


def sample_without_replacement_(
    sample: Tensor,  # int64 [count], written
    population: int,
    seed: int,
    draw: int,
) -> None:
    """The first places of a Fisher-Yates shuffle of [0, population); step i depends on (seed, draw, i) alone."""
    steps = torch.arange(sample.numel())
    pairs = steps >> 1
    counter = torch.stack(
        [0 * pairs + (draw & _WORD), 0 * pairs + (draw >> 32), pairs, 0 * pairs + (_SAMPLE << 16)], dim=1
    )
    targets = (steps + _bounded(population - steps, steps % 2 == 1, counter, seed)).tolist()
    moved: dict[int, int] = {}
    values = []
    for step, target in enumerate(targets):
        values.append(moved.get(target, target))
        moved[target] = moved.get(step, step)
    sample.copy_(torch.tensor(values, dtype=torch.int64))


def gather_rows_(
    rows: Sequence[Tensor],  # [count, *] each, written
    stored: Sequence[Tensor],  # [capacity, *] each
    index: Tensor,  # int64 [count]
) -> None:
    """Rows of every field by their places."""
    for out, field in zip(rows, stored, strict=True):
        out.copy_(field[index])


# --- keyed reservoir -------------------------------------------------------------------------------------------------
# Sorts of fixed size, and nothing that waits for the device: this is what runs on GPUs, too.

_ONE, _ROOT_HALF, _FRACTION, _INFINITY = 0x3FF0 << 48, 0x3FE6A09E667F3BCD, (1 << 52) - 1, 0x7FF0 << 48
_LN2 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)  # of FreeBSD's log


def _exponential(bits: Tensor) -> Tensor:  # int64 [n], 63 bits -> float64 [n]
    """``-log(1 - bits / 2^63)`` from operations that round in one way on every device, so not torch's own logarithm."""
    rest = ((2**63 - 1 - bits).double() + 1.0) * 2.0**-63
    shifted = rest.view(torch.int64) + (_ONE - _ROOT_HALF)
    mantissa = ((shifted & _FRACTION) + _ROOT_HALF).view(torch.float64)
    small = bits < 2**61
    f = torch.where(small, bits.double() * -(2.0**-63), mantissa - 1.0)
    exponent = torch.where(small, 0, (shifted >> 52) - 1023).double()
    half_square, s = 0.5 * f * f, f / (2.0 + f)
    z = s * s
    w = z * z
    odd = z * (_LOG[0] + w * (_LOG[2] + w * (_LOG[4] + w * _LOG[6])))
    even = w * (_LOG[1] + w * (_LOG[3] + w * _LOG[5]))
    log = s * (half_square + (even + odd)) + exponent * _LN2[1] - half_square + f + exponent * _LN2[0]
    return 0.0 - log


def _item_keys(
    items: Tensor,  # int64 [n]
    weight: Tensor | None,  # float64 [n]
    seed: int,
) -> Tensor:  # int64 [n]
    """63 random bits of each item, or the bits of an exponential of rate ``weight``, which are ordered as it is.

    An item of weight 0 comes behind all others, as in the limit of ever smaller weights.
    """
    pairs = items >> 1
    counter = torch.stack([pairs & _WORD, pairs >> 32, 0 * pairs, 0 * pairs + (_KEY << 16)], dim=1)
    words = philox(counter, (seed & _WORD, seed >> 32))
    high, low = torch.where((items % 2 == 1).unsqueeze(1), words[:, 2:], words[:, :2]).unbind(1)
    bits = (high << 31) | (low >> 1)
    if weight is None:
        return bits
    keys = (_exponential(bits) / weight).view(torch.int64)
    return torch.where(weight > 0, keys, _INFINITY + (bits >> 11))


def keyed_order(
    items: Tensor,  # int64 [n], -1 where there is none
    keys: Tensor,  # int64 [n]
    groups: Tensor,  # int64 [n]
) -> Tensor:  # int64 [n]
    """Places of the items ordered by their rank within their group (by key, then number), then by the group's value.

    A keyed reservoir holds the first ones. So every group has as many rows as the others, or all of its items where
    they are fewer; and of each group those with the smallest keys.
    """
    order = items.argsort(stable=True)
    for note in (keys, groups, (items < 0).long()):
        order = order[note[order].argsort(stable=True)]
    place, group = torch.arange(order.numel(), device=order.device), groups[order]
    first = torch.where(group[1:] != group[:-1], place[1:], 0).cummax(0).values  # where each row's group begins
    rank = place - torch.cat([place[:1], first])
    return order[torch.where(items[order] < 0, order.numel(), rank).argsort(stable=True)]


def keyed_insert_(
    stored: Sequence[Tensor],  # [capacity, *] each, written
    items: Tensor,  # int64 [capacity], the number of the item in each slot or -1, written
    keys: Tensor,  # int64 [capacity], written
    groups: Tensor,  # int64 [capacity], written
    seen: Tensor,  # int64 [], raised by count
    batch: Sequence[Tensor],  # [count, *] each
    group: Tensor | None,  # int64 [count]
    weight: Tensor | None,  # float64 [count]
    seed: int,
) -> None:
    """Of the items held and those of the batch, hold the first ones of :func:`keyed_order`.

    What is held already stays in its slot; new items take the slots that become free in their order.
    """
    count, capacity = batch[0].shape[0], items.numel()
    if count == 0:
        return
    numbers = seen + torch.arange(count, device=items.device)
    notes = numbers, _item_keys(numbers, weight, seed), torch.zeros_like(numbers) if group is None else group
    order = keyed_order(*(torch.cat(pair) for pair in zip((items, keys, groups), notes, strict=True)))
    kept = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:capacity], True)
    some = min(count, capacity)
    slots = (kept[:capacity] & (items >= 0)).long().argsort(stable=True)[:some]  # those that are free first
    rows = (~kept[capacity:]).long().argsort(stable=True)[:some]  # those that come first
    comes = kept[capacity:][rows]
    for old, new in zip((items, keys, groups, *stored), (*notes, *batch), strict=True):
        old[slots] = torch.where(comes.view(-1, *(1,) * (old.dim() - 1)), new[rows], old[slots])
    seen += count
