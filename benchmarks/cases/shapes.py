"""Shapes of the models that the paper and its readers train, and of small ones for a CPU."""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    """An unembedding."""

    width: int
    vocabulary: int


HEADS = {
    "qwen3-4b": Head(2560, 151936),
    "qwen3-8b": Head(4096, 151936),
    "octothinker-3b": Head(3072, 128256),
    "octothinker-8b": Head(4096, 128256),
    "gemma3-4b": Head(2560, 262144),
}
CPU_HEAD = Head(1024, 32000)
SMALL_HEAD = Head(512, 16000)  # a quarter of the work


class Attention(NamedTuple):
    """Query heads, key heads, head dimension."""

    heads: int
    key_heads: int
    dim: int


ATTENTIONS = {
    "qwen3-4b": Attention(32, 8, 128),
    "octothinker-3b": Attention(24, 8, 128),
    "64-wide": Attention(32, 8, 64),
}
CPU_ATTENTION = Attention(4, 4, 32)


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
