"""The argument structures of csrc/attention_params.h, field for field."""

import ctypes

from torch import Tensor


class Operand(ctypes.Structure):
    """[N, heads, K]; strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_longlong),
        ("head", ctypes.c_longlong),
    ]


class TensorMap(ctypes.Structure):
    """What `cuda_driver.tensor_map` fills, opaque."""

    _fields_ = [("words", ctypes.c_ulonglong * 16)]


class StatisticsMaps(ctypes.Structure):
    _fields_ = [(name, TensorMap) for name in ("q", "k", "q_teacher", "k_teacher")]


class BackwardMaps(ctypes.Structure):
    _fields_ = [(name, TensorMap) for name in ("q", "k", "v", "d_out", "q_teacher", "k_teacher")]


class Layout(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "tiles")),
        *(
            (name, ctypes.c_int)
            for name in (
                *("sequences", "tokens", "left", "right"),
                *("heads", "key_heads", "key_heads_teacher", "pad"),
            )
        ),
    ]


class Statistics(ctypes.Structure):
    _fields_ = [
        ("maps", StatisticsMaps),
        *((name, Operand) for name in ("q", "k", "q_teacher", "k_teacher")),
        *((name, ctypes.c_void_p) for name in ("lse", "lse_teacher", "keep", "value", "statistic")),
        ("layout", Layout),
        *((name, ctypes.c_float) for name in ("scale", "scale_teacher", "log2_beta", "log2_other")),
        ("pad", ctypes.c_int * 14),
    ]


class Prepare(ctypes.Structure):
    _fields_ = [
        *((name, Operand) for name in ("out", "d_out")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("lse", "lse_teacher", "statistic", "d_lse", "row_weight", "gradient_scale"),
                *("lse2", "lse2_teacher", "delta", "factor"),
            )
        ),
        *((name, ctypes.c_int) for name in ("heads", "tokens")),
        ("beta", ctypes.c_float),
        ("pad", ctypes.c_int),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("maps", BackwardMaps),
        *((name, Operand) for name in ("q", "k", "v", "d_out", "q_teacher", "k_teacher")),
        *((name, Operand) for name in ("d_query", "d_key", "d_value")),
        *(
            (name, ctypes.c_void_p)
            for name in ("lse2", "lse2_teacher", "delta", "factor", "gradient_scale")
        ),
        ("layout", Layout),
        *((name, ctypes.c_float) for name in ("scale2", "scale2_teacher", "scale", "log2_ratio")),
        ("pad", ctypes.c_int * 16),
    ]


def operand(x: Tensor | None) -> Operand:
    """Of x [N, heads, K] whose last stride is 1."""
    return Operand() if x is None else Operand(x.data_ptr(), x.stride(0), x.stride(1))


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
