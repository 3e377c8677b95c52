"""Small random models of the families people use: tilewise equals eager in logits, gradients and greedy generation."""

import pytest
from conftest import needs

needs("torch", "transformers")
import torch  # noqa: E402
import transformers  # noqa: E402

import tilewise.hf  # noqa: E402

VERSION = tuple(int(x) for x in transformers.__version__.split(".")[:2])
COMMON = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
GROUPED = dict(COMMON, num_key_value_heads=2, max_position_embeddings=64)
BERT = dict(COMMON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

# name: (config class, model class, config)
DECODERS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen2_window": ("Qwen2Config", "Qwen2ForCausalLM", dict(GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(GROUPED, head_dim=16)),
    "mistral_window": ("MistralConfig", "MistralForCausalLM", dict(GROUPED, sliding_window=5)),
    "gemma2_softcap": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(GROUPED, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    ),
    "gpt_oss_sinks": (
        "GptOssConfig",
        "GptOssForCausalLM",
        dict(GROUPED, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=1, attention_dropout=0.0),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    ),
}
ENCODERS = {
    "bert": ("BertConfig", "BertModel", BERT),
    "modernbert_window": (
        "ModernBertConfig",
        "ModernBertModel",
        dict(COMMON, num_hidden_layers=3, local_attention=8, global_attn_every_n_layers=3, reference_compile=False),
    ),
}
BART = dict(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
            decoder_start_token_id=2, forced_eos_token_id=None)  # fmt: skip
# These families had attention classes of their own a year ago, before Transformers gave them its attention interface.
NO_INTERFACE = {"bert", "modernbert_window"} if VERSION < (5, 0) else set()


@pytest.fixture(scope="module", autouse=True)
def registered():
    tilewise.hf.register()


def pair_of(config_class, model_class, options):
    """The same weights with eager and with tilewise attention."""
    models = []
    for implementation in ("eager", "tilewise"):
        torch.manual_seed(1)
        config = getattr(transformers, config_class)(**options)
        config._attn_implementation = implementation
        model = getattr(transformers, model_class)._from_config(config, attn_implementation=implementation).eval()
        if models:
            model.load_state_dict(models[0].state_dict())
        else:
            for name, parameter in model.named_parameters():  # scores of a trained model's size, not nearly uniform ones
                if any(part in name for part in ("q_proj", "k_proj", "Wqkv", "c_attn", "query", "key")):
                    parameter.data *= 8
                if "sinks" in name:
                    parameter.data.normal_()
        assert model.config._attn_implementation == implementation
        models.append(model)
    return models


def batch_of(side, lengths=(11, 7, 9)):
    torch.manual_seed(2)
    ids = torch.randint(3, 99, (len(lengths), max(lengths)))
    place = torch.arange(max(lengths))
    sizes = torch.tensor(lengths)[:, None]
    keep = {"none": place >= 0, "right": place < sizes, "left": place >= max(lengths) - sizes}[side]
    keep = keep.expand(len(lengths), -1).long()
    return ids * keep, keep


def outputs_of(model, ids, keep, weights, **inputs):
    """Output and all gradients of a loss over the tokens that are no padding."""
    model.zero_grad()
    result = model(input_ids=ids, attention_mask=keep, **inputs)
    output = result.logits if hasattr(result, "logits") else result.last_hidden_state
    output = output * weights[..., None]
    (output.square().mean() + output.sin().mean()).backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(eager, ours):
    torch.testing.assert_close(ours[0], eager[0], rtol=2e-4, atol=2e-5)
    assert eager[1].keys() == ours[1].keys()
    largest = max(gradient.abs().max().item() for gradient in eager[1].values())
    for name, gradient in eager[1].items():
        scale = max(gradient.abs().max().item(), 1e-3 * largest)  # that of a bias of keys is 0 but for rounding
        torch.testing.assert_close(ours[1][name] / scale, gradient / scale, rtol=0, atol=2e-4, msg=lambda text: f"{name}: {text}")


