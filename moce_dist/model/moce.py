"""Experts in a transformer block, and the dispatcher for one process, the readable reference.

The gate decides (gate.py), a dispatcher moves images to experts and back, and the experts compute.
Whole images move: all tokens of an image go to one expert.

    images at home (B, N, D)  --dispatch-->  parts: rows by local expert (M, N, D), and counts (E,)
    outputs of the parts      --combine-->   outputs in the order of the images (B, N, D)

`LocalDispatcher` sorts within one process and yields one part, M = B. The distributed dispatcher in
parallel/exchange.py yields the images that stay and, when any travel, those that arrive.

Letters: B images, N tokens, D width, H hidden width, L MoE layers, E experts held here.

With `moe.shared_base`, the weights of expert e are W + O_e: a base W that every image trains, plus
an offset O_e that starts at 0 and that only the expert's own images train. The matrix products are
as large as without a base.

Source: Liu et al. 2023, arXiv 2402.05382; expert initialisation as copies of the dense MLP:
Komatsuzaki et al. 2023, arXiv 2212.05055.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moce_dist.model.vit import DenseBlock, Mlp, add_together, autocast_dtype, cast_together

_STACKED = re.compile(r"(blocks\.(\d+)\.mlp\.experts)\.(fc[12]\.(?:weight|bias))")
_GROUPED_CAPABILITY = 9
"""Compute capability (H100, H200) at which torch's grouped product is one kernel."""
# in DeepSpeed's own MoE layer, the baseline of parallel/token.py, every expert is a module
_SINGLE = re.compile(
    r"(blocks\.(\d+)\.mlp)\.moe\..*deepspeed_experts\.(\d+)\.(fc[12]\.(?:weight|bias))"
)
Weights = tuple[Tensor, ...]
"""Stacked (E, ...) parameters of a layer: fc1.weight, fc1.bias, fc2.weight and fc2.bias."""


class Part(NamedTuple):
    """Images for the local experts."""

    rows: Tensor
    """(M, N, D), sorted by local expert."""
    counts: list[int]
    """Rows of each local expert, (E,)."""
    ends: Tensor | None = None
    """(E,) int32, beside the rows: the end of each expert's tokens among all M N; None: unknown."""


class Dispatcher(Protocol):
    """Moves the images of a micro-batch to their experts and back; knows all routes beforehand."""

    def dispatch(self, x: Tensor, layer: int) -> Iterator[Part]:
        """Send images (B, N, D) to the layer's experts; yield parts as they are ready."""
        ...

    def combine(self, outputs: Sequence[Tensor], layer: int) -> Tensor:
        """Bring the experts' outputs, one per part, home: (B, N, D) in the order of the images."""
        ...


class LocalDispatcher:
    """All experts in this process: `dispatch` sorts the images by expert, `combine` undoes it."""

    def __init__(self, experts: Tensor, num_experts: int) -> None:
        """Prepare from `experts` (L, B) int64, the expert of every image in every MoE layer."""
        self._order = experts.argsort(dim=1, stable=True)
        self._counts = [row.bincount(minlength=num_experts).tolist() for row in experts]

    def dispatch(self, x: Tensor, layer: int) -> Iterator[Part]:
        """Sort images (B, N, D) by their expert; see `Dispatcher`."""
        yield Part(x[self._order[layer]], self._counts[layer])

    def combine(self, outputs: Sequence[Tensor], layer: int) -> Tensor:
        """Undo the sorting of `dispatch`; see `Dispatcher`."""
        (y,) = outputs
        return y[self._order[layer].argsort()]


