"""Products of a weight with one sparse row on a CPU, in C++ that torch's inductor compiles once per machine.

Two functions: :meth:`Native.columns` reads the columns of active inputs from a weight that lies transposed,
:meth:`Native.rows` computes active outputs alone from a weight as it is. Both are optional: :func:`native` gives None
where there is no compiler, and callers keep to torch's own operators.

What makes columns fast is their order. Eight active columns are streamed side by side from end to end, as the
hardware fetches ahead within a column, while the sums stay in the nearest cache. An embedding bag does the opposite:
it keeps a few sums in registers and jumps from column to column, so that every access opens another page.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

_SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// Sixteen numbers at a time, in the widest registers that the processor has. Loops are not left to the compiler: with
// the flags that it gets it does not vectorize them.
typedef float wide __attribute__((vector_size(64)));
typedef uint32_t wide_bits __attribute__((vector_size(64)));
typedef uint16_t narrow_bits __attribute__((vector_size(32)));

static inline wide load(const float* from) {
  wide values;
  std::memcpy(&values, from, sizeof values);
  return values;
}
static inline wide load(const uint16_t* from) {
  narrow_bits narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const wide_bits bits = __builtin_convertvector(narrow, wide_bits) << 16;
  wide values;
  std::memcpy(&values, &bits, sizeof values);
  return values;
}

static inline float widen(float value) { return value; }
static inline float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wider;
  std::memcpy(&wider, &bits, sizeof wider);
  return wider;
}
static inline void store(float value, float* to) { *to = value; }
static inline void store(float value, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { *to = static_cast<uint16_t>((bits >> 16) | 0x40u); return; }
  *to = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// sums[o] += sum over COUNT columns of value * column[o], for o in [low, high).
template <int COUNT, class T>
static void add(const T* const* column, const float* value, int64_t low, int64_t high, float* __restrict__ sums) {
  int64_t o = low;
  for (; o + 16 <= high; o += 16) {
    wide sum = load(sums + o);
    for (int c = 0; c < COUNT; ++c) sum += value[c] * load(column[c] + o);
    std::memcpy(sums + o, &sum, sizeof sum);
  }
  for (; o < high; ++o)
    for (int c = 0; c < COUNT; ++c) sums[o] += value[c] * widen(column[c][o]);
}

// The outputs [low, high) of a product; sums has an entry for every output.
template <class T>
static void span(const T* table, int64_t outputs, int64_t low, int64_t high, const std::vector<int64_t>& index,
                 const T* x, float* __restrict__ sums) {
  std::fill(sums + low, sums + high, 0.0f);
  const size_t count = index.size();
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const T* column[8];
    float value[8];
    for (int c = 0; c < 8; ++c) {
      column[c] = table + index[i + c] * outputs;
      value[c] = widen(x[index[i + c]]);
    }
    add<8>(column, value, low, high, sums);
  }
  for (; i < count; ++i) {
    const T* column = table + index[i] * outputs;
    const float value = widen(x[index[i]]);
    add<1>(&column, &value, low, high, sums);
  }
}

static std::vector<int64_t> positions(const uint8_t* active, int64_t count) {
  // Without a branch, which no processor could foresee.
  std::vector<int64_t> found(count + 1);
  int64_t kept = 0;
  for (int64_t j = 0; j < count; ++j) {
    found[kept] = j;
    kept += active[j] != 0;
  }
  found.resize(kept);
  return found;
}

template <class T>
static void columns(const T* table, const T* x, const uint8_t* active, T* y, int64_t inputs, int64_t outputs,
                    int64_t threads) {
  const std::vector<int64_t> index = positions(active, inputs);
  std::vector<float> sums(outputs);
  // Whole cache lines to a thread.
  const int64_t share = (outputs + threads * 64 - 1) / (threads * 64) * 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t low = std::min(outputs, part * share), high = std::min(outputs, low + share);
    if (low == high) continue;
    span(table, outputs, low, high, index, x, sums.data());
    for (int64_t o = low; o < high; ++o) store(sums[o], y + o);
  }
}

template <class T>
static void rows(const T* weight, const T* x, const uint8_t* active, T* y, int64_t inputs, int64_t outputs,
                 int64_t threads) {
  const std::vector<int64_t> index = positions(active, outputs);
  const int64_t count = index.size();
  std::memset(y, 0, sizeof(T) * outputs);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) {
    const T* row = weight + index[i] * inputs;
    wide sums[2] = {};
    int64_t j = 0;
    for (; j + 32 <= inputs; j += 32)
      for (int half = 0; half < 2; ++half) sums[half] += load(row + j + 16 * half) * load(x + j + 16 * half);
    float sum = 0.0f;
    for (; j < inputs; ++j) sum += widen(row[j]) * widen(x[j]);
    sums[0] += sums[1];
    for (int lane = 0; lane < 16; ++lane) sum += sums[0][lane];
    store(sum, y + index[i]);
  }
}

#define EXPORT(name, type)                                                                                   \
  extern "C" void name##_##type(const type##_t* weight, const type##_t* x, const uint8_t* active, type##_t* y, \
                                int64_t inputs, int64_t outputs, int64_t threads) {                          \
    name(weight, x, active, y, inputs, outputs, threads);                                                    \
  }
typedef float float32_t_;
#define float32_t float32_t_
#define bfloat16_t uint16_t
EXPORT(columns, float32)
EXPORT(columns, bfloat16)
EXPORT(rows, float32)
EXPORT(rows, bfloat16)
"""

