"""Types of the compiled module: addresses, sizes and strides are integers; dtype codes are those of limpet._launch."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Sizes = Sequence[int]

def build_info() -> dict[str, Any]: ...
def prefer_huge_pages(address: int, bytes: int, /) -> None: ...
def keep_freed_memory() -> None: ...
def hold_large_blocks(hold: bool, /) -> None: ...

class QuadraticLists:
    def __init__(
        self,
        theta: Sizes,
        grad: Sizes,
        anchor: Sizes,
        importance: Sizes,
        numel: Sizes,
        theta_dtype: Sizes,
        anchor_storage: Sizes,
        importance_storage: Sizes,
        /,
    ) -> None: ...

def quadratic(lists: QuadraticLists, mode: int, factor: float, threads: int, /) -> float: ...
def cuda_quadratic_workspace(lists: QuadraticLists, /) -> int: ...
def cuda_quadratic(
    lists: QuadraticLists,
    mode: int,
    strength: float,
    scalar: int,
    scalar_dtype: int,
    workspace: int,
    device: int,
    stream: int,
    /,
) -> None: ...

class OptimLists:
    def __init__(
        self,
        theta: Sizes,
        grad: Sizes,
        first: Sizes,
        second: Sizes,
        largest: Sizes,
        anchor: Sizes,
        importance: Sizes,
        integral: Sizes,
        step: Sizes,
        numel: Sizes,
        dtype: Sizes,
        anchor_dtype: Sizes,
        importance_dtype: Sizes,
        /,
    ) -> None: ...

def adamw_step(
    lists: OptimLists, shared: Sequence[float], beta1: float, beta2: float, eps: float, threads: int, /
) -> None: ...
def sgd_step(
    lists: OptimLists,
    shared: Sequence[float],
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    threads: int,
    /,
) -> None: ...
def cuda_adamw_step(
    lists: OptimLists,
    shared: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    scalars: Sizes,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_sgd_step(
    lists: OptimLists,
    shared: Sequence[float],
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    scalars: Sizes,
    device: int,
    stream: int,
    /,
) -> None: ...
def linear_workspace(sizes: Sizes, dtype: int, threads: int, /) -> int: ...
def sum_grad_squared_linear(
    total: int,
    output_grad: int,
    input: int,
    sizes: Sizes,
    output_grad_strides: Sizes,
    input_strides: Sizes,
    dtype: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def conv_workspace(
    channels: Sizes,
    output_size: Sizes,
    input_size: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    dtype: int,
    threads: int,
    /,
) -> int: ...
def sum_grad_squared_conv(
    total: int,
    output_grad: int,
    input: int,
    channels: Sizes,
    output_size: Sizes,
    input_size: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    output_grad_strides: Sizes,
    input_strides: Sizes,
    dtype: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...
def conv_input_grad_workspace(
    sizes: Sizes,
    output_size: Sizes,
    input_size: Sizes,
    padding: Sizes,
    stride: int,
    dtype: int,
    threads: int,
    /,
) -> int: ...
def conv_input_grad(
    input_grad: int,
    output_grad: int,
    weight: int,
    workspace: int,
    sizes: Sizes,
    output_size: Sizes,
    input_size: Sizes,
    padding: Sizes,
    stride: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def batch_norm_grads(
    input_grad: int,
    weight_grads: int,
    bias_grads: int,
    output_grad: int,
    input: int,
    mean: int,
    factor: int,
    sizes: Sizes,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def sum_grad_squared_channel(
    total: int,
    output_grad: int,
    input: int,
    shift: int,
    sizes: Sizes,
    output_grad_strides: Sizes,
    input_strides: Sizes,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def sum_grad_squared_embedding(
    total: int,
    output_grad: int,
    indices: int,
    sizes: Sizes,
    padding_idx: int,
    output_grad_strides: Sizes,
    dtype: int,
    threads: int,
    /,
) -> None: ...

class PathIntegralLists:
    def __init__(
        self,
        integral: Sizes,
        previous: Sizes,
        theta: Sizes,
        grad: Sizes,
        anchor: Sizes,
        importance: Sizes,
        numel: Sizes,
        theta_dtype: Sizes,
        anchor_dtype: Sizes,
        importance_dtype: Sizes,
        /,
    ) -> None: ...

def path_integral(lists: PathIntegralLists, strength: float, threads: int, /) -> None: ...
def cuda_path_integral(lists: PathIntegralLists, strength: float, device: int, stream: int, /) -> None: ...
def reservoir_slots(seen: int, count: int, capacity: int, seed: int, slots: int, threads: int) -> None: ...
def reservoir_insert(
    stored: list[int],
    batch: list[int],
    row_bytes: list[int],
    items: int,
    seen: int,
    capacity: int,
    count: int,
    seed: int,
    threads: int,
) -> None: ...
def sample_without_replacement(population: int, count: int, seed: int, draw: int, sample: int) -> None: ...
def gather_rows(
    stored: list[int],
    batch: list[int],
    row_bytes: list[int],
    rows: int,
    index: int,
    count: int,
    threads: int,
) -> None: ...

class PlainSums:  # of tensors
    def __init__(self, exchange: object, tensor: type, /) -> None: ...
    def finite(self, tensor: Tensor, /) -> bool: ...
    def same(self, a: Tensor, b: Tensor, /) -> bool: ...
    def linear(
        self, total: Tensor, bias_total: Tensor | None, output_grad: Tensor, input: Tensor, threads: int, /
    ) -> bool: ...
    def norm(
        self,
        total: Tensor,
        bias_total: Tensor | None,
        output_grad: Tensor,
        input: Tensor,
        mean: Tensor,
        rstd: Tensor,
        threads: int,
        /,
    ) -> bool: ...
    def bias(self, total: Tensor, output_grad: Tensor, channel_dim: int, threads: int, /) -> bool: ...
    def scale(
        self,
        total: Tensor,
        output_grad: Tensor,
        input: Tensor,
        shift: Tensor | None,
        channel_dim: int,
        threads: int,
        /,
    ) -> bool: ...

class PlainRows:  # of tensors
    def __init__(self, exchange: object, tensor: type, container: type, stored: list[Tensor], /) -> None: ...
    def count(self, batch: object, /) -> int: ...
    def insert(self, batch: object, items: Tensor, seen: Tensor, seed: int, threads: int, /) -> int: ...
    def put(self, batch: object, begin: int, count: int, slot: int, threads: int, /) -> None: ...
    def sampled(self, population: int, count: int, seed: int, draw: int, threads: int, /) -> object: ...
    def mixed(
        self, batch: object, fraction: float, population: int, seed: int, draw: int, threads: int, /
    ) -> object | None: ...
    def gathered(self, batch: object, slots: Tensor, threads: int, /) -> object: ...

class KeyedIndex:
    def __init__(self, notes: list[int], capacity: int, /) -> None: ...
    def insert(
        self,
        stored: list[int],
        batch: list[int],
        row_bytes: list[int],
        notes: list[int],
        group: int,
        weight: int,
        seen: int,
        count: int,
        seed: int,
        threads: int,
        /,
    ) -> None: ...
    def choose(self, group: int, weight: int, seen: int, count: int, seed: int, threads: int, /) -> list[list[int]]: ...
    def select(self, places: int, count: int, slots: int, /) -> None: ...

def cuda_reservoir_slots(
    seen: int, count: int, capacity: int, seed: int, slots: int, device: int, stream: int
) -> None: ...
def cuda_reservoir_workspace(count: int) -> int: ...
def cuda_reservoir_insert(
    stored: list[int],
    batch: list[int],
    row_bytes: list[int],
    items: int,
    seen: int,
    capacity: int,
    count: int,
    seed: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_sample_without_replacement(
    population: int, count: int, seed: int, draw: int, sample: int, workspace: int, device: int, stream: int
) -> None: ...
def cuda_gather_rows(
    stored: list[int],
    batch: list[int],
    row_bytes: list[int],
    rows: int,
    index: int,
    count: int,
    device: int,
    stream: int,
) -> None: ...
def gated_lateral(
    y: int, x: int, h: int, product: int, bias: int, sizes: Sizes, dtype: int, threads: int, /
) -> None: ...
def gated_lateral_workspace(sizes: Sizes, /) -> int: ...
def gated_lateral_backward(
    grad: int,
    x: int,
    h: int,
    product: int,
    bias: int,
    sizes: Sizes,
    dtype: int,
    x_grad: int,
    h_grad: int,
    logit_grad: int,
    bias_grad: int,
    workspace: int,
    threads: int,
    /,
) -> None: ...

class EarlierCall:
    def __init__(
        self, func: object, args: tuple[Any, ...], kwargs: dict[str, Any], input: Tensor, record: tuple[Any, ...], /
    ) -> None: ...
    def add_to(self, sums: object, weight_name: str, bias_name: str | None, /) -> None: ...

class CallFilter:
    def __init__(
        self,
        tensor: type,
        classify: Callable[[Any], int],
        apply: Callable[..., Tensor],
        autocasts: Callable[[str], bool],
        alias: Callable[..., Tensor],
        edge: Callable[..., object],
        add: Callable[..., bool],
        /,
    ) -> None: ...

class CallTaker:
    def __init__(
        self,
        filter: CallFilter,
        recorder: object,
        receiver: object,
        names: dict[int, str],
        computed: list[Tensor],
        calls: list[Any],
        given: list[EarlierCall | None],
        seen: dict[Any, int],
        earlier: Sequence[EarlierCall | None],
        anchor: Tensor,
        threads: int,
        /,
    ) -> None: ...
    @property
    def outputs(self) -> list[Any]: ...
    def add(self, output_grads: Sequence[Tensor | None], /) -> None: ...

def take_call(recorder: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any: ...
def leaves(node: object, /) -> list[int]: ...
def standing(model: object, may_be_refused: tuple[type, ...], /) -> list[Any]: ...
