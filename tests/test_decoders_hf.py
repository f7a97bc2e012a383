"""Decoders of Hugging Face folders: logits of transformers, every spelling of a configuration, and the doors."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor

import mm_gpt
from mm_gpt.commands.cli import main
from mm_gpt.config import override
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.decoders import DEFAULTS, decoder_config
from mm_gpt.hub.export.decoders import essence
from mm_gpt.model.cache import KVCache
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Example, collate
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.language import LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.training.recipes import finetune

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

CLASSES = {
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
}
VOCAB = 300
LENGTHS = (5, 19, 12)
ATOL = 1e-4
"""Logits of about 1 in float32, whose sums differ in order by 1e-6; what the cases are about shows at 1e-2."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 inner": ("gpt2", {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-2}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral without": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3 windows": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rms_norm_eps": 1e-2},
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 without": ("gemma2", GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA2 | {"sliding_window_pattern": 3}),
    "gemma3 linear": (
        "gemma3_text",
        GEMMA2
        | {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e3},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
}
MATTERS: dict[str, dict[str, Any]] = {
    "gpt2": {"layer_norm_epsilon": 1e-2},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama linear": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
    "mistral": {"sliding_window": 6},
    "qwen2 windows": {"layer_types": ["full_attention"] + ["sliding_attention"] * 3},
    "qwen3 windows": {"rms_norm_eps": 1e-6},
    "gemma": {"hidden_act": "silu"},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma2 without": {"query_pre_attn_scalar": 16},
    "gemma3": {"sliding_window": 6},
    "gemma3 linear": {"rope_parameters": {"full_attention": {"rope_theta": 1e3}, "sliding_attention": None}},
}
"""A change to each case's `config.json` that the logits must show, or the case proves nothing."""


def config_class(kind: str) -> Any:
    if kind not in CLASSES:  # the text half of a model that sees
        return type(transformers.CONFIG_MAPPING[kind.removesuffix("_text")]().text_config)
    return getattr(transformers, f"{CLASSES[kind]}Config")


def lm_class(kind: str) -> Any:
    names = {"gpt2": "GPT2LMHeadModel", "gemma3_text": "Gemma3ForCausalLM"}
    return getattr(transformers, names.get(kind) or f"{CLASSES[kind]}ForCausalLM")


def random_model(kind: str, **changes: Any) -> Any:
    """A model of transformers whose every parameter matters, norms and biases included."""
    sizes = dict(SIZES)
    if kind == "gpt2":  # its configuration knows the other names as well, but not these two
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    config = config_class(kind)(**(sizes | changes))
    config._attn_implementation = "eager"  # the other one leaves out Gemma's soft caps
    torch.manual_seed(0)
    model = lm_class(kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def byte_tokenizer(folder: Path, *, bos: str | None = None, chat_template: str | None = None) -> Any:
    """A small tokenizer in `folder`, as transformers reads and writes it."""
    text = ["user assistant system", "The cat sat on the mat and looked at the dog."] * 4
    backend = Tokenizer.train(text, VOCAB - 1).backend
    special = {"eos_token": "<|im_end|>"}
    if bos is not None:
        backend.add_special_tokens([bos])
        pair = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
        special["bos_token"] = bos
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    theirs.chat_template = chat_template
    theirs.save_pretrained(folder)
    return theirs


def edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of `config.json`; `...` removes one."""
    path = folder / "config.json"
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(values))
    return values


def token_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def their_rows(model: Any, rows: list[Tensor]) -> list[Tensor]:
    return [model(row[None]).logits[0] for row in rows]


@torch.no_grad()
def our_rows(model: MMGPT, rows: list[Tensor]) -> list[Tensor]:
    positions = [torch.arange(len(row))[None] for row in rows]
    hidden = [model.decoder(model.decoder.embed(r[None]), p) for r, p in zip(rows, positions, strict=True)]
    return [model.decoder.logits(h[0]) for h in hidden]


def example(row: Tensor) -> Example:
    zeros = torch.zeros_like(row)
    return Example(row, zeros, torch.arange(len(row)), zeros, images=[])


Rows = list[Tensor]
Built = tuple[Path, Any, Rows]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """The folder of a case, the model of transformers in it, and its logits."""
    built: dict[str, Built] = {}

    def of(name: str) -> Built:
        if name not in built:
            kind, changes = CASES[name]
            folder, model = tmp_path_factory.mktemp(kind), random_model(kind, **changes)
            model.save_pretrained(folder)
            byte_tokenizer(folder)
            built[name] = folder, model, their_rows(model, token_rows())
        return built[name]

    return of


def assert_same(ours: Rows, theirs: Rows) -> None:
    for our_row, their_row in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_row, their_row, rtol=0, atol=ATOL)


# ---- logits ----


@pytest.mark.parametrize("name", CASES)
def test_rows(build: Callable[[str], Built], name: str) -> None:
    """A forgotten cap, a window that is one too long, a norm without its one: all write fluent text."""
    folder, _, expected = build(name)
    assert all(row.std() > 0.1 for row in expected)
    assert_same(our_rows(load_model(folder)[0], token_rows()), expected)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_left_padded_batch_with_a_cache(build: Callable[[str], Built], name: str) -> None:
    """Windows count tokens, not columns, and the cache keeps keys that the window has left behind."""
    folder, _, expected = build(name)
    model, rows = load_model(folder)[0], token_rows()
    batch = collate([[example(row)] for row in rows], torch.zeros(0), pad_left=True)
    whole = model.decoder.logits(model(batch))
    assert_same([row[-len(e) :] for row, e in zip(whole, expected, strict=True)], expected)
    # The first four columns at once, the others one by one.
    B, T = batch.input_ids.shape
    cache = KVCache(model.decoder.config, B, T, dtype=torch.float32, device=torch.device("cpu"))
    real = batch.document_ids > 0
    steps = [range(4), *([t] for t in range(4, T))]
    pieces = []
    for columns in steps:
        at = slice(columns[0], columns[-1] + 1)
        causal = torch.ones(T, T, dtype=torch.bool).tril()[at, : at.stop]
        mask = (causal & (real[:, None, : at.stop] | ~real[:, at, None])).unsqueeze(1)
        x = model.decoder.embed(batch.input_ids[:, at])
        pieces.append(model.decoder(x, batch.position_ids[:, at], mask=mask, cache=cache))
    logits = model.decoder.logits(torch.cat(pieces, dim=1))
    assert_same([row[-len(e) :] for row, e in zip(logits, expected, strict=True)], expected)


@torch.no_grad()
def test_their_padded_batch(build: Callable[[str], Built]) -> None:
    """The rows alone are the reference; this is the same for a batch of theirs."""
    for name in ("gpt2", "mistral", "gemma3"):
        _, model, expected = build(name)
        rows, T = token_rows(), max(LENGTHS)
        ids = torch.stack([torch.nn.functional.pad(row, (T - len(row), 0)) for row in rows])
        mask = torch.stack([torch.arange(T) >= T - len(row) for row in rows]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        assert_same([row[-len(e) :] for row, e in zip(logits, expected, strict=True)], expected)


@pytest.mark.parametrize("name", MATTERS)
def test_each_case_is_about_something(build: Callable[[str], Built], tmp_path: Path, name: str) -> None:
    folder, _, expected = build(name)
    copy_folder(folder, tmp_path)
    edit_config(tmp_path, **MATTERS[name])
    ours = our_rows(load_model(tmp_path)[0], token_rows())
    assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) > 1e-2


def copy_folder(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


# ---- configurations ----


def same_config(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return essence(decoder_config(one, "one")) == essence(decoder_config(other, "other"))


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """Published files leave out what equals the default of the class, which is not the same in all families."""
    config = config_class(kind)()
    for key, value in DEFAULTS[kind].items():
        if key == "rope_theta":
            rope = config.rope_parameters
            theirs = rope.get("full_attention", rope)["rope_theta"]
        elif key == "rope_local_base_freq":
            theirs = config.rope_parameters["sliding_attention"]["rope_theta"]
        elif key == "sliding_window_pattern":
            theirs = config.layer_types.index("full_attention") + 1
        elif key == "tie_word_embeddings" and kind not in CLASSES:
            theirs = getattr(config, key, False)  # a key of the whole
        elif key == "sliding_window" and kind.startswith("qwen"):
            theirs = config_class(kind)(use_sliding_window=True).sliding_window
        elif value is None and key in ("head_dim", "num_key_value_heads"):
            continue  # worked out of others: the comparison below
        else:
            theirs = getattr(config, key)
        assert theirs == value, key
    assert same_config({"model_type": kind}, config.to_dict())


OLDER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 64},
    "llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama linear": {"rope_theta": 1e3, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"rope_theta": 10_000.0},
    "qwen2 windows": {"rope_theta": 10_000.0},
    "gemma": {"rope_theta": 10_000.0, "hidden_act": "gelu", "hidden_activation": None},
    "gemma2": {"rope_theta": 10_000.0, "hidden_act": "gelu", "cache_implementation": "hybrid"},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3, "rope_scaling": None},
}


@pytest.mark.parametrize("name", OLDER)
def test_older_spellings(build: Callable[[str], Built], tmp_path: Path, name: str) -> None:
    """Almost all public files were written before `rope_parameters`, `layer_types` and `dtype`."""
    folder, _, expected = build(name)
    copy_folder(folder, tmp_path)
    gone = dict.fromkeys(("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern"), ...)
    values = edit_config(tmp_path, **gone, torch_dtype="float32", **OLDER[name])
    assert "rope_parameters" not in values
    assert same_config(values, json.loads((folder / "config.json").read_text()))
    assert_same(our_rows(load_model(tmp_path)[0], token_rows()), expected)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(their_rows(theirs, token_rows()), expected)


def test_older_spelling_of_gemma3s_scaling(build: Callable[[str], Built], tmp_path: Path) -> None:
    folder, model, _ = build("gemma3")
    copy_folder(folder, tmp_path)
    older = {"rope_theta": 1e3, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    edit_config(tmp_path, rope_parameters=..., layer_types=..., sliding_window_pattern=3, **older)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    expected = their_rows(theirs, token_rows())
    assert_same(our_rows(load_model(tmp_path)[0], token_rows()), expected)
    assert (expected[1] - their_rows(model, token_rows())[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2", "gemma3"])
def test_omitted_defaults(build: Callable[[str], Built], tmp_path: Path, name: str) -> None:
    """A file may hold nothing but what differs from its class."""
    folder, _, expected = build(name)
    copy_folder(folder, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    omitted = {k: ... for k, v in DEFAULTS[values["model_type"]].items() if k in values and values[k] == v}
    assert len(omitted) >= 3
    edit_config(tmp_path, **omitted)
    assert_same(our_rows(load_model(tmp_path)[0], token_rows()), expected)


# ---- names of tensors ----


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_old_gpt2_files(build: Callable[[str], Built], tmp_path: Path, prefix: str) -> None:
    """OpenAI's repositories name no `transformer.` and carry the causal mask of each layer."""
    folder, _, expected = build("gpt2")
    copy_folder(folder, tmp_path)
    state = load_file(folder / "model.safetensors")
    state = {prefix + name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(SIZES["num_hidden_layers"]):  # type: ignore[call-overload]
        state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(64, 64, dtype=torch.uint8).tril()[None, None]
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    assert_same(our_rows(load_model(tmp_path)[0], token_rows()), expected)


def test_files_of_the_bare_stack(build: Callable[[str], Built], tmp_path: Path) -> None:
    """What `AutoModel` saves has no `model.` before its names."""
    folder, model, expected = build("qwen2")
    copy_folder(folder, tmp_path)
    model.model.save_pretrained(tmp_path)
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert_same(our_rows(load_model(tmp_path)[0], token_rows()), expected)


@pytest.mark.parametrize("stored", ["twice", "twice and different", "as the head alone"])
def test_tied_matrices(build: Callable[[str], Built], tmp_path: Path, stored: str) -> None:
    """A head that was trained apart, under a configuration that says it is tied, would be thrown away."""
    folder, _, expected = build("qwen2")
    copy_folder(folder, tmp_path)
    state = load_file(folder / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embedding.flip(0).clone() if stored == "twice and different" else embedding.clone()
    if stored == "as the head alone":
        del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = their_rows(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), token_rows())
    assert_same(our_rows(load_model(tmp_path)[0], token_rows()), theirs)
    if stored != "twice and different":
        assert_same(theirs, expected)


# ---- the doors ----

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = "The cat looked at"
NUM_TOKENS = 12


def their_answer(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize(("name", "bos"), [("qwen2", None), ("gpt2", None), ("llama3", "<s>")])
def test_answers(
    build: Callable[[str], Built], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, bos: str | None
) -> None:
    """Greedy ids are those of `generate`; without a chat template the prompt goes on as it stands."""
    folder, model, _ = build(name)
    copy_folder(folder, tmp_path)
    theirs = byte_tokenizer(tmp_path, bos=bos, chat_template=CHATML if name == "qwen2" else None)
    messages = [{"role": "user", "content": QUESTION}]
    if name == "qwen2":
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = theirs(text, add_special_tokens=False).input_ids
    else:
        prompt = theirs(QUESTION).input_ids
    assert (prompt[0] == theirs.bos_token_id) == (bos is not None)
    expected = their_answer(model, prompt)
    assistant = mm_gpt.load(tmp_path, device="cpu")
    options: Any = {"max_new_tokens": NUM_TOKENS, "no_repeat_ngram_size": 0}
    answer = assistant.ask(None, QUESTION, logprobs=True, **options)
    assert answer.prompt_tokens == len(prompt)
    assert answer.logprobs is not None
    assert [token.id for token in answer.logprobs] == expected
    chat = assistant.chat([{"role": "user", "content": QUESTION}], stream=True, **options)
    assert "".join(chat).strip() == answer
    flags = ["--max-new-tokens", str(NUM_TOKENS), "--no-repeat-ngram-size", "0"]
    assert main(["ask", QUESTION, "--model", str(tmp_path), *flags]) == 0
    assert capsys.readouterr().out.strip() == answer.text


@pytest.mark.parametrize("decoder", ["frozen", "full"])
def test_finetuning(build: Callable[[str], Built], tmp_path: Path, decoder: str) -> None:
    """LoRA and the whole decoder, on text chats; what was trained loads again as it was in memory."""
    start, out = tmp_path / "start", tmp_path / "run"
    copy_folder(build("qwen2")[0], start)
    byte_tokenizer(start, chat_template=CHATML)
    chats = [
        {"messages": [{"role": "user", "content": f"The cat {n}"}, {"role": "assistant", "content": f"sat {n}"}]}
        for n in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    overrides = [f"start={start}", "sources=chats.jsonl", f"decoder={decoder}", "row_length=64", "train.device=cpu"]
    overrides += ["train.steps=2", "train.warmup_steps=1", "train.lr=0.01", "train.precision=fp32"]
    recipe = override(finetune(str(tmp_path)), overrides)
    task = LanguageTask(recipe)
    before = our_rows(task.model.eval(), token_rows())
    assert_same(before, build("qwen2")[2])
    train(task, recipe.train, out, progress=False)
    after = our_rows(task.model.eval(), token_rows())
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) > 1e-3
    again, processor = load_model(out / "best")
    assert (again.config.lora is None) == (decoder == "full")
    for loaded, trained in zip(our_rows(again, token_rows()), after, strict=True):
        torch.testing.assert_close(loaded, trained, rtol=0, atol=2e-2)  # matrices are stored in half precision
    assert processor.template is not None
    assert processor.template.source == CHATML
    assert mm_gpt.load(out / "best", device="cpu").ask(None, QUESTION, max_new_tokens=3).completion_tokens >= 1


def test_finetuning_by_the_command_line(build: Callable[[str], Built], tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "run"
    copy_folder(build("gpt2")[0], start)
    chat = {"messages": [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": " sat."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 12)
    arguments = ["--data", str(tmp_path), "--out", str(out), f"start={start}", "sources=chats.jsonl"]
    assert main(["train", "finetune", *arguments, "train.steps=1", "row_length=64", "train.device=cpu"]) == 0
    assert main(["ask", "The cat", "--model", str(out / "best"), "--max-new-tokens", "3"]) == 0
