"""Binary-coded weights: sums of binary matrices times scales, packed one bit per entry.

``W = sum_i alpha_i B_i`` with ``B_i`` in {-1, +1}. The scales are shared by the entries of a block of
``row_block x column_block`` of the matrix: whole columns, rows, or tiles. Scales that are sums of a few
signed powers of two are stored as one byte per power, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from methodbench.errors import NotApplicableError
from methodbench.torchkit.packed import PackedLayer, pack, packed_length, unpack

#: Exponents of powers of two that a byte holds: ``2^-_BIAS`` to ``2^(127 - _BIAS)`` beside its sign bit.
_BIAS = 64


@dataclass(frozen=True, slots=True)
class BinaryCoded:
    """A matrix as binary matrices and scales.

    Attributes:
        signs: bool [bits, rows, columns], True for +1.
        scale: fp32 [row blocks, column blocks, bits].
    """

    signs: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        bits, rows, columns = self.signs.shape
        row_blocks, column_blocks, scales = self.scale.shape
        if scales != bits or rows % row_blocks or columns % column_blocks:
            raise ValueError(
                f"scales {tuple(self.scale.shape)} do not fit {bits} binary matrices [{rows}, {columns}]"
            )

    @property
    def bits(self) -> int:
        """How many binary matrices there are."""
        return self.signs.shape[0]

    def dequantize(self) -> Tensor:
        """Return the matrix, fp32 [rows, columns]."""
        bits, rows, columns = self.signs.shape
        row_blocks, column_blocks, _ = self.scale.shape
        tiled = self.signs.view(bits, row_blocks, rows // row_blocks, column_blocks, columns // column_blocks)
        scale = self.scale.permute(2, 0, 1)[:, :, None, :, None]
        total = torch.where(tiled[0], scale[0], -scale[0])
        for i in range(1, bits):
            total += torch.where(tiled[i], scale[i], -scale[i])
        return total.reshape(rows, columns)


def encode_powers(x: Tensor, terms: int) -> Tensor:
    """Write every entry of ``x`` as a sum of at most ``terms`` signed powers of two, one byte each.

    Bit 7 is the sign, the rest the exponent plus 64; 0 stands for no term. The decomposition is the
    non-adjacent form, of which no signed binary number needs fewer terms.

    Args:
        x: fp32 [...].

    Returns:
        uint8 [..., terms], largest power first.

    Raises:
        ValueError: an entry needs more terms, is not finite, or has an exponent outside -63 to 63.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("only finite numbers are sums of powers of two")
    mantissa, exponent = torch.frexp(x.double())
    whole = (mantissa.abs() * 2**24).long()
    triple = 3 * whole
    plus, minus = (triple & ~whole) >> 1, (whole & ~triple) >> 1
    encoded = []
    for _ in range(terms):
        left = plus | minus
        # The exponent of a double is exact for integers of 53 bits.
        top = torch.frexp(left.double())[1].long() - 1
        power = torch.where(left > 0, torch.ones_like(left) << top.clamp(min=0), torch.zeros_like(left))
        negative = ((minus & power) > 0) ^ (x < 0)
        code = top + exponent.long() - 24 + _BIAS
        if bool((left > 0).logical_and((code < 1) | (code > 127)).any()):
            raise ValueError("a power of two lies outside of 2^-63 to 2^63")
        encoded.append(torch.where(left > 0, code + 128 * negative, torch.zeros_like(code)).to(torch.uint8))
        plus, minus = plus & ~power, minus & ~power
    if bool((plus | minus).any()):
        raise ValueError(f"a scale is no sum of {terms} signed powers of two")
    return torch.stack(encoded, -1)


def decode_powers(encoded: Tensor) -> Tensor:
    """Return the sums, fp32 [...], of powers encoded by :func:`encode_powers` (uint8 [..., terms])."""
    exponent = (encoded & 127).int() - _BIAS
    size = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    value = torch.where(encoded > 127, -size, size).masked_fill(encoded == 0, 0.0)
    return value.double().sum(-1).float()