#: Types of weights and inputs that there are products for.
DTYPES = (torch.float32, torch.bfloat16)
#: Weights below which a second thread costs more than it does.
_PARALLEL = 2**17


class Native:
    """The compiled products; sums are in fp32, and the number of threads does not change them."""

    def __init__(self, library: Any) -> None:
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for name in ("columns", "rows"):
            for dtype in DTYPES:
                function = getattr(library, f"{name}_{str(dtype).removeprefix('torch.')}")
                function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
                function.restype = None
                self._functions[name, dtype] = function

    def columns(self, table: Tensor, x: Tensor, active: Tensor) -> Tensor:
        """Return the sum of rows of ``table`` over active inputs, each times its input: [out], in the dtype of ``x``.

        Args:
            table: the weight transposed, contiguous [in, out], of one of :data:`DTYPES`.
            x: [in], of the dtype of ``table``.
            active: boolean [in]; what an inactive input meets is not read.

        Raises:
            ValueError: shapes, dtypes or layouts that do not fit.
        """
        return self._run("columns", table, x, active, len(x), table.shape[1], table.shape[0] == len(active))

    def rows(self, weight: Tensor, x: Tensor, active: Tensor) -> Tensor:
        """Return ``weight x`` [out] at active outputs, and zeros at the others.

        Args:
            weight: contiguous [out, in], of one of :data:`DTYPES`.
            x: [in], of the dtype of ``weight``.
            active: boolean [out]; the row of an inactive output is not read.

        Raises:
            ValueError: shapes, dtypes or layouts that do not fit.
        """
        return self._run("rows", weight, x, active, len(x), len(active), weight.shape[1] == len(x))

    def _run(
        self, name: str, weight: Tensor, x: Tensor, active: Tensor, inputs: int, outputs: int, fits: bool
    ) -> Tensor:
        function = self._functions.get((name, weight.dtype))
        if (
            function is None
            or not fits
            or weight.numel() != inputs * outputs
            or x.dtype != weight.dtype
            or active.dtype != torch.bool
            or not weight.is_contiguous()
            or any(tensor.device.type != "cpu" for tensor in (weight, x, active))
        ):
            raise ValueError(
                f"{name} takes contiguous weights and inputs of one dtype, float32 or bfloat16, on a CPU, and a "
                f"boolean mask; got weight {tuple(weight.shape)} {weight.dtype}, x {tuple(x.shape)} {x.dtype}, mask "
                f"{tuple(active.shape)} {active.dtype}"
            )
        x, active = x.contiguous(), active.contiguous()
        out = x.new_empty(outputs)
        threads = torch.get_num_threads() if weight.numel() >= _PARALLEL else 1
        function(weight.data_ptr(), x.data_ptr(), active.data_ptr(), out.data_ptr(), inputs, outputs, threads)
        return out


@functools.cache
def native() -> Native | None:
    """Return the compiled products; None where nothing compiles them.

    The first call on a machine compiles for seconds; inductor keeps the library in its cache.
    """
    try:
        from torch._inductor.codecache import CppCodeCache

        return Native(CppCodeCache.load(_SOURCE))
    except Exception:
        # Without a compiler, or with another inductor, there is nothing to tell: products are torch's own.
        return None
