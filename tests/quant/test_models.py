from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from methodbench.context import Context
from methodbench.errors import NotApplicableError, ParameterError, SourceError
from methodbench.params import build
from methodbench.sources import data_path, fetch, is_cached
from methodbench.torchkit.size import bits_per_weight
from methodbench_quant.models.causal_lm import GGUFCausalLM, HubCausalLM
from methodbench_quant.models.entries import MODELS, model_named
from methodbench_quant.models.sentence import SentenceEncoder, encode

ENTRIES = {entry.name: entry for entry in MODELS}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<s>"
    )


def repository(
    folder: Path, config: hf.PretrainedConfig, dtype: torch.dtype = torch.float32
) -> hf.PreTrainedModel:
    """Save a random model and its tokenizer as a hub repository would have them; return the model."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def llama(vocab_size: int = 258) -> hf.LlamaConfig:
    return hf.LlamaConfig(**SIZES, vocab_size=vocab_size, num_key_value_heads=1, tie_word_embeddings=True)


def prepared(loader: object, source: Path, target: Path) -> Path:
    target.mkdir()
    loader.prepare(source, target, Context())
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(258, (2, 16), generator=torch.Generator().manual_seed(0))


def test_a_hub_model_computes_what_it_computed_there(tmp_path, tokens):
    original = repository(tmp_path / "hub", llama())
    loader = HubCausalLM()
    model = loader.load(prepared(loader, tmp_path / "hub", tmp_path / "cache"), Context())
    assert model.kind == "causal-lm"
    assert model.storage == "dense"
    assert model.facts["parameters"] == sum(p.numel() for p in original.parameters())
    torch.testing.assert_close(logits(model.module, tokens), logits(original, tokens))
    assert model.tokenizer("ab c")["input_ids"] == byte_tokenizer()("ab c")["input_ids"]


def test_a_loaded_model_is_ready_to_be_evaluated(tmp_path):
    repository(tmp_path / "hub", llama())
    loader = HubCausalLM()
    module = loader.load(prepared(loader, tmp_path / "hub", tmp_path / "cache"), Context()).module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.config.use_cache is False
    assert module.config._attn_implementation == "sdpa"
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_weights_are_mapped_into_memory(tmp_path):
    repository(tmp_path / "hub", llama())
    loader = HubCausalLM()
    folder = prepared(loader, tmp_path / "hub", tmp_path / "cache")
    module = loader.load(folder, Context()).module
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    for name, parameter in module.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name


def test_the_prepared_folder_is_the_same_wherever_it_is_made(tmp_path):
    repository(tmp_path / "here", llama())
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere")
    first = contents(prepared(HubCausalLM(), tmp_path / "here", tmp_path / "a"))
    second = contents(prepared(HubCausalLM(), tmp_path / "elsewhere", tmp_path / "b"))
    assert first == second
    assert not any(path.encode() in data for data in first.values() for path in (str(tmp_path), "elsewhere"))


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 32), ("bfloat16", 16)])
def test_weights_are_converted_once_to_the_wanted_precision(tmp_path, dtype, bits):
    repository(tmp_path / "hub", llama(), torch.float16)
    loader = build(HubCausalLM, {"dtype": dtype}, "hub")
    model = loader.load(prepared(loader, tmp_path / "hub", tmp_path / "cache"), Context())
    assert model.module.dtype == getattr(torch, dtype)
    assert bits_per_weight(model) == bits


def test_experts_of_a_hub_model_are_layers_that_methods_find(tmp_path, tokens):
    config = hf.MixtralConfig(**SIZES, vocab_size=258, num_key_value_heads=2, num_local_experts=4)
    original = repository(tmp_path / "hub", config)
    loader = HubCausalLM()
    model = loader.load(prepared(loader, tmp_path / "hub", tmp_path / "cache"), Context())
    assert len(model.adapter.targets(model.module)) == 2 * (4 + 4 * 3)
    torch.testing.assert_close(logits(model.module, tokens), logits(original, tokens), rtol=1e-4, atol=1e-5)


def test_pickled_weights_are_refused_by_name(tmp_path):
    model = repository(tmp_path / "hub", llama())
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin, and pickles are never read") as refused:
        prepared(HubCausalLM(), tmp_path / "hub", tmp_path / "cache")
    assert "safetensors" in refused.value.hint


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights at all"),
        (lambda folder: (folder / "config.json").unlink(), r"not a folder with a model's config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot read"),
        (
            lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}),
            "quantized already",
        ),
        (
            lambda folder: change_config(
                folder, model_type="homemade", auto_map={"AutoConfig": "configuration_homemade.Homemade"}
            ),
            "cannot read",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no usable tokenizer"),
    ],
    ids=["no weights", "no config", "broken config", "quantized", "own code", "no tokenizer"],
)
def test_a_folder_that_cannot_be_used_is_refused_with_a_remedy(tmp_path, damage, message):
    repository(tmp_path / "hub", llama())
    damage(tmp_path / "hub")
    with pytest.raises(SourceError, match=message) as refused:
        prepared(HubCausalLM(), tmp_path / "hub", tmp_path / "cache")
    assert refused.value.hint


def test_a_structure_without_adapter_is_refused_before_it_is_cached(tmp_path):
    repository(tmp_path / "hub", hf.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(NotApplicableError, match="no adapter fits the structure of GPT2LMHeadModel"):
        prepared(HubCausalLM(), tmp_path / "hub", tmp_path / "cache")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ParameterError, match="dtype = 'int8'"):
        build(GGUFCausalLM, {"dtype": "int8"}, "smollm2-135m")


def write_gguf(path: Path, config: hf.LlamaConfig, weights: dict[str, np.ndarray]) -> None:
    """Write a Llama with a byte-level tokenizer, its large weights in the format of llama.cpp's Q8_0."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *ALPHABET, "ab"])
    writer.add_token_types([3, 3, *(1 for _ in ALPHABET), 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in weights.items():
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_weights(config: hf.LlamaConfig) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"token_embd": (config.vocab_size, hidden), "output_norm": (hidden,)}
    for index in range(config.num_hidden_layers):
        shapes |= {
            f"blk.{index}.attn_norm": (hidden,),
            f"blk.{index}.ffn_norm": (hidden,),
            f"blk.{index}.attn_q": (wide, hidden),
            f"blk.{index}.attn_k": (narrow, hidden),
            f"blk.{index}.attn_v": (narrow, hidden),
            f"blk.{index}.attn_output": (hidden, wide),
            f"blk.{index}.ffn_gate": (inner, hidden),
            f"blk.{index}.ffn_up": (inner, hidden),
            f"blk.{index}.ffn_down": (hidden, inner),
        }
    return {
        f"{name}.weight": draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


def test_a_gguf_file_becomes_a_plain_model_with_the_decoded_weights(tmp_path, tokens):
    gguf = pytest.importorskip("gguf")
    config = llama(vocab_size=259)
    weights = gguf_weights(config)
    write_gguf(tmp_path / "tiny.gguf", config, weights)
    loader = GGUFCausalLM()
    folder = prepared(loader, tmp_path / "tiny.gguf", tmp_path / "cache")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = loader.load(folder, Context())
    up = weights["blk.1.ffn_up.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    decoded = gguf.quants.dequantize(gguf.quants.quantize(up, kind), kind)
    assert np.array_equal(model.module.model.layers[1].mlp.up_proj.weight.numpy(), decoded)
    assert not np.array_equal(decoded, up)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert bits_per_weight(model) == 32
    assert torch.isfinite(logits(model.module, tokens)).all()
    assert model.tokenizer.decode(model.tokenizer("abc")["input_ids"]) == "abc"
    shutil.move(tmp_path / "tiny.gguf", tmp_path / "moved.gguf")
    assert contents(prepared(loader, tmp_path / "moved.gguf", tmp_path / "again")) == contents(folder)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(SourceError, match=r"model\.gguf is not a GGUF file"):
        prepared(GGUFCausalLM(), path, tmp_path / "cache")


def sentence_repository(folder: Path, pooling: str = "pooling_mode_mean_tokens") -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SIZES, vocab_size=258)).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, pooling: True})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    return model