class _StackedLinear(nn.Module):
    """Weights of one linear layer of all local experts: weight (E, out, in), bias (E, out)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features))
        for weight in self.weight.data:
            nn.init.xavier_uniform_(weight)


def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


class Experts(nn.Module):
    """The local experts of one layer, each timm's MLP; parameters are stacked over the experts.

    Every expert is called, even with zero rows. So its parameters always have a gradient, and all
    ranks run the same backward pass in the same order.
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = _StackedLinear(num_experts, width, hidden)
        self.fc2 = _StackedLinear(num_experts, hidden, width)

    def cast(self, x: Tensor) -> Weights:
        """Return the parameters in the type of the products for tokens `x`, by one cast."""
        dtype = autocast_dtype(x)
        return tuple(p.to(dtype) for p in cast_together(x, self.fc1, self.fc2))

    def forward(
        self, rows: Tensor, counts: Sequence[int], weights: Weights, ends: Tensor | None = None
    ) -> Tensor:
        """Apply expert e to its `counts[e]` rows; rows (M, N, D) sorted by expert.

        `weights` are the experts' parameters, stacked, in the type of the products; for `ends` see
        `Part`.
        """
        rows = rows.to(weights[0].dtype)
        if is_groupable(rows, counts):
            return self.grouped(rows, counts, weights, ends)
        return self.one_by_one(rows, counts, weights)

    def one_by_one(self, rows: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
        """Compute `forward` with one matrix product per expert and linear layer."""
        if len(counts) == 1:
            return _mlp(rows, *(w.squeeze(0) for w in weights))
        # unbind, not indexing: its backward writes every expert's gradient once into one tensor
        parts = torch.split(rows, list(counts))
        stacks = zip(parts, *(w.unbind() for w in weights), strict=True)
        return torch.cat([_mlp(*stack) for stack in stacks])

    def grouped(
        self, rows: Tensor, counts: Sequence[int], weights: Weights, ends: Tensor | None = None
    ) -> Tensor:
        """Compute `forward` with one grouped matrix product per linear layer."""
        weight1, bias1, weight2, bias2 = weights
        sizes = [count * rows.shape[1] for count in counts]
        if ends is None:
            ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32).to(rows.device)

        def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            parts = torch.split(F.grouped_mm(x, weight.mT, offs=ends), sizes)
            biases = bias.unbind()
            return torch.cat([part + b for part, b in zip(parts, biases, strict=True)])

        hidden = F.gelu(product(rows.flatten(0, 1), weight1, bias1))
        return product(hidden, weight2, bias2).view(rows.shape)


def is_groupable(rows: Tensor, counts: Sequence[int]) -> bool:
    """Tell whether one grouped product is correct and fast for rows (M, N, D) of these counts.

    A single expert needs none.
    Below capability 9 torch falls back to a loop that synchronises with the device at every group.
    On newer GPUs groups without rows gave wrong gradients (pytorch issue 172439).
    """
    return (
        rows.is_cuda
        and len(counts) > 1
        and rows.dtype is torch.bfloat16
        and rows.shape[2] % 8 == 0
        and min(counts) > 0
        and torch.cuda.get_device_capability(rows.device)[0] == _GROUPED_CAPABILITY
    )


class MoceMlp(nn.Module):
    """The experts of one layer, in place of the dense block's MLP.

    Of the 4 D hidden units that an image uses, `shared_units` belong to no expert and the others to
    its expert, so the FLOPs per image equal those of the dense MLP.
    """

    def __init__(
        self, num_experts: int, width: int, *, shared_units: int = 0, has_base: bool = False
    ) -> None:
        super().__init__()
        hidden = 4 * width - shared_units
        self.experts = Experts(num_experts, width, hidden)
        # the experts have the output bias
        self.shared = Mlp(width, shared_units, bias=False) if shared_units else None
        # only its weights are used: the experts' offsets are added to them
        self.base = Mlp(width, hidden) if has_base else None

    def weights(self, x: Tensor) -> Weights:
        """Return the experts' weights in the type of the products for tokens `x`, base included."""
        if self.base is None:
            return self.experts.cast(x)
        return add_together(x, self.experts, self.base)


