"""Modules of our own that torch has not, or has in a form that is hard to write down. Each computes and emits itself.

Imports torch: only the functions that build a net may import this file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as f

from modelworks.ml.base import Block
from modelworks.ml.nets.emit import Emitter

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU, "leaky-relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid,
}  # fmt: skip


class Residual(nn.Module):
    """x + body(x), or shortcut(x) + body(x); then ReLU."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return f.relu(self.shortcut(x) + self.body(x))

    def emit(self, e: Emitter, x: str) -> str:
        return e.op("Relu", e.op("Add", e.module(self.shortcut, x), e.module(self.body, x)))


class Shift(nn.Module):
    """In training, each image is moved by up to `most` pixels, with zeros behind it; else nothing."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.most:
            return x
        n, _, height, width = x.shape
        moves = torch.randint(0, 2 * self.most + 1, (2, n), device=x.device)
        wide = f.pad(x, (self.most,) * 4)
        rows = (moves[0][:, None] + torch.arange(height, device=x.device))[:, None, :, None]
        columns = (moves[1][:, None] + torch.arange(width, device=x.device))[:, None, None, :]
        index = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
        return wide[index, channel, rows, columns]

    def emit(self, e: Emitter, x: str) -> str:
        return x


class Standardise(nn.Module):
    """Rows [n, d] with each place at mean 0 and deviation 1, by figures that do not change."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        super().__init__()
        self.factor: torch.Tensor
        self.offset: torch.Tensor
        scale = np.where(deviation > 1e-8, deviation, 1.0)
        self.register_buffer("factor", torch.from_numpy((1 / scale).astype(np.float32)))
        self.register_buffer("offset", torch.from_numpy((-mean / scale).astype(np.float32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.offset

    def emit(self, e: Emitter, x: str) -> str:
        return e.op("Add", e.op("Mul", x, e.constant(self.factor)), e.constant(self.offset))


class Reconstruction(nn.Module):
    """Each row's mean squared error when it is said again through the middle: [n, f] -> [n, 1]."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, noise: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.noise = encoder, decoder, noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x + self.noise * torch.randn_like(x) if self.training and self.noise else x
        return ((self.decoder(self.encoder(given)) - x) ** 2).mean(dim=1, keepdim=True)

    def emit(self, e: Emitter, x: str) -> str:
        away = e.op("Sub", e.module(self.decoder, e.module(self.encoder, x)), x)
        return e.op("ReduceMean", e.op("Mul", away, away), e.constant(np.array([1], dtype=np.int64)), keepdims=1)


class Factorisation(nn.Module):
    """[user, item, other items...] by number -> [their scores..., the size of the numbers used]."""

    def __init__(self, users: int, items: int, factors: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, factors), nn.Embedding(items, factors)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)
        for bias in (self.user_bias, self.item_bias):
            nn.init.zeros_(bias.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = x.long()
        user, items = places[:, 0], places[:, 1:]
        mine, theirs = self.users(user), self.items(items)
        own, other = self.user_bias(user), self.item_bias(items)[:, :, 0]
        scores = torch.einsum("nd,nid->ni", mine, theirs) + own + other
        size = (mine**2).sum(dim=1) + (theirs[:, 0] ** 2).sum(dim=1) + own[:, 0] ** 2 + other[:, 0] ** 2
        return torch.cat([scores, size[:, None]], dim=1)


class Part(nn.Module):
    """The block of flattened features [n, f] in its own shape."""

    def __init__(self, block: Block, alone: bool) -> None:
        super().__init__()
        self.start, self.stop, self.shape, self.alone = block.start, block.stop, block.shape, alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.alone else x[:, self.start : self.stop].reshape(-1, *self.shape)

    def emit(self, e: Emitter, x: str) -> str:
        if self.alone:
            return x
        bounds = [e.constant(np.array([number], dtype=np.int64)) for number in (self.start, self.stop, 1)]
        return e.reshape(e.op("Slice", x, *bounds), -1, *self.shape)


class Fusion(nn.Module):
    """The branches' outputs side by side."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)

    def emit(self, e: Emitter, x: str) -> str:
        return e.op("Concat", *(e.module(branch, x) for branch in self.branches), axis=1)


class Tokens(nn.Module):
    """Token numbers [n, l] (as float32, which is exact up to 2**24) -> (vectors [n, l, width], mask [n, l])."""

    def __init__(self, vocabulary: int, pad: int, width: int) -> None:
        super().__init__()
        self.vocabulary, self.pad = vocabulary, pad
        self.vectors = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.vectors.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        numbers = x.long().clamp(0, self.vocabulary - 1)
        return self.vectors(numbers), (numbers != self.pad).float()

    def emit_pair(self, e: Emitter, x: str) -> tuple[str, str | None]:
        numbers = e.op("Cast", x, to=7)
        ends = [e.constant(np.array(number, dtype=np.int64)) for number in (0, self.vocabulary - 1)]
        numbers = e.op("Clip", numbers, *ends)
        pad = e.op("Equal", numbers, e.constant(np.array(self.pad, dtype=np.int64)))
        mask = e.op("Cast", e.op("Not", pad), to=1)
        return e.op("Gather", e.constant(self.vectors.weight), numbers, axis=0), mask


class Steps(nn.Module):
    """Numbers in time -> (vectors [n, steps, width], no mask). `channels_first`: [n, c, steps] or [n, 1, bands, frames]."""

    def __init__(self, steps: int, inside: int, width: int | None, transposed: bool) -> None:
        super().__init__()
        self.steps, self.inside, self.transposed = steps, inside, transposed
        self.widen: nn.Module = nn.Identity() if width is None else nn.Linear(inside, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.transposed:
            x = x.reshape(-1, self.inside, self.steps).transpose(1, 2)
        return self.widen(x.reshape(-1, self.steps, self.inside)), None

    def emit_pair(self, e: Emitter, x: str) -> tuple[str, str | None]:
        if self.transposed:
            x = e.op("Transpose", e.reshape(x, -1, self.inside, self.steps), perm=[0, 2, 1])
        else:
            x = e.reshape(x, -1, self.steps, self.inside)
        return e.module(self.widen, x), None


class Elements(nn.Module):
    """[n, l, 1 + channels] -> (vectors [n, l, width], mask [n, l]): the sum of what the channels give.

    `sizes`: of each channel behind the mask, how many numbers it has, each with a vector; None: a quantity.
    """

    def __init__(self, sizes: list[int | None], width: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.parts = nn.ModuleList([nn.Linear(1, width) if size is None else nn.Embedding(size, width) for size in sizes])
        for part in self.parts:
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.1)
                with torch.no_grad():
                    part.weight[:2] = 0.0  # padding, and what is not known

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = [
            part(x[:, :, at : at + 1]) if size is None else part(x[:, :, at].long())
            for at, (size, part) in enumerate(zip(self.sizes, self.parts, strict=True), start=1)
        ]
        return torch.stack(found).sum(dim=0), x[:, :, 0]

    def emit_pair(self, e: Emitter, x: str) -> tuple[str, str]:
        def channel(at: int) -> str:
            return e.op("Gather", x, e.constant(np.array(at, dtype=np.int64)), axis=2)

        total = ""
        for at, (size, part) in enumerate(zip(self.sizes, self.parts, strict=True), start=1):
            if size is None:
                made = e.module(part, e.op("Unsqueeze", channel(at), e.constant(np.array([2], dtype=np.int64))))
            else:
                made = e.op("Gather", e.constant(part.weight), e.op("Cast", channel(at), to=7), axis=0)
            total = e.op("Add", total, made) if total else made
        return total, channel(0)


class Elementwise(nn.Module):
    """Scores of each element: [n, l, 1 + channels] -> [n, l, outputs]."""

    def __init__(self, front: Elements, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.front, self.body, self.head = front, body, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vectors, mask = self.front(x)
        found: torch.Tensor = self.head(self.body(vectors, mask))
        return found

    def emit(self, e: Emitter, x: str) -> str:
        vectors, mask = self.front.emit_pair(e, x)
        return e.module(self.head, self.body.emit_pair(e, vectors, mask))


class Likelihood(nn.Module):
    """Blocks of tokens [n, 1 + l], -1 behind the end -> [n, 2]: the negative log probability of those after the first, and
    how many there are. `model`: a language model of transformers.
    """

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = x.long()
        logits = self.model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits.float()
        wanted = ids[:, 1:]
        found = f.cross_entropy(
            logits.transpose(1, 2), wanted, reduction="none", ignore_index=-1,
            label_smoothing=self.smoothing if self.training else 0.0,
        )  # fmt: skip
        return torch.stack([found.sum(dim=1), (wanted >= 0).sum(dim=1).float()], dim=1)


class Corrected(nn.Module):
    """straight(x) + bent(x)"""

    def __init__(self, straight: nn.Module, bent: nn.Module) -> None:
        super().__init__()
        self.straight, self.bent = straight, bent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.straight(x) + self.bent(x)
        return found

    def emit(self, e: Emitter, x: str) -> str:
        return e.op("Add", e.module(self.straight, x), e.module(self.bent, x))


class Recurrent(nn.Module):
    """An LSTM or GRU over the sequence: [n, l, d] -> [n, l, hidden (x 2)]."""

    def __init__(
        self, cell: str, width: int, hidden: int, layers: int, bidirectional: bool, dropout: float, packed: bool = False
    ) -> None:
        super().__init__()
        self.packed = packed  # each sequence ends with its last element, not with the padding
        self.gates = 4 if cell == "lstm" else 3
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        more = dropout if layers > 1 else 0.0
        self.cells = kind(width, hidden, layers, batch_first=True, bidirectional=bidirectional, dropout=more)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if not self.packed or mask is None:
            found: torch.Tensor = self.cells(x)[0]
            return found
        lengths = mask.sum(dim=1).clamp(min=1).long().cpu()
        tight = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        read: torch.Tensor = nn.utils.rnn.pad_packed_sequence(self.cells(tight)[0], batch_first=True, total_length=x.shape[1])[0]
        return read

    def emit_pair(self, e: Emitter, x: str, mask: str | None) -> str:
        cells: Any = self.cells
        ways = [""] if not cells.bidirectional else ["", "_reverse"]
        x = e.op("Transpose", x, perm=[1, 0, 2])
        ends = []
        if self.packed and mask is not None:
            count = e.op("ReduceSum", mask, e.constant(np.array([1], dtype=np.int64)), keepdims=0)
            ends = [e.op("Cast", e.op("Max", count, e.constant(np.float32(1))), to=6)]
        # torch's order of gates -> ONNX's: (i f g o) -> (i o f g); (r z n) -> (z r n)
        order = [0, 3, 1, 2] if self.gates == 4 else [1, 0, 2]

        def sorted_gates(name: str, layer: int) -> np.ndarray:
            parts = []
            for way in ways:
                value = getattr(cells, f"{name}_l{layer}{way}").detach().cpu().numpy()
                pieces = np.split(value, self.gates)
                parts.append(np.concatenate([pieces[gate] for gate in order]))
            return np.stack(parts)

        for layer in range(cells.num_layers):
            bias = np.concatenate([sorted_gates("bias_ih", layer), sorted_gates("bias_hh", layer)], axis=1)
            inputs = [sorted_gates("weight_ih", layer), sorted_gates("weight_hh", layer), bias]
            more = {"linear_before_reset": 1} if self.gates == 3 else {}
            made = e.op(
                "LSTM" if self.gates == 4 else "GRU", x, *(e.constant(value) for value in inputs), *ends,
                hidden_size=cells.hidden_size, direction="bidirectional" if cells.bidirectional else "forward", **more,
            )  # [l, ways, n, hidden]  # fmt: skip
            x = e.reshape(e.op("Transpose", made, perm=[0, 2, 1, 3]), 0, 0, -1)
        return e.op("Transpose", x, perm=[1, 0, 2])


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani 2017); positions with mask 0 are not attended to."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.depth = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        n, length, width = x.shape
        query, key, value = (
            part(x).reshape(n, length, self.heads, self.depth).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        bias = None if mask is None else ((mask - 1) * 1e9)[:, None, None, :].to(query.dtype)
        found = f.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(found.transpose(1, 2).reshape(n, length, width))

    def emit_pair(self, e: Emitter, x: str, mask: str | None) -> str:
        def split(part: nn.Linear, perm: list[int]) -> str:
            return e.op("Transpose", e.reshape(e.module(part, x), 0, 0, self.heads, self.depth), perm=perm)

        query, value = split(self.query, [0, 2, 1, 3]), split(self.value, [0, 2, 1, 3])
        scores = e.op("MatMul", query, split(self.key, [0, 2, 3, 1]))
        scores = e.op("Mul", scores, e.constant(np.float32(1 / math.sqrt(self.depth))))
        if mask is not None:
            bias = e.op("Mul", e.op("Sub", mask, e.constant(np.float32(1))), e.constant(np.float32(1e9)))
            axes = e.constant(np.array([1, 2], dtype=np.int64))
            scores = e.op("Add", scores, e.op("Unsqueeze", bias, axes))
        found = e.op("MatMul", e.op("Softmax", scores, axis=-1), value)
        found = e.reshape(e.op("Transpose", found, perm=[0, 2, 1, 3]), 0, 0, self.heads * self.depth)
        return e.module(self.out, found)


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual; normalised before (`first`) or after, as BERT does."""

    def __init__(
        self, width: int, heads: int, inner: int, dropout: float, first: bool = True, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.inner = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout, self.first = nn.Dropout(dropout), first

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.first:
            x = x + self.dropout(self.attention(self.norm1(x), mask))
            return x + self.dropout(self.inner(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.inner(x)))

    def emit_pair(self, e: Emitter, x: str, mask: str | None) -> str:
        if self.first:
            x = e.op("Add", x, self.attention.emit_pair(e, e.module(self.norm1, x), mask))
            return e.op("Add", x, e.module(self.inner, e.module(self.norm2, x)))
        x = e.module(self.norm1, e.op("Add", x, self.attention.emit_pair(e, x, mask)))
        return e.module(self.norm2, e.op("Add", x, e.module(self.inner, x)))


class Encoder(nn.Module):
    """Positions are learned; then layers; [n, l, width] -> [n, l, width]."""

    def __init__(self, length: int, width: int, heads: int, inner: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([Layer(width, heads, inner, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.dropout(x + self.places)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def emit_pair(self, e: Emitter, x: str, mask: str | None) -> str:
        x = e.op("Add", x, e.constant(self.places))
        for layer in self.layers:
            x = layer.emit_pair(e, x, mask)
        return e.module(self.norm, x)


class Bert(nn.Module):
    """BERT's encoder: token, place and segment vectors, normalised; then layers that are normalised after each part."""

    def __init__(
        self, length: int, width: int, heads: int, inner: int, layers: int, dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(length, width))
        self.norm, self.dropout = nn.LayerNorm(width, eps=eps), nn.Dropout(dropout)
        self.layers = nn.ModuleList([Layer(width, heads, inner, dropout, first=False, eps=eps) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.dropout(self.norm(x + self.places))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def emit_pair(self, e: Emitter, x: str, mask: str | None) -> str:
        x = e.module(self.norm, e.op("Add", x, e.constant(self.places)))
        for layer in self.layers:
            x = layer.emit_pair(e, x, mask)
        return x


class Reader(nn.Module):
    """A sequence read to one row: `front` gives vectors and mask, `body` reads them, then their mean, or the last."""

    def __init__(self, front: nn.Module, body: nn.Module, last: bool) -> None:
        super().__init__()
        self.front, self.body, self.last = front, body, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, mask = self.front(x)
        x = self.body(x, mask)
        if mask is None:
            return x[:, -1] if self.last else x.mean(dim=1)
        if self.last:
            places = torch.arange(mask.shape[1], device=mask.device, dtype=mask.dtype)
            weights = (places == (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)).to(x.dtype)
            return (x * weights[:, :, None]).sum(dim=1)
        return (x * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)

    def emit(self, e: Emitter, x: str) -> str:
        x, mask = self.front.emit_pair(e, x)
        x = self.body.emit_pair(e, x, mask)
        axis = e.constant(np.array([1], dtype=np.int64))
        if mask is None:
            if self.last:
                return e.op("Gather", x, e.constant(np.array(-1, dtype=np.int64)), axis=1)
            return e.op("ReduceMean", x, axis, keepdims=0)
        length: str | None = e.op("ReduceSum", mask, axis, keepdims=1)
        if self.last:
            final = e.op("Max", e.op("Sub", str(length), e.constant(np.float32(1))), e.constant(np.float32(0)))
            places = e.op("Sub", e.op("CumSum", _ones_like(e, mask), axis), e.constant(np.float32(1)))
            mask = e.op("Cast", e.op("Equal", places, final), to=1)
            length = None
        weights = e.op("Unsqueeze", mask, e.constant(np.array([2], dtype=np.int64)))
        total = e.op("ReduceSum", e.op("Mul", x, weights), axis, keepdims=0)
        return total if length is None else e.op("Div", total, e.op("Max", length, e.constant(np.float32(1))))


def _ones_like(e: Emitter, tensor: str) -> str:
    return e.op("Add", e.op("Mul", tensor, e.constant(np.float32(0))), e.constant(np.float32(1)))