def test_a_sentence_is_the_mean_of_its_tokens_at_length_one(tmp_path):
    original = sentence_repository(tmp_path / "source")
    loader = SentenceEncoder()
    model = loader.load(prepared(loader, tmp_path / "source", tmp_path / "cache"), Context())
    assert model.kind == model.adapter.kind == "sentence-encoder"
    sentences = ["one", "a longer sentence", "x" * 40]
    vectors = encode(model, sentences, batch_size=2)
    for sentence, vector in zip(sentences, vectors, strict=True):
        ids = torch.tensor([byte_tokenizer()(sentence)["input_ids"][:24]])
        with torch.no_grad():
            mean = original(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_another_pooling_is_refused(tmp_path):
    sentence_repository(tmp_path / "source", "pooling_mode_cls_token")
    with pytest.raises(SourceError, match="asks for pooling_mode_cls_token"):
        prepared(SentenceEncoder(), tmp_path / "source", tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["hub:org/name", "hub:Org/Name-1.5@main", "hub:org/name@0a1b2c3d", "hub:gpt2"]
)
def test_any_hub_model_is_a_language_model_by_its_name(name):
    entry = model_named(name)
    assert entry is not None
    assert (entry.name, entry.source, entry.kind) == (name, name, "causal-lm")
    assert bool(entry.notes) == ("@" not in name)


@pytest.mark.parametrize(
    "name", ["hub:timm/resnet18", "smollm2-135m", "hub:", "hub:a/b/c", "hub:../x", "file:x"]
)
def test_other_names_are_left_to_others(name):
    assert model_named(name) is None


def real(name: str, target: Path) -> tuple[object, Path]:
    """Return loader and prepared folder of a listed model; skip where its source is not on this machine."""
    entry = ENTRIES[name]
    if not is_cached(entry.source, entry.sha256):
        pytest.skip(f"{entry.source} is not in the cache: run `methodbench sources fetch {name}`")
    loader = {"smollm2-135m": GGUFCausalLM, "minilm-l6": SentenceEncoder}[name]()
    return loader, prepared(loader, fetch(entry.source, sha256=entry.sha256).path, target)


@pytest.mark.slow
def test_smollm2_has_the_known_perplexity_on_wikitext2(tmp_path):
    text = data_path("wikitext2/test.txt")
    if text is None:
        pytest.skip("METHODBENCH_DATA has no wikitext2/test.txt")
    loader, folder = real("smollm2-135m", tmp_path / "cache")
    model = loader.load(folder, Context())
    assert model.facts["parameters"] == 134_515_008
    assert len(model.adapter.targets(model.module)) == 30 * 7
    start = text.read_text(encoding="utf-8")[:20_000]
    tokens = model.tokenizer(start, return_tensors="pt")["input_ids"][0, :2048]
    losses = []
    for window in tokens.view(4, 512):
        scores = logits(model.module, window[None])[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores, window[1:]))
    assert torch.stack(losses).mean().exp().item() == pytest.approx(25.49, rel=1e-3)


@pytest.mark.slow
def test_minilm_puts_paraphrases_close_together(tmp_path):
    loader, folder = real("minilm-l6", tmp_path / "cache")
    model = loader.load(folder, Context())
    vectors = encode(
        model, ["A man plays the guitar.", "Someone is making music.", "The invoice is overdue."]
    )
    close, far = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert vectors.shape == (3, 384)
    assert close > far + 0.3
