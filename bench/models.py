"""Tensor lists of real models, computed from their published shapes.

A list names every trainable param once, in the order of the layers; tied weights once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


def gpt2(layers: int = 12, width: int = 768, vocab: int = 50257) -> tuple[Shape, ...]:
    """GPT-2 (124M by default; Radford et al. 2019), wte tied to the output layer."""
    block: list[Shape] = [
        (width,), (width,),  # ln_1
        (width, 3 * width), (3 * width,),  # attn.c_attn
        (width, width), (width,),  # attn.c_proj
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,),  # mlp.c_fc
        (4 * width, width), (width,),  # mlp.c_proj
    ]  # fmt: skip
    return ((vocab, width), (1024, width), *(block * layers), (width,), (width,))


@dataclass(frozen=True)
class Llama:
    """Llama 2 (arXiv:2307.09288) and 3 (arXiv:2407.21783): SwiGLU, RMSNorm, no biases, and
    grouped-query attention where `key_width` is less than `width`."""

    layers: int
    width: int
    hidden: int
    key_width: int
    vocab: int = 128256
    tied: bool = False

    def shapes(self) -> tuple[Shape, ...]:
        width, hidden, keys = self.width, self.hidden, self.key_width
        block: list[Shape] = [
            (width,),
            *((width, width), (keys, width), (keys, width), (width, width)),  # q, k, v, o
            (width,),
            *((hidden, width), (hidden, width), (width, hidden)),  # gate, up, down
        ]
        head: list[Shape] = [] if self.tied else [(self.vocab, width)]
        return ((self.vocab, width), *(block * self.layers), (width,), *head)


LLAMA_1B = Llama(layers=16, width=2048, hidden=8192, key_width=512, tied=True)
LLAMA_7B = Llama(layers=32, width=4096, hidden=11008, key_width=4096, vocab=32000)
LLAMA_8B = Llama(layers=32, width=4096, hidden=14336, key_width=1024)
LLAMA_70B = Llama(layers=80, width=8192, hidden=28672, key_width=1024)


def shard(shapes: tuple[Shape, ...], ranks: int) -> tuple[Shape, ...]:
    """What FSDP2 leaves of each param on its first rank: the first of `ranks` chunks of dim 0."""
    return tuple((math.ceil(s[0] / ranks), *s[1:]) for s in shapes)


def vit_large() -> tuple[Shape, ...]:
    """ViT-L/16 at 224 pixels (arXiv:2010.11929), 304M."""
    width = 1024
    block: list[Shape] = [
        (width,), (width,),
        (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,),
        (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    stem: list[Shape] = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return (*stem, *(block * 24), (width,), (width,), (1000, width), (1000,))


def resnet50() -> tuple[Shape, ...]:
    """ResNet-50 (arXiv:1512.03385), 25.6M in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for blocks, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        for block in range(blocks):
            convolutions = [(width, inputs, 1), (width, width, 3), (4 * width, width, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1))  # the shortcut
            for out, into, kernel in convolutions:
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            inputs = 4 * width
    return (*shapes, (1000, 2048), (1000,))


def lora(model: Llama = LLAMA_8B, rank: int = 16) -> tuple[Shape, ...]:
    """LoRA (arXiv:2106.09685) on every linear layer of the blocks: matrices A and B of each."""
    linear = [s for s in model.shapes() if len(s) == 2 and model.vocab not in s]
    return tuple(shape for out, into in linear for shape in ((rank, into), (out, rank)))


def mixture_of_experts(ranks: int = 64) -> tuple[Shape, ...]:
    """One FSDP rank's share of OLMoE-1B-7B (arXiv:2409.02060): 16 layers of 64 experts."""
    width, hidden, vocab = 2048, 1024, 50304
    expert: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    attention: list[Shape] = [(width, width)] * 4 + [(width,)] * 4  # q, k, v, o; norms
    layer = [*attention, (64, width), *(expert * 64)]
    return shard(((vocab, width), *(layer * 16), (width,), (vocab, width)), ranks)


def layerwise_groups(groups: int = 465) -> tuple[Shape, ...]:
    """A detection transformer whose params each have a group with an lr of their own, as those of
    layer-wise lr decay: `groups` tensors, three vectors to each matrix, of width 256."""
    return tuple((256, 256) if i % 4 == 0 else (256,) for i in range(groups))


def numel(shapes: tuple[Shape, ...]) -> int:
    """Elements of all shapes together."""
    return sum(map(math.prod, shapes))
