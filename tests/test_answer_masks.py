"""What is learned of a chat: the answers and their end marks, to the token, under every template that is in use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from conftest import make_picture, make_tiny
from hypothesis import given
from hypothesis import strategies as st
from test_chat_template import (
    CHATML,
    HEADERS,
    IMAGES_FIRST,
    INST,
    ONEVISION,
    THINKING,
    TURNS,
    UTTERANCES,
    byte_level,
    metaspace,
    unigram,
)
from test_family_gemma3 import TEMPLATE as GEMMA3
from test_family_idefics3 import TEMPLATE as IDEFICS3
from test_family_internvl import TEMPLATE as INTERNVL
from test_family_llava import CHATML as LLAVA_CHATML
from test_family_llava import MISTRAL as LLAVA_MISTRAL
from test_family_llava import VICUNA
from test_family_nanovlm import CHATML as NANOVLM
from test_family_qwen_vl import SYSTEM
from test_family_qwen_vl import TEMPLATE as QWEN_VL
from tokenizers import Tokenizer as Backend

from mm_gpt.document import Document, Image, Message
from mm_gpt.hub.export.layout import CHATML as EXPORTED
from mm_gpt.hub.families.idefics3 import PLAIN as IDEFICS3_PLAIN
from mm_gpt.hub.families.kosmos2 import TEMPLATE as KOSMOS2
from mm_gpt.hub.families.llava import TEMPLATE as LLAVA
from mm_gpt.hub.families.nanovlm import QUESTION as NANOVLM_QUESTION
from mm_gpt.hub.families.paligemma import TEMPLATE as PALIGEMMA
from mm_gpt.hub.families.text import PLAIN
from mm_gpt.processor import IGNORE_INDEX, Example, Processor, ProcessorConfig
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.transforms import ImageTransformConfig

# ---- Templates in the manner of others that are published ----

# The mark behind an answer is the next speaker's: GLM-4
GLM = """[gMASK]<sop>{% if tools %}<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}<|user|>
{{ m.content }}{% elif m.role == 'assistant' %}<|assistant|>\
{% if m.tool_calls %}{% for call in m.tool_calls %}{{ '\n' + call.function.name }}
{{ call.function.arguments | tojson(ensure_ascii=False) }}{% endfor %}\
{% else %}{{ '\n' + m.content }}{% endif %}{% elif m.role == 'tool' %}<|observation|>
{{ m.content }}{% elif m.role == 'system' %}<|system|>
{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
# The last answer ends with another mark: what is rendered of a part is no part of what is rendered of the whole
OLMO = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HERMES = """{% if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'tool' %}\
{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}{% else %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}\
{% for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA31 = """{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>

{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}<|eot_id|>{% endif %}{% for m in messages %}{% if m.tool_calls %}\
<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": \
{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>\
{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}\
{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST] {{ m.content }}[/INST]\
{% elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content }}}[/TOOL_RESULTS]\
{% elif m.tool_calls %}[TOOL_CALLS] [{"name": "{{ m.tool_calls[0].function.name }}", "arguments": \
{{ m.tool_calls[0].function.arguments | tojson }}}]{{ eos_token }}\
{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class Style:
    """A template with a tokenizer that fits it."""

    source: str | None
    end: str = ""
    """What ends an answer, as it is written."""
    bos: str | None = None
    eos: str = "<|endoftext|>"
    last: str | None = None
    """What ends the last answer, where that is something else."""
    image: str | None = None
    written: str = ""
    more: tuple[str, ...] = ()
    """Further special tokens; those of them that `end` names end an answer as well."""
    make: Callable[[list[str]], Backend] = lambda special: byte_level("gpt2", special)
    is_exact: bool = True
    """The tokenizer gives back each space."""
    call: str = ""
    """How a tool call is written."""
    begin: str = ""
    """What the template lets the answer begin with."""
    is_sole: bool = False
    """Of one question and its answer."""

    @property
    def special(self) -> list[str]:
        named = [self.bos, self.eos, self.end.strip(), self.last, self.image, *self.more]
        return list(dict.fromkeys(token for token in named if token))


IM_END = "<|im_end|>"
LLAMA2: Any = {"bos": "<s>", "eos": "</s>", "is_exact": False}
STYLES = {
    "built in": Style(None, IM_END),
    "exported": Style(EXPORTED.replace("IMAGE", "'<image>'"), IM_END, image="<image>"),
    "SmolLM2": Style(CHATML, IM_END, bos="<|im_start|>", eos=IM_END),
    "Qwen3": Style(THINKING, IM_END, eos=IM_END, call='<tool_call>\n{"at": "the sky"}\n</tool_call>'),
    "Hermes": Style(HERMES, IM_END, call='<tool_call>\n{"name": "look", "arguments": {"at": "the sky"}}\n</tool_call>'),
    "OLMo": Style(OLMO, IM_END, last="<|endoftext|>"),
    "Llama 3": Style(HEADERS, "<|eot_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "Llama 3.1": Style(
        LLAMA31,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        call='{"name": "look", "parameters": {"at": "the sky"}}',
    ),
    "Llama 2": Style(INST, " </s>", make=lambda s: metaspace("prepend", s), **LLAMA2),
    "Llama 2, of its pieces": Style(INST, " </s>", make=unigram, **LLAMA2),
    "Mistral": Style(
        MISTRAL,
        "</s>",
        bos="<s>",
        eos="</s>",
        more=("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        call='[TOOL_CALLS] [{"name": "look", "arguments": {"at": "the sky"}}]',
    ),
    "GLM": Style(
        GLM,
        "<|user|>",
        last="<|endoftext|>",
        more=("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<|observation|>"),
        call='look\n{"at": "the sky"}',
    ),
    "Gemma": Style(
        TURNS, "<end_of_turn>", bos="<bos>", eos="<eos>", make=lambda s: metaspace("none", s), is_exact=False
    ),
    "Gemma 3": Style(
        GEMMA3, "<end_of_turn>", bos="<bos>", eos="<eos>", image="<image_soft_token>", written="<start_of_image>"
    ),
    "SmolVLM": Style(UTTERANCES, "<end_of_utterance>", bos="<|im_start|>", eos="<end_of_utterance>", image="<image>"),
    "Idefics3": Style(IDEFICS3, "<end_of_utterance>", bos="<|im_start|>", image="<image>"),
    "LLaVA": Style(IMAGES_FIRST, last="</s>", bos="<s>", eos="</s>", image="<image>"),
    "LLaVA, of others": Style(VICUNA, last="</s>", bos="<s>", eos="</s>", image="<image>"),
    "LLaVA, ours": Style(LLAVA, "</s>", bos="<s>", eos="</s>", image="<image>"),
    "LLaVA-NeXT": Style(LLAVA_MISTRAL, "</s>", bos="<s>", eos="</s>", image="<image>"),
    "OneVision": Style(ONEVISION, IM_END, eos=IM_END, image="<image>", begin="\n"),
    "OneVision, of others": Style(LLAVA_CHATML, IM_END, eos=IM_END, image="<image>"),
    "InternVL": Style(INTERNVL, IM_END, eos=IM_END, image="<IMG_CONTEXT>"),
    "nanoVLM": Style(NANOVLM, IM_END, image="<image>"),
    "nanoVLM, untaught": Style(NANOVLM_QUESTION.replace("IMAGE", "<image>"), "<|endoftext|>", image="<image>"),
    "Qwen2-VL": Style(QWEN_VL.replace("SYSTEM", SYSTEM), IM_END, eos=IM_END, image="<|image_pad|>"),
    "Qwen3-VL": Style(QWEN_VL.replace("SYSTEM", ""), IM_END, eos=IM_END, image="<|image_pad|>"),
    "KOSMOS-2": Style(KOSMOS2, "</s>", bos="<s>", eos="</s>", image="<mask>"),
    "PaliGemma": Style(PALIGEMMA, "<eos>", bos="<bos>", eos="<eos>", image="<image>", is_sole=True),
    "base model": Style(PLAIN, last="<|endoftext|>"),
    "base model that sees": Style(IDEFICS3_PLAIN, last="<|endoftext|>", image="<image>"),
}
SEEING = [name for name, style in STYLES.items() if style.image or style.source is None]
CALLING = [name for name, style in STYLES.items() if style.call]
PICTURE = Image(make_picture(0, (16, 16)))


@cache
def processor_of(name: str) -> Processor:
    style = STYLES[name]
    if style.source is None:
        return make_tiny()[1]
    backend = style.make(style.special)
    names = {"eos_token": style.eos, "mask_token": style.image or ""} | ({"bos_token": style.bos} if style.bos else {})
    turn = style.end.strip() or style.eos
    others = [id for id, token in backend.get_added_tokens_decoder().items() if token.content == "<|observation|>"]
    tokenizer = Tokenizer(backend, end_of_text=style.eos, end_of_turn=turn, more_ends=others, names=names)
    tokenizer.chat_templates["default"] = style.source
    image: Any = {}
    if style.image:
        image = {
            "image": ImageTransformConfig(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            "tokens_per_image": 3,
            "image_text": ImageTextConfig(token=style.image, written=style.written),
        }
    config = ProcessorConfig(max_length=4096, begin_of_text=True, **image)
    template = ChatTemplate.of(tokenizer, where=f"{name}/chat_template.jinja")
    return Processor(tokenizer, config, vocab_size=tokenizer.vocab_size, template=template)


def learned_runs(processor: Processor, example: Example) -> list[list[int]]:
    """The runs of tokens that are learned."""
    runs: list[list[int]] = []
    before = False
    for label in example.labels.tolist():
        if label != IGNORE_INDEX:
            runs += [] if before else [[]]
            runs[-1].append(label)
        before = label != IGNORE_INDEX
    return runs


def same(style: Style, text: str) -> str:
    """White space at the ends is the template's or the answer's; small vocabularies of pieces keep none of it."""
    return text.strip() if style.is_exact else "".join(text.replace("▁", " ").replace("<unk>", " ").split())


def chat_of(answers: list[str], pictures: str) -> list[Message]:
    messages: list[Message] = []
    for number, answer in enumerate(answers):
        asked: list[Any] = [f"What is {number}?"]
        if pictures == "first" and number == 0:
            asked.insert(0, PICTURE)
        if pictures == "last" and number == len(answers) - 1:
            asked.append(PICTURE)
        messages.append({"role": "user", "content": asked if len(asked) > 1 else asked[0]})
        messages.append({"role": "assistant", "content": answer})
    return messages


def check(name: str, document: Document, answers: list[str], ends: list[str]) -> None:
    style, processor = STYLES[name], processor_of(name)
    example = processor(document)
    runs = learned_runs(processor, example)
    said = [same(style, processor.tokenizer.decode(run, keep_special=True)) for run in runs]
    assert said == [same(style, answer + end) for answer, end in zip(answers, ends, strict=True)]
    own = {getattr(processor, name, -1) for name in ("image_start_id", "image_end_id")}
    assert not any(processor.is_image(id) or id in own for run in runs for id in run)
    if style.bos:
        bos = processor.tokenizer.special[style.bos]
        start = example.input_ids[:2].tolist()
        assert start != [bos, bos]


ANSWERS = ["A red circle.", "12 o'clock\n\nand <b>two</b> lines", "中文 é", "user: assistant"]


@pytest.mark.parametrize("pictures", ["none", "first", "last"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("name", STYLES)
def test_the_answers_and_their_end_marks_are_learned(name: str, turns: int, pictures: str) -> None:
    """And nothing else: no question, no header, no place of an image; and never an answer without an end."""
    if pictures != "none" and name not in SEEING:
        with pytest.raises(Exception, match="image"):
            processor_of(name)(processor_of(name).training_chat(chat_of(ANSWERS[:turns], pictures)))
        return
    style, answers = STYLES[name], ANSWERS[: 1 if STYLES[name].is_sole else turns]
    ends = [style.end] * (len(answers) - 1) + [style.end if style.last is None else style.last]
    check(name, processor_of(name).training_chat(chat_of(answers, pictures)), answers, ends)


WORDS = ["A", "red", "circle", "12", "<b>", "\n", ".", "assistant", "<think", "[/INST", "</", "im_end|>", "中文"]


@given(st.data())
def test_any_answers(data: st.DataObject) -> None:
    """The same of what looks like marks, with answers that are not learned, or were cut off, among them."""
    name = data.draw(st.sampled_from(sorted(STYLES)))
    style = STYLES[name]
    text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join).filter(lambda t: t == t.strip() != "")
    answers = data.draw(st.lists(text, min_size=1, max_size=1 if style.is_sole else 4))
    messages = chat_of(answers, data.draw(st.sampled_from(["none", "first", "last"])) if name in SEEING else "none")
    ends = [style.end] * (len(answers) - 1) + [style.end if style.last is None else style.last]
    kept = []
    for number, message in enumerate(messages[1::2]):
        hows: list[dict[str, Any]] = [{}, {"weight": 1}, {"weight": 0}, {"complete": False}]
        how = data.draw(st.sampled_from(hows))
        message |= how
        if how == {"complete": False}:
            ends[number] = ""
        if how != {"weight": 0}:
            kept.append(number)
    document = processor_of(name).training_chat(messages)
    check(name, document, [answers[n] for n in kept], [ends[n] for n in kept])


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "See.", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", CALLING)
def test_tool_calls_are_learned_whole(name: str) -> None:
    """From its mark to its end; not what the tools are, nor what they say."""
    style, processor = STYLES[name], processor_of(name)
    messages: list[Message] = [
        {"role": "user", "content": "What is there?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "a bird"},
        {"role": "assistant", "content": "A bird."},
    ]
    assert processor.template is not None
    rendered = processor.template.render(messages, add_generation_prompt=False, tools=[TOOL])
    assert "See." in "".join(getattr(segment, "text", "") for segment in rendered) or name == "Mistral"
    called = "<|observation|>" if name == "GLM" else style.end
    ends = [called, style.end if style.last is None else style.last]
    check(name, processor.training_chat(messages), [style.call, "A bird."], ends)


def test_a_text_and_its_continuation_end_once() -> None:
    """An answer that ends with what looks like the end mark has one of its own all the same."""
    processor = processor_of("built in")
    messages: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A <|im_end|>"}]
    (run,) = learned_runs(processor, processor(processor.training_chat(messages)))
    end = processor.tokenizer.special["<|im_end|>"]
    assert (run[-1], run.count(end)) == (end, 1)
    closed = processor.training_chat([messages[0], {"role": "assistant", "content": ""}])
    assert [ids[-1:] for ids in learned_runs(processor, processor(closed))] == [[end]]
