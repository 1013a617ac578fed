"""Transformer blocks of open_clip, run with fewer and faster operations on a CPU.

The weights and the arithmetic are open_clip's. Three things are left out: rounding weights into the
processor's layout in every call, passes over memory between a product and its activation, and in
the last block the tokens that nobody reads. What is not of a known form keeps open_clip's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def speed_up(network: nn.Module) -> bool:
    """Replace the image tower's transformer blocks, in place, by ones that run faster on a CPU.

    Parameters
    ----------
    network : torch.nn.Module
        A model of open_clip, in evaluation mode on the CPU, in float32 or bfloat16.

    Returns
    -------
    bool
        Whether its image tower was of a known form: open_clip's plain vision transformer.

    Notes
    -----
    Where only the class token is read, the last block computes only that: 6.9% of the arithmetic
    of ViT-B-32.
    """
    from open_clip.transformer import VisionTransformer

    visual: Any = getattr(network, "visual", None)
    if type(visual) is not VisionTransformer or not _all_plain(visual.transformer):
        return False
    one = visual.pool_type == "tok" and visual.attn_pool is None and not visual.output_tokens
    blocks = visual.transformer.resblocks
    for number, block in enumerate(blocks):
        last = one and number == len(blocks) - 1
        blocks[number] = LastBlock(block) if last else Block(block)
    if _cuts_patches(visual.conv1):
        visual.conv1 = _Patches(visual.conv1)
    return True


class TextTower:
    """A causal text transformer of open_clip that reads each text to its end, and no padding.

    A token sees only what is before it, and the embedding is read where the text ends. So what
    follows the end changes nothing, and need not be computed.

    Parameters
    ----------
    network : torch.nn.Module
        For which `is_causal` holds.
    fast : bool
        Whether to run the blocks as `Block`, on a CPU.
    """

    def __init__(self, network: nn.Module, *, fast: bool) -> None:
        self._tower: Any = _text_part(network)
        self._mask: torch.Tensor = self._tower.attn_mask
        *blocks, last = self._tower.transformer.resblocks
        self._dtype: torch.dtype = self._tower.transformer.get_cast_dtype()
        self._blocks = [Block(block) for block in blocks] if fast else blocks
        self._last = LastBlock(last) if fast else last

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (b,) int64: the place of the token whose vector is the text's, for (b, c) ids."""
        kind, eos = _pooling(self._tower)
        return (tokens if kind == "argmax" else (tokens == eos).int()).argmax(dim=-1)

    def __call__(self, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Return the (b, width) features of texts.

        Parameters
        ----------
        tokens : (b, length) int64
            Cut to any length that every text ends within.
        ends : (b,) int64
            What `ends` gave.
        """
        tower, length, dtype = self._tower, tokens.shape[1], self._dtype
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        mask = self._mask[:length, :length].to(dtype)
        for block in self._blocks:
            x = block(x, attn_mask=mask)
        if isinstance(self._last, LastBlock):
            pooled = self._last.at(x, ends, mask)
        else:
            pooled = self._last(x, attn_mask=mask)[torch.arange(len(x), device=x.device), ends]
        features = tower.ln_final(pooled)
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            features = projection(features)
        elif projection is not None:
            features = features @ projection
        return features  # type: ignore[no-any-return]


def is_causal(network: nn.Module) -> bool:
    """Tell whether a model's texts may be cut at their end: see `TextTower`.

    It takes a text transformer of open_clip with the causal mask, nothing added to the text, and
    the embedding read at the end of text.
    """
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    tower: Any = _text_part(network)
    separate = type(network) is CustomTextCLIP and type(tower) is TextTransformer
    if type(network) is not CLIP and not separate:
        return False
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "output_tokens", False):
        return False
    mask = tower.attn_mask
    if _pooling(tower)[0] not in ("argmax", "eos") or mask is None:
        return False
    if not _all_plain(tower.transformer):
        return False
    hidden = torch.full_like(mask, float("-inf")).triu_(1)
    return len(mask) == len(tower.positional_embedding) and torch.equal(mask, hidden)


def _text_part(network: Any) -> Any:
    """CLIP holds its text transformer's parts itself, CustomTextCLIP in `text`."""
    return getattr(network, "text", network)


def _pooling(tower: Any) -> tuple[str, int]:
    prefix = "" if hasattr(tower, "pool_type") else "text_"
    return str(getattr(tower, f"{prefix}pool_type")), int(getattr(tower, f"{prefix}eos_id"))


def _all_plain(transformer: Any) -> bool:
    from open_clip.transformer import Transformer

    return (
        type(transformer) is Transformer
        and bool(transformer.batch_first)
        and len(transformer.resblocks) > 0
        and all(_is_plain(block) for block in transformer.resblocks)
    )


def _is_plain(block: Any) -> bool:
    """Tell whether a block is open_clip's own, with all that `Block` takes for granted."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
        return False
    attention, (first, activation, second) = block.attn, block.mlp
    return (
        type(attention) is nn.MultiheadAttention
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and type(first) is nn.Linear
        and type(second) is nn.Linear
        and (type(activation) is QuickGELU or _is_exact_gelu(activation))
    )


def _is_exact_gelu(activation: nn.Module) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


class Block(nn.Module):
    """One residual block: attention, then two layers, each on normalised tokens.

    Parameters
    ----------
    block : open_clip.transformer.ResidualAttentionBlock
        Whose weights these are.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, (first, activation, second) = block.attn, block.mlp
        self.heads = int(attention.num_heads)
        self._norms = block.ln_1, block.ln_2
        self._scales = block.ls_1, block.ls_2
        exact = _is_exact_gelu(activation)
        self._activation = nn.Identity() if exact else activation
        self._take_inputs(attention.in_proj_weight, attention.in_proj_bias)
        self._out = _Linear(attention.out_proj.weight, attention.out_proj.bias)
        self._first = _Linear(first.weight, first.bias, gelu=exact)
        self._second = _Linear(second.weight, second.bias)

    def _take_inputs(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._inputs = _Linear(weight, bias)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (b, t, width) tokens for as many; the (t, t) mask is added to the similarities."""
        query, key, value = self._inputs(_normed(x, self._norms[0])).chunk(3, dim=-1)
        return self._rest(x, self._attended(query, key, value, attn_mask))

    def _attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with plain products: for so few tokens, torch's fused kernels take longer."""
        q, k, v = (
            part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for part in (query, key, value)
        )
        similarity = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            similarity = similarity + mask
        attended: torch.Tensor = similarity.softmax(dim=-1) @ v
        return attended.transpose(1, 2).flatten(2)

    def _rest(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self._scales[0](self._out(attended))
        hidden = self._activation(self._first(_normed(x, self._norms[1])))
        return x + self._scales[1](self._second(hidden))  # type: ignore[no-any-return]


class LastBlock(Block):
    """A block that computes one token of each row, which still sees the others."""

    def _take_inputs(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        width = weight.shape[1]
        self._query = _Linear(weight[:width], bias[:width])
        self._others = _Linear(weight[width:], bias[width:])

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (b, 1, width): the first token."""
        return self.at(x, torch.zeros(len(x), dtype=torch.int64), attn_mask)[:, None]

    def at(
        self, x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (b, width): of each row the token at that place."""
        rows = torch.arange(len(x))
        normed = _normed(x, self._norms[0])
        key, value = self._others(normed).chunk(2, dim=-1)
        query = self._query(normed[rows, places])[:, None]
        if mask is not None:
            mask = mask[places][:, None, None]
        return self._rest(x[rows, places][:, None], self._attended(query, key, value, mask))[:, 0]


class _Patches(nn.Module):
    """A convolution whose windows tile the image, as one product."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.kernel_size = convolution.kernel_size
        self._linear = _Linear(convolution.weight.flatten(1), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (b, width, rows, columns) for (b, 3, height, width) pixels."""
        height, width = self.kernel_size
        across, down = x.shape[3] // width, x.shape[2] // height
        x = x[:, :, : down * height, : across * width]
        parts = x.reshape(len(x), x.shape[1], down, height, across, width)
        found = self._linear(parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return found.transpose(1, 2).reshape(len(x), -1, down, across)


def _cuts_patches(convolution: nn.Module) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and convolution.stride == convolution.kernel_size
        and convolution.padding == (0, 0)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.bias is None
    )


def _normed(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Normalise in float32 inside one operation, whatever the type of the norm's weights."""
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class _Linear:
    """A linear layer on bfloat16 weights in oneDNN's own layout, or on others as they are."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False
    ) -> None:
        packed = _packed(weight.detach())
        self._is_packed, self._gelu = packed is not None, gelu
        self._weight = weight.detach() if packed is None else packed
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_packed:
            product = functional.linear(x, self._weight, self._bias)
            return functional.gelu(product) if self._gelu else product
        rows = x.reshape(-1, x.shape[-1])
        kind, algorithm = ("gelu", "none") if self._gelu else ("none", "")
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, kind, [], algorithm
        )
        return found.reshape(*x.shape[:-1], -1)


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """Return a bfloat16 weight in oneDNN's layout, where this build of torch and this CPU can."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return None
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):  # operators that torch makes for its own compiler
        return None
