#!/usr/bin/env python3
"""A small GPT learns real text with tilewise's attention and with the textbook's, from the same seed: the loss curves coincide.

pip install . torch, then: python examples/07_torch.py [--steps 300] [--plot curves.svg]. About a minute on two cores.
The text is the Python language reference that every Python carries (pydoc_data), read as bytes.
"""

import argparse
import pydoc_data.topics

import torch
import torch.nn.functional as F

import tilewise.torch

CONTEXT, WIDTH, HEADS, KV_HEADS, LAYERS, BATCH = 128, 64, 4, 2, 2, 8


def eager(q, k, v):
    """The textbook: scores and probabilities of every pair in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def flash(q, k, v):
    return tilewise.torch.attention(q, k, v, causal=True)  # 4 heads of q share 2 of k and v


class Block(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.dim = attend, WIDTH // HEADS
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = torch.nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * self.dim)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (-1, self.dim)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)  # views: no copy
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Gpt(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(256, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
        self.blocks = torch.nn.Sequential(*(Block(attend) for _ in range(LAYERS)))
        self.head = torch.nn.Linear(WIDTH, 256)

    def forward(self, ids):
        return self.head(self.blocks(self.tokens(ids) + self.places.weight[: ids.shape[1]]))


def train(attend, steps, device="cpu"):
    """The loss of each step, in nats a byte."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray("".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8).long().to(device)
    model = Gpt(attend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,))
        window = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plot(path, curves):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 4.5), height_ratios=(3, 1), layout="constrained")
    above.plot(curves["eager"], linewidth=4, color="0.8", label="eager attention")
    above.plot(curves["tilewise"], linewidth=1, color="tab:blue", label="tilewise")
    above.set(ylabel="loss, nats a byte", title="A small GPT reads the Python reference, same seed")
    above.legend()
    below.plot([abs(a - b) for a, b in zip(curves["eager"], curves["tilewise"])], linewidth=1, color="tab:blue")
    below.set(xlabel="step", ylabel="difference")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--plot", metavar="FILE.svg", help="draw both curves (needs Matplotlib)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    curves = {name: train(attend, arguments.steps, arguments.device) for name, attend in (("eager", eager), ("tilewise", flash))}
    for step in [*range(0, arguments.steps, max(arguments.steps // 10, 1)), arguments.steps - 1]:
        print(f"step {step:4}: eager {curves['eager'][step]:.5f}, tilewise {curves['tilewise'][step]:.5f}")
    print(f"largest difference of a step: {max(abs(a - b) for a, b in zip(*curves.values())):.1e}")
    if arguments.plot:
        plot(arguments.plot, curves)


if __name__ == "__main__":
    main()