@dataclass(frozen=True, slots=True)
class Rotation:
    """A random orthogonal matrix ``R`` [n, n] in two sparse factors (QuIP's butterfly).

    A permutation, then an orthogonal block for every run of ``q`` entries, then one for every stride of
    ``q``; ``n = p q`` with ``p`` and ``q`` as near to each other as possible.
    """

    perm: Tensor
    """int64 [n]."""
    inner: Tensor
    """fp32 [p, q, q]."""
    outer: Tensor
    """fp32 [q, p, p]."""

    @classmethod
    def draw(cls, n: int, seed: int, device: torch.device | str = "cpu") -> Rotation:
        """Return the rotation of ``seed``; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        p = next(p for p in range(int(n**0.5), 0, -1) if n % p == 0)
        q = n // p
        perm = torch.randperm(n, generator=generator)
        inner = _orthogonal(p, q, generator)
        outer = _orthogonal(q, p, generator)
        return cls(perm.to(device), inner.to(device), outer.to(device))

    def rotate(self, x: Tensor) -> Tensor:
        """Return ``x R^T`` for ``x`` [..., n]."""
        p, q = self.inner.shape[:2]
        tiles = x[..., self.perm].unflatten(-1, (p, q))
        tiles = torch.einsum("pab,...pb->...pa", self.inner, tiles)
        return torch.einsum("qab,...bq->...aq", self.outer, tiles).flatten(-2)

    def unrotate(self, x: Tensor) -> Tensor:
        """Return ``x R`` for ``x`` [..., n]: the inverse of :meth:`rotate`."""
        p, q = self.inner.shape[:2]
        tiles = torch.einsum("qba,...bq->...aq", self.outer, x.unflatten(-1, (p, q)))
        tiles = torch.einsum("pba,...pb->...pa", self.inner, tiles)
        return tiles.flatten(-2)[..., torch.argsort(self.perm)]


def _orthogonal(count: int, n: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64))
    # With the signs of R's diagonal the result is uniform over the orthogonal group.
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).float()


class PackedBinary(PackedLayer):
    """Binary-coded weights.

    Buffers: ``planes`` uint8 [bits, bytes], ``scale`` uint8 [row blocks, column blocks, bits, terms] (powers
    of two) or floating [row blocks, column blocks, bits], ``perm`` int16 or int32 [in] (column ``j`` of the
    planes is input column ``perm[j]``), ``column_scale`` floating [in] (multiplies the columns). With
    ``rotation_seed`` the planes describe ``U W V^T`` for two rotations drawn from it.
    """

    format = "binary-coded"
    stores = BinaryCoded

    planes: Tensor
    perm: Tensor | None
    column_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        row_block: int,
        column_block: int,
        terms: int = 0,
        bias: bool = False,
        permuted: bool = False,
        rescaled: bool = False,
        rotation_seed: int | None = None,
        scale_dtype: str = "float16",
        dtype: str = "float32",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        if out_features % row_block or in_features % column_block:
            raise NotApplicableError(
                f"a layer [{out_features}, {in_features}] has no whole number of blocks of "
                f"{row_block} x {column_block}",
                "Choose blocks that divide the layer's height and width.",
            )
        self.bits = bits
        self.row_block = row_block
        self.column_block = column_block
        self.terms = terms
        self.rotation_seed = rotation_seed
        self.scale_dtype = scale_dtype
        length = packed_length(out_features * in_features, 1)
        shape = (out_features // row_block, in_features // column_block, bits)
        floating = getattr(torch, scale_dtype)
        scale = torch.zeros(*shape, terms, dtype=torch.uint8) if terms else torch.zeros(shape, dtype=floating)
        index = torch.int16 if in_features < 2**15 else torch.int32
        self.register_buffer("planes", torch.zeros(bits, length, dtype=torch.uint8))
        self.register_buffer("scale", scale)
        self.register_buffer("perm", torch.zeros(in_features, dtype=index) if permuted else None)
        self.register_buffer("column_scale", torch.zeros(in_features) if rescaled else None)

    @classmethod
    def from_quantized(
        cls,
        quantized: BinaryCoded,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        terms: int = 0,
        perm: Tensor | None = None,
        column_scale: Tensor | None = None,
        rotation_seed: int | None = None,
    ) -> Self:
        """Pack a binary-coded matrix.

        Args:
            quantized: [out, in].
            bias: [out]; kept as it is.
            dtype: of the weight that :meth:`dequantize` returns.
            terms: powers of two in a scale, at one byte each; 0 keeps scales in fp16, or in fp32 where fp16
                would overflow or lose more than its rounding.
            perm: integers [in], the input column of each coded column.
            column_scale: fp32 [in], multiplies the columns of what the planes describe.
            rotation_seed: of the two rotations that the matrix went through before it was coded.

        Raises:
            ValueError: a scale is no sum of ``terms`` powers of two.
        """
        bits, rows, columns = quantized.signs.shape
        scale = quantized.scale
        half = scale.half()
        fits = bool(((half.float() - scale).abs() <= scale.abs() * 2.0**-10).all())
        layer = cls(
            columns,
            rows,
            bits,
            row_block=rows // scale.shape[0],
            column_block=columns // scale.shape[1],
            terms=terms,
            bias=bias is not None,
            permuted=perm is not None,
            rescaled=column_scale is not None,
            rotation_seed=rotation_seed,
            scale_dtype="float16" if fits else "float32",
            dtype=str(dtype).removeprefix("torch."),
        )
        layer.planes = torch.stack([pack(plane.flatten(), 1) for plane in quantized.signs])
        layer.scale = encode_powers(scale, terms) if terms else scale.to(layer.scale.dtype)
        if perm is not None and layer.perm is not None:
            layer.perm = perm.to(layer.perm.dtype)
        if column_scale is not None:
            layer.column_scale = column_scale.float()
        layer._set_bias(bias)
        return layer

    @property
    def config(self) -> dict[str, Any]:
        return {
            **super().config,
            "bits": self.bits,
            "row_block": self.row_block,
            "column_block": self.column_block,
            "terms": self.terms,
            "permuted": self.perm is not None,
            "rescaled": self.column_scale is not None,
            "rotation_seed": self.rotation_seed,
            "scale_dtype": self.scale_dtype,
        }

    @property
    def summary(self) -> str:
        powers = f" of {self.terms} powers of two" if self.terms else ""
        return f"{self.bits} binary matrices, scales{powers} per {self.row_block} x {self.column_block}"

    def coded(self) -> BinaryCoded:
        """Return the matrix as it was packed, in the order of the stored columns."""
        count = self.out_features * self.in_features
        shape = (self.out_features, self.in_features)
        planes = [unpack(plane, 1, count).bool().view(shape) for plane in self.planes]
        scale = decode_powers(self.scale) if self.terms else self.scale.float()
        return BinaryCoded(torch.stack(planes), scale)

    def dequantize(self) -> Tensor:
        weight = self.coded().dequantize()
        if self.perm is not None:
            weight = weight.index_select(1, torch.argsort(self.perm.int()))
        if self.rotation_seed is not None:
            weight = unrotate_sides(weight, self.rotation_seed)
        if self.column_scale is not None:
            weight = weight * self.column_scale
        return weight.to(self.dtype)


def rotations_of(
    shape: tuple[int, int] | torch.Size, seed: int, device: Any = "cpu"
) -> tuple[Rotation, Rotation]:
    """Return the rotations ``U`` [out, out] and ``V`` [in, in] of a matrix [out, in]."""
    return Rotation.draw(shape[0], 2 * seed, device), Rotation.draw(shape[1], 2 * seed + 1, device)


def unrotate_sides(weight: Tensor, seed: int) -> Tensor:
    """Return ``U^T weight V``, the inverse of ``W -> U W V^T`` with :func:`rotations_of` ``seed``."""
    left, right = rotations_of(weight.shape, seed, weight.device)
    return left.unrotate(right.unrotate(weight).T).T
