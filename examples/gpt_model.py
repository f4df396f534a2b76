"""A decoder-only transformer over bytes, its sizes, and the split of its params in two groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """One size of the model.

    ``context`` is in bytes, ``lr`` is the peak learning rate for AdamW.
    """

    layers: int
    heads: int
    width: int
    context: int
    lr: float
    vocab: int = 256


# The gpt2 sizes keep GPT-2's padded vocabulary, of which bytes use the first 256 rows: so the
# number of params, and with it the optimizer's work, is the one that their names stand for.
SIZES = {
    "tiny": GPTConfig(layers=4, heads=4, width=128, context=128, lr=3e-3),
    "small": GPTConfig(layers=6, heads=6, width=384, context=256, lr=1.5e-3),
    "gpt2-124m": GPTConfig(layers=12, heads=12, width=768, context=1024, lr=6e-4, vocab=50304),
    "gpt2-350m": GPTConfig(layers=24, heads=16, width=1024, context=1024, lr=3e-4, vocab=50304),
    "gpt2-774m": GPTConfig(layers=36, heads=20, width=1280, context=1024, lr=2.5e-4, vocab=50304),
    "gpt2-1558m": GPTConfig(layers=48, heads=25, width=1600, context=1024, lr=2e-4, vocab=50304),
}


def rotary_table(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding (arXiv:2104.09864).

    Both are float32 [context, width / heads / 2].
    """
    half = config.width // config.heads // 2
    # Not torch's cos and sin: on a CPU the first large call of either in a process can return a
    # thread's part with an error of 1e-4 (pytorch#188792), so a resumed run could have another
    # table than the run that it continues.
    frequencies = 10000.0 ** -(np.arange(half) / half)
    angles = np.outer(np.arange(config.context), frequencies)
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[..., i], x[..., i + half]) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm and added to the residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [batch, time, width] to the same shape; cos and sin hold ``time`` rows."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        # Three of [batch, heads, time, width / heads].
        q, k, v = qkv.view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(batch, time, width))
        # Squared ReLU (arXiv:2109.08668) learns faster here than GELU, and costs less on a CPU.
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; the output matrix is the token embedding (tied)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, param in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(param)
            elif param.ndim == 2:
                # 0.02 at GPT-2's width, more in narrower models. What writes to the residual
                # stream starts smaller, so that its variance does not grow with the depth.
                std = (3 * config.width) ** -0.5
                if name.endswith(("attention_out.weight", "mlp_out.weight")):
                    std /= (2 * config.layers) ** 0.5
                nn.init.normal_(param, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Map int64 bytes [batch, time] to logits [batch, time, vocab] in the params' dtype."""
        time = x.shape[1]
        h = self.tokens(x)
        for block in self.blocks:
            h = block(h, self.cos[:time], self.sin[:time])
        return F.linear(self.norm(h), self.tokens.weight)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats a byte, 0-dim float32, of int64 [batch, time] twice."""
        return F.cross_entropy(self(x).flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, seed: int, temperature: float = 0.8) -> bytes:
        """Continue ``prompt`` by ``count`` bytes, drawn on the CPU from a generator of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        text = bytearray(prompt)
        for _ in range(count):
            x = torch.tensor([list(text[-self.config.context :])], device=self.cos.device)
            logits = self(x)[0, -1, :256].float().cpu()
            chances = torch.softmax(logits / temperature, dim=0)
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
        return bytes(text)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the params in two groups: decay for matrices, none for embeddings, biases, norms.

    A param that two modules share (a tied embedding) is listed once.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    matrices, others = [], []
    for param in model.parameters():
        is_matrix = param.ndim >= 2 and id(param) not in embeddings
        (matrices if is_matrix else others).append(param)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
