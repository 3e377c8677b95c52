#!/usr/bin/env python3
"""What the Python package costs and brings on a GPU: host time of a call, training of a small GPT, prefill of a model of a pretrained
one's size (random weights), beside PyTorch's scaled_dot_product_attention.

Usage: python_gpu.py [--host-cost BINARY] [--out results.json]. BINARY is bench/host_cost: what the same call costs in C++.
Contenders take turns step by step; figures are medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{__doc__}\nNeeds PyTorch: pip install torch")
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import results
import tilewise.torch


def host_us(call, calls=50):
    """Microseconds of the host for one call: as many as a stream holds without waiting, the device idle before."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def sdpa(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attend


CONTENDERS = {
    "tilewise": lambda q, k, v: tilewise.torch.attention(q, k, v, causal=True),
    "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
}


def host_cost(binary, turns=5, rounds=40):
    """Hosts are shared and change their speed within seconds: all take turns, C++ too, and what is above C++ is above that of its turn."""
    q, k, v = (torch.randn(1, 128, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    trained = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    trained_first = [x.clone().requires_grad_() for x in heads_first]
    do = torch.randn_like(q)
    attend, operator, flash = CONTENDERS["tilewise"], torch.ops.tilewise.forward, F.scaled_dot_product_attention
    o = attend(*trained)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        o_flash = flash(*trained_first, is_causal=True)

    def without_gradients(call):
        def measured():
            with torch.no_grad():
                return host_us(call)

        return measured

    def gradients(o, inputs, do):
        return lambda: host_us(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True), calls=20)

    measures = {
        "no_grad_us": without_gradients(lambda: attend(q, k, v)),
        "operator_us": without_gradients(lambda: operator(q, k, v, *[None] * 6, 0.0, -1, 0, False, 0, 0, False)),
        "autograd_us": lambda: host_us(lambda: attend(*trained)),
        "backward_us": gradients(o, trained, do),
        "empty_pair_us": lambda: host_us(lambda: (torch.empty_like(q), q.new_empty((1, 4, 128), dtype=torch.float32))),
        "sdpa_flash_no_grad_us": without_gradients(lambda: flash(*heads_first, is_causal=True)),
        "sdpa_flash_autograd_us": lambda: host_us(lambda: flash(*trained_first, is_causal=True)),
        "sdpa_flash_backward_us": gradients(o_flash, trained_first, do.transpose(1, 2)),
    }
    times = {}
    for _ in range(turns):
        if binary:
            cpp = json.loads(subprocess.run([binary], capture_output=True, text=True, check=True).stdout)
            for name in ("run_us", "empty_launch_us", "plan_and_run_us"):
                times.setdefault(f"cpp_{name}", []).append(cpp[name])
        turn = {name: [] for name in measures}
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for _ in range(rounds):
                for name, measure in measures.items():
                    turn[name].append(measure())
        for name, values in turn.items():
            times.setdefault(name, []).append(statistics.median(values))
            if binary and name in ("no_grad_us", "operator_us", "autograd_us"):
                times.setdefault(f"{name}_above_cpp", []).append(times[name][-1] - cpp["run_us"])
    times = {name: [round(value, 2) for value in values] for name, values in times.items()}
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {"problem": "q128 h4 d128 bf16 causal"} | medians | {"turns": {name: times[name] for name in times if not name.endswith("above_cpp")}}


class Gpt(torch.nn.Module):
    """GPT-2 small with four key/value heads: 12 layers, width 768, 12 heads of 64."""

    WIDTH, HEADS, KV, DIM, LAYERS, VOCABULARY = 768, 12, 4, 64, 12, 50304

    def __init__(self, context):
        super().__init__()
        w, kv = self.WIDTH, self.KV
        self.tokens, self.places = torch.nn.Embedding(self.VOCABULARY, w), torch.nn.Embedding(context, w)
        layers = [("n1", lambda: torch.nn.LayerNorm(w)), ("qkv", lambda: torch.nn.Linear(w, w + 2 * kv * self.DIM)), ("out", lambda: torch.nn.Linear(w, w)),
                  ("n2", lambda: torch.nn.LayerNorm(w)), ("up", lambda: torch.nn.Linear(w, 4 * w)), ("down", lambda: torch.nn.Linear(4 * w, w))]  # fmt: skip
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({name: make() for name, make in layers}) for _ in range(self.LAYERS))
        self.norm = torch.nn.LayerNorm(w)
        torch.nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids, attend):
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for b in self.blocks:
            q, k, v = b["qkv"](b["n1"](x)).unflatten(-1, (-1, self.DIM)).split([self.HEADS, self.KV, self.KV], 2)
            x = x + b["out"](attend(q, k, v).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["n2"](x))))
        return F.linear(self.norm(x), self.tokens.weight)


def training(context, tokens=16384, steps=8):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Gpt(context).bfloat16()
        ids = torch.randint(Gpt.VOCABULARY, (tokens // context, context + 1))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(attend):
        loss = F.cross_entropy(model(ids[:, :-1], attend).flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    row = {"context": context, "tokens": tokens}
    times, losses = {name: [] for name in CONTENDERS}, {name: [] for name in CONTENDERS}
    for name, attend in CONTENDERS.items():  # the same four steps for each, for their losses; they warm up too
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), start)
        optimizer.state.clear()
        losses[name] = [step(attend).item() for _ in range(4)]
    for _ in range(steps):
        for name, attend in CONTENDERS.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step(attend)
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    row["tokens_per_second"] = {name: round(tokens / statistics.median(t)) for name, t in times.items()}
    row["losses"] = losses
    return row


def prefill(length=8192, repetitions=5):
    """Llama 3.2 1B's shape, a prompt of `length` tokens, logits of the last."""
    import transformers

    import tilewise.hf

    tilewise.hf.register()
    config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                                      head_dim=64, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(config.vocab_size, (1, length))
    torch.set_default_dtype(torch.float32)
    row, times, logits = {"model": "shape of Llama 3.2 1B, random weights, bf16", "prompt": length}, {}, {}
    names = ("tilewise", "sdpa", "eager")
    with torch.inference_mode():
        for turn in range(repetitions + 1):
            for name in names:
                model.set_attn_implementation(name)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                logits[name] = model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].float()
                torch.cuda.synchronize()
                if turn:
                    times.setdefault(name, []).append(time.perf_counter() - begin)
    row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()}
    difference = lambda a, b: ((logits[a] - logits[b]).norm() / logits[b].norm()).item()  # noqa: E731
    row["relative_difference_of_logits"] = {f"{a} {b}": difference(a, b) for a, b in (("tilewise", "eager"), ("sdpa", "eager"), ("tilewise", "sdpa"))}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host-cost", metavar="BINARY")
    parser.add_argument("--out")
    args = parser.parse_args()
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "host": host_cost(args.host_cost)}
    print(json.dumps(result), flush=True)
    result["training"] = []
    for context in (2048, 8192):
        result["training"].append(training(context))
        print(json.dumps(result["training"][-1]), flush=True)
    result["prefill"] = prefill()
    print(json.dumps(result["prefill"]), flush=True)
    if args.out:
        results.save("python", result, args.out)


if __name__ == "__main__":
    main()
