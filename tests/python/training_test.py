"""A small GPT trains on real text: with tilewise the loss falls as with eager attention, step for step."""

import importlib
import pathlib
import sys

from conftest import needs

needs("torch")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))


def test_loss_curves_coincide():
    example = importlib.import_module("07_torch")
    slightly_wrong = lambda q, k, v: example.tilewise.torch.attention(q, k, v, causal=True, softmax_scale=0.2525)  # noqa: E731: 1 % off
    eager, ours, wrong = (example.train(attend, 200) for attend in (example.eager, example.flash, slightly_wrong))
    assert sum(eager[-10:]) / 10 < 0.5 * eager[0]
    differ = lambda losses: max(abs(a - b) for a, b in zip(eager, losses))  # noqa: E731
    assert differ(ours) < 1e-5 < 1e-4 < differ(wrong)


def test_example_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["07_torch.py", "--steps", "3"])
    importlib.import_module("07_torch").main()
    assert "largest difference" in capsys.readouterr().out
