"""What the kernels take, as they declare it: each class is the structure of that name in the C files."""

import ctypes
from typing import ClassVar

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

SumOverRanks = ctypes.CFUNCTYPE(_INT64, ctypes.POINTER(ctypes.c_float), _INT64)
"""`sum` of `ranks` in ranks.h."""
LINE_BYTES = 64
"""Between the counters of neighbouring ranks."""

PARTS = ("norms", "linear layers", "rotary embedding, KV write", "attention", "activation", "ranks")
"""Of a forward pass, in the order of `parts` in decoder.c."""


class Matrix(ctypes.Structure):
    """`matrix` in matrix.h."""

    _fields_: ClassVar = [
        ("panels", _POINTER),
        ("scales", _POINTER),
        ("sums", _POINTER),
        ("bias", _POINTER),
        ("num_inputs", _INT64),
        ("num_outputs", _INT64),
    ]


class Heads(ctypes.Structure):
    """`heads` in heads.h."""

    _fields_: ClassVar = [
        ("num_heads", _INT64),
        ("num_kv_heads", _INT64),
        ("head_dim", _INT64),
        ("block_size", _INT64),
    ]


class Batch(ctypes.Structure):
    """`batch` in heads.h."""

    _fields_: ClassVar = [
        ("num_rows", _INT64),
        ("num_tiles", _INT64),
        ("num_wanted", _INT64),
        ("positions", _POINTER),
        ("slots", _POINTER),
        ("tiles", _POINTER),
        ("block_tables", _POINTER),
        ("wanted_rows", _POINTER),
        ("wanted_tiles", _POINTER),
    ]


class Layer(ctypes.Structure):
    """`layer` in decoder.c."""

    _fields_: ClassVar = [
        ("attention_norm", _POINTER),
        ("qk_norm", _POINTER),
        ("mlp_norm", _POINTER),
        ("qkv_proj", Matrix),
        ("o_proj", Matrix),
        ("gate_up_proj", Matrix),
        ("down_proj", Matrix),
        ("window", _INT64),
    ]


class Decoder(ctypes.Structure):
    """`decoder` in decoder.c."""

    _fields_: ClassVar = [
        ("layers", _POINTER),
        ("num_layers", _INT64),
        ("hidden_size", _INT64),
        ("intermediate_size", _INT64),
        ("heads", Heads),
        ("turns", _POINTER),
        ("epsilon", _FLOAT),
    ]


class Room(ctypes.Structure):
    """`room` in decoder.c."""

    _fields_: ClassVar = [
        ("hidden", _POINTER),
        ("normed", _POINTER),
        ("qkv", _POINTER),
        ("attended", _POINTER),
        ("gate_up", _POINTER),
        ("gated", _POINTER),
        ("rounded", _POINTER),
        ("row_scales", _POINTER),
        ("next_tasks", _POINTER),
        ("part_s", _POINTER),
    ]


class Ranks(ctypes.Structure):
    """`ranks` in ranks.h."""

    _fields_: ClassVar = [
        ("rank", _INT64),
        ("world_size", _INT64),
        ("slot_floats", _INT64),
        ("slots", _POINTER),
        ("arrivals", _POINTER),
        ("sum", SumOverRanks),
        ("patience_s", ctypes.c_double),
        ("num_meetings", _INT64),
        ("is_broken", _INT64),
        ("since_s", ctypes.c_double),
    ]