class Count:
    """Counts attention calls, and so shows that tilewise's are the ones that ran."""

    def __init__(self, monkeypatch):
        self.calls = 0
        attend = tilewise.hf.attend

        def counted(*args, **kwargs):
            self.calls += 1
            return attend(*args, **kwargs)

        monkeypatch.setattr(tilewise.hf, "attend", counted)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_logits_and_gradients(family, side, monkeypatch):
    if family in NO_INTERFACE:  # never another attention instead
        with pytest.raises(KeyError, match="tilewise"):
            model = pair_of(*ENCODERS[family])[1]
            model(*batch_of(side))
        return
    eager, ours = pair_of(*{**DECODERS, **ENCODERS}[family])
    ids, keep = batch_of(side)
    position_ids = {} if family in ENCODERS else {"position_ids": (keep.cumsum(-1) - 1).clamp(min=0)}
    if side == "none":
        keep = torch.ones_like(keep)
    expected = outputs_of(eager, ids, keep, keep.float(), **position_ids)
    count = Count(monkeypatch)
    assert_same(expected, outputs_of(ours, ids, keep, keep.float(), **position_ids))
    assert count.calls == eager.config.num_hidden_layers


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generation_with_cache(family, side, monkeypatch):
    eager, ours = pair_of(*DECODERS[family])
    ids, keep = batch_of(side)
    options = dict(attention_mask=keep, max_new_tokens=8, do_sample=False, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
    options["eos_token_id"] = None
    expected = eager.generate(ids, **options)
    count = Count(monkeypatch)
    got = ours.generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for score, right in zip(got.scores, expected.scores):
        torch.testing.assert_close(score, right, rtol=2e-4, atol=2e-5)
    assert count.calls == 8 * eager.config.num_hidden_layers


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side", ["none", "right"])
def test_the_models_mask_counts_where_a_layer_says_otherwise(side, compiled):
    """AIMv2's text layers say that they are not causal; their model hands them a causal mask, or none at all."""
    options = dict(COMMON, max_position_embeddings=32, eos_token_id=1, attention_dropout=0.0)
    del options["pad_token_id"]
    eager, ours = pair_of("Aimv2TextConfig", "Aimv2TextModel", options)
    if compiled:
        torch.compiler.reset()
        ours = torch.compile(ours, backend="eager")
    ids, keep = batch_of(side)
    with torch.no_grad():
        expected, got = (model(input_ids=ids, attention_mask=keep).last_hidden_state for model in (eager, ours))
        torch.testing.assert_close(got[keep.bool()], expected[keep.bool()], rtol=2e-4, atol=2e-5)
        expected, got = (model(input_ids=ids).last_hidden_state for model in (eager, ours))
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


def test_a_mask_without_padding_is_a_shape():
    from transformers.masking_utils import causal_mask_function

    queries = {"q_length": 5, "q_offset": 0} if VERSION >= (5, 0) else {"cache_position": torch.arange(5)}
    options = dict(kv_length=5, mask_function=causal_mask_function, **queries)
    mask = tilewise.hf.mask(2, **options)
    assert mask.shape == (0, 0, 5, 0, 1)
    assert tilewise.hf.mask(2, allow_is_causal_skip=False, **options).shape == (2, 1, 5, 5)  # the model joins it to another
    q, k, v = (torch.randn(2, 4, length, 8) for length in (5, 5, 5))
    expected = tilewise.torch.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    assert torch.equal(tilewise.hf.attention(None, q, k, v, mask, is_causal=False)[0], expected)
    longer = torch.randn(2, 4, 7, 8)
    for other in (mask, mask.new_ones(2, 5), mask.new_ones(2, 1, 5, 5)):
        with pytest.raises(ValueError, match="(there are|and) 7"):
            tilewise.hf.attention(None, q, longer, longer, other)


def test_inference_mode():
    eager, ours = pair_of(*DECODERS["llama"])
    ids, keep = batch_of("left")
    with torch.inference_mode():
        expected, got = (model(input_ids=ids, attention_mask=keep).logits[keep.bool()] for model in (eager, ours))
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


def test_generation_with_static_cache():
    eager, ours = pair_of(*DECODERS["llama"])
    ids, keep = batch_of("left")
    options = dict(attention_mask=keep, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    options.update(cache_implementation="static", disable_compile=True)
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("decoder_length", [6, 11])  # 11: as long as the encoder's batch, where masks are easily mistaken
def test_bart_cross_attention(side, decoder_length, monkeypatch):
    eager, ours = pair_of("BartConfig", "BartForConditionalGeneration", BART)
    ids, keep = batch_of(side)
    torch.manual_seed(3)
    decoder_ids = torch.randint(3, 99, (3, decoder_length))
    weights = torch.ones(3, decoder_length)
    expected = outputs_of(eager, ids, keep, weights, decoder_input_ids=decoder_ids)
    count = Count(monkeypatch)
    assert_same(expected, outputs_of(ours, ids, keep, weights, decoder_input_ids=decoder_ids))
    assert count.calls == 6
    options = dict(attention_mask=keep, max_new_tokens=6, do_sample=False, num_beams=1, eos_token_id=None)
    assert torch.equal(ours.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("side", ["none", "left"])
def test_compiled_model(side):
    """torch.compile gives mask functions more to do: it cannot look whether a row holds several sequences."""
    _, ours = pair_of(*DECODERS["mistral_window"])
    ids, keep = batch_of(side)
    inputs = {"input_ids": ids, "use_cache": False} if side == "none" else {"input_ids": ids, "use_cache": False, "attention_mask": keep}
    torch.compiler.reset()
    with torch.no_grad():
        expected, got = ours(**inputs).logits, torch.compile(ours, backend="eager")(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_packed_rows():
    """Several sequences in one row, told by position_ids alone, are the sequences one by one."""
    _, ours = pair_of(*DECODERS["mistral_window"])
    ids, _ = batch_of("none", lengths=(13,))
    lengths = (4, 8, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([ours(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_flattened_batch():
    """Sequences one after the other with their lengths, as DataCollatorWithFlattening gives them, are the sequences one by one."""
    _, ours = pair_of(*DECODERS["mistral_window"])
    ids, _ = batch_of("none", lengths=(13,))
    lengths = (9, 1, 3)
    starts = torch.tensor([0, 9, 10, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    sizes = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 9, "max_length_k": 9}
    with torch.no_grad():
        flat = ours(input_ids=ids, position_ids=positions, use_cache=False, **sizes).logits
        alone = torch.cat([ours(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(flat, alone, rtol=1e-4, atol=1e-5)


def test_a_mask_of_its_own_is_used_or_refused():
    eager, ours = pair_of(*DECODERS["llama"])
    ids, keep = batch_of("left")
    causal = torch.ones(11, 11).tril().bool()[None, None] & keep.bool()[:, None, None]
    with torch.no_grad():
        for mask in (causal, torch.where(causal, 0.0, torch.finfo(torch.float32).min)):
            expected = eager(input_ids=ids, attention_mask=torch.where(causal, 0.0, torch.finfo(torch.float32).min)).logits
            got = ours(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(got[keep.bool()], expected[keep.bool()], rtol=2e-4, atol=2e-5)
        prefix = causal.clone()
        prefix[..., :4, :4] = True
        with pytest.raises(NotImplementedError, match="more than padding"):
            ours(input_ids=ids, attention_mask=prefix)
        with pytest.raises(NotImplementedError, match="more than padding"):
            ours(input_ids=ids, attention_mask=torch.where(causal, 0.25, torch.finfo(torch.float32).min))


@pytest.mark.parametrize("says_causal", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_four_dimensions_counts_more_than_the_layer(causal, says_causal):
    """LayoutLM's encoder leaves it to the mask that it is not causal."""
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    mask = keep[:, None, None] & torch.ones(5, 5).tril().bool() if causal else keep[:, None, None]
    o, _ = tilewise.hf.attention(None, q, k, v, mask, is_causal=says_causal)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(o[keep], expected[keep])


@pytest.mark.parametrize("says_causal", [False, True])
def test_a_dense_mask_with_more_queries_than_keys(says_causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8) for length in (7, 5, 5))
    mask = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, None].expand(-1, -1, 7, -1)
    o, _ = tilewise.hf.attention(None, q, k, v, mask, is_causal=says_causal)
    torch.testing.assert_close(o.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    for other in (mask.tril(), mask.tril(-2), mask.tril(1)):
        with pytest.raises(NotImplementedError, match="more than padding and a band .tried: the layer's window, -1 keys back and"):
            tilewise.hf.attention(None, q, k, v, other, is_causal=says_causal)


def test_what_is_not_there_is_refused():
    _, model = pair_of("LlamaConfig", "LlamaForCausalLM", dict(GROUPED, attention_dropout=0.1))
    ids, keep = batch_of("none")
    model(input_ids=ids)
    with pytest.raises(NotImplementedError, match="dropout 0.1"):
        model.train()(input_ids=ids)


def test_a_model_that_attends_by_itself_is_refused():
    # It asks for a mask, which is None where nothing is padded, and would see the future.
    tilewise.hf.register()
    config = transformers.XGLMConfig(vocab_size=50, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2, attn_implementation="tilewise")
    if VERSION < (5, 0):
        pytest.skip("this Transformers makes XGLM's masks itself")
    model = transformers.XGLMForCausalLM(config)
    with pytest.raises(NotImplementedError, match="xglm.*attention interface"):
        model(torch.arange(8)[None])


@pytest.mark.skipif(VERSION < (5, 0), reason="before Transformers 5 a model that is compiled gives SDPA a mask, which no flash kernel takes")
@pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="this PyTorch has no SDPA implementations")
def test_compiled_model_with_sdpa(monkeypatch):
    """What attn_implementation="sdpa" computes, where SDPA is tilewise's."""
    model = pair_of(*DECODERS["llama"])[0]
    ids, keep = batch_of("none")
    expected = outputs_of(model, ids, keep, torch.ones(ids.shape))
    model.set_attn_implementation("sdpa")
    calls, call = [], tilewise.torch._core.Call
    monkeypatch.setattr(tilewise.torch._core, "Call", lambda *args: (calls.append(args), call(*args))[1])
    tilewise.torch.install()
    torch.nn.attention.activate_flash_attention_impl("tilewise")
    torch.compiler.reset()
    try:
        model.compile()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, expected[0], rtol=2e-4, atol=2e-5)
        assert len(calls) == 2  # layers
        assert_same(expected, outputs_of(model, ids, None, torch.ones(ids.shape)))
        assert len(calls) == 2 + 4
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        torch.compiler.reset()