class MoceBlock(nn.Module):
    """A transformer block whose MLP is chosen per image."""

    def __init__(
        self,
        block: DenseBlock,
        num_local_experts: int,
        layer: int,
        *,
        shared_units: int = 0,
        has_base: bool = False,
    ) -> None:
        """Take over attention and norms of a dense `block`; `layer` counts MoE layers from 0."""
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.layer = layer
        width = block.norm1.normalized_shape[0]
        self.mlp = MoceMlp(num_local_experts, width, shared_units=shared_units, has_base=has_base)

    def forward(self, x: Tensor, dispatcher: Dispatcher, scales: Sequence[Tensor]) -> Tensor:
        """Transform tokens (B, N, D); `scales` (L, B) weights the experts' outputs."""
        x = x + self.attn(self.norm1(x))
        normed = self.norm2(x)
        parts = dispatcher.dispatch(normed, self.layer)
        weights = self.mlp.weights(normed)
        # one part after the other: the experts compute on one while the next still travels
        outputs = [self.mlp.experts(rows, counts, weights, ends) for rows, counts, ends in parts]
        y = dispatcher.combine(outputs, self.layer)
        y = y * scales[self.layer][:, None, None]
        return x + y if self.mlp.shared is None else x + y + self.mlp.shared(normed)


def experts_from_dense(
    weights: Mapping[str, Tensor],
    layers: Sequence[int],
    num_experts: int,
    *,
    shared_units: int = 0,
    has_base: bool = False,
) -> dict[str, Tensor]:
    """Replace the MLPs of `layers` by `num_experts` equal ones, under global expert names.

    The first `shared_units` hidden units become the layer's shared ones. With `has_base` the rest
    is the base, and the experts are offsets of 0. An expert, its base and the shared units together
    compute what the dense MLP computes.

    The experts of a layer are one tensor under many names, and views of `weights`: copy them before
    writing to them. A process that holds few of the experts would not have room for all.
    """
    result = {}
    for name, tensor in weights.items():
        found = re.fullmatch(r"blocks\.(\d+)\.mlp\.(fc[12]\.(?:weight|bias))", name)
        if not found or int(found[1]) not in layers:
            result[name] = tensor
            continue
        stem, part, hidden = f"blocks.{found[1]}.mlp", found[2], hidden_axis(found[2])
        routed = tensor
        if hidden is not None and shared_units:
            sizes = [shared_units, tensor.shape[hidden] - shared_units]
            result[f"{stem}.shared.{part}"], routed = torch.split(tensor, sizes, dim=hidden)
        if has_base:
            result[f"{stem}.base.{part}"], routed = routed, torch.zeros_like(routed)
        for expert in range(num_experts):
            result[f"{stem}.experts.{expert}.{part}"] = routed
    return result


def hidden_axis(part: str) -> int | None:
    """Return the axis of an MLP's parameter that counts hidden units; None for the output bias."""
    return {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1, "fc2.bias": None}[part]


def is_stacked(name: str) -> bool:
    """Tell whether a parameter of the model holds stacked local experts."""
    return _STACKED.fullmatch(name) is not None


def is_expert(name: str) -> bool:
    """Tell whether a parameter belongs to experts, stacked or single."""
    return is_stacked(name) or _SINGLE.fullmatch(name) is not None


def global_names(name: str, layers: Sequence[int], residents: Sequence[Sequence[int]]) -> list[str]:
    """Return the global names, valid on all ranks, of the experts in an expert parameter.

    There is one name per expert in it. `residents[i]` are the ids of the experts held here in MoE
    layer i, in the order of their slots.
    """
    if found := _STACKED.fullmatch(name):
        experts = residents[layers.index(int(found[2]))]
        return [f"{found[1]}.{expert}.{found[3]}" for expert in experts]
    found = _SINGLE.fullmatch(name)
    assert found is not None, name
    expert = residents[layers.index(int(found[2]))][int(found[3])]
    return [f"{found[1]}.experts.{expert}.{found[4]}"]
