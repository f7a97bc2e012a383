"""JSON bodies into checked requests. Every field is used, refused by name, or without effect in the protocol itself."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.inference.constraints import Constraint
from mm_gpt.inference.generation import MAX_SEED, GenerationConfig
from mm_gpt.serving.server.config import MAX_LOGPROBS, MAX_PROMPTS, MAX_STOPS, Served, ServerConfig
from mm_gpt.serving.server.errors import RequestError, invalid
from mm_gpt.serving.server.fields import Fields, kind
from mm_gpt.serving.server.messages import ChatMessage, read_messages

_TOOLS = "the models here call no tools"
REFUSED_IN_CHAT = {
    "audio": "it writes text only",
    "function_call": _TOOLS,
    "functions": _TOOLS,
    "moderation": "nothing is moderated here",
    "parallel_tool_calls": _TOOLS,
    "prediction": "there is no speculative decoding",
    "prompt_cache_options": "prompts are cached by themselves",
    "prompt_cache_retention": "prompts are cached by themselves",
    "reasoning_effort": "the models here do not reason before they answer",
    "tools": _TOOLS,
    "verbosity": "say in the prompt how long the answer should be",
    "web_search_options": "nothing is searched",
}
REFUSED_IN_COMPLETIONS = {
    "best_of": "ask for n answers, and choose",
    "suffix": "the models here write from left to right",
}
MAX_JSON_DEPTH = 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """What both kinds of request have."""

    generation: GenerationConfig
    constraint_field: str
    """Where the request says what the answer must look like; empty where it does not."""
    stream: bool
    include_usage: bool
    """With `stream`: a last chunk tells what the request took."""

    @property
    def wants_answers(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    messages: list[ChatMessage]


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Request):
    prompts: list[str | list[int]]
    echo: bool
    logprobs: int | None
    max_tokens: int
    """0: the prompt alone is of interest."""

    @property
    def wants_answers(self) -> bool:
        return self.max_tokens > 0


def read_json(body: bytes) -> Fields:
    """The object in a body. Raises RequestError for anything else."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise RequestError(f"The body is no JSON: {reason}.", code="invalid_json") from None
    if _depth(values) > MAX_JSON_DEPTH:
        raise RequestError(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.", code="invalid_json")
    if b"\\ud" in body.lower():
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RequestError("The body has half a character, a lone surrogate.", code="invalid_json") from None
    return Fields(values)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _depth(values: Any) -> int:
    depth, level = 0, [values]
    while level := [item for item in level if isinstance(item, dict | list)]:
        level = [i for item in level for i in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


def read_chat(fields: Fields, served: Served, config: ServerConfig) -> ChatRequest:
    """Raises RequestError naming the first field that is wrong."""
    _check_model(fields, served)
    messages = read_messages(fields, served, config)
    limits = [fields.integer(name, 1, _longest(served, config)) for name in ("max_completion_tokens", "max_tokens")]
    if None not in limits and limits[0] != limits[1]:
        raise invalid("max_tokens is the old name of max_completion_tokens: give one of them.", "max_tokens")
    fields.choice("tool_choice", ("none",))
    if (modalities := fields.take("modalities")) not in (None, ["text"]):
        raise invalid(f"modalities must be ['text'], not {modalities!r}.", "modalities")
    logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    constraint, constraint_field = _constraint(fields)
    generation = _generation(
        fields,
        served,
        config,
        max_new_tokens=limits[0] or limits[1] or _longest(served, config),
        logprobs=logprobs,
        top_logprobs=top or 0,
        constraint=constraint,
        no_repeat_ngram_size=0 if constraint else served.no_repeat_ngram_size,
    )
    stream, include_usage = _stream(fields)
    fields.done(REFUSED_IN_CHAT)
    return ChatRequest(
        messages=messages,
        generation=generation,
        constraint_field=constraint_field,
        stream=stream,
        include_usage=include_usage,
    )


def read_completion(fields: Fields, served: Served, config: ServerConfig) -> CompletionRequest:
    """Raises RequestError naming the first field that is wrong."""
    _check_model(fields, served)
    prompts = _prompts(fields, served)
    asked = fields.integer("max_tokens", 0, _longest(served, config))
    max_tokens = 16 if asked is None else asked  # OpenAI's default here, unlike in chats
    echo = fields.boolean("echo")
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens is 0 and echo is false: there is nothing to answer.", "max_tokens")
    constraint, constraint_field = _constraint(fields)
    generation = _generation(
        fields,
        served,
        config,
        max_new_tokens=max(1, max_tokens),
        logprobs=logprobs is not None,
        top_logprobs=logprobs or 0,
        prompt_logprobs=echo and logprobs is not None,
        constraint=constraint,
        no_repeat_ngram_size=0,
    )
    stream, include_usage = _stream(fields)
    fields.done(REFUSED_IN_COMPLETIONS)
    return CompletionRequest(
        prompts=prompts,
        echo=echo,
        logprobs=logprobs,
        max_tokens=max_tokens,
        generation=generation,
        constraint_field=constraint_field,
        stream=stream,
        include_usage=include_usage,
    )


def _check_model(fields: Fields, served: Served) -> None:
    model = fields.text("model")
    if model is None:
        raise RequestError("The field model is missing.", param="model", code="missing_required_parameter")
    if model != served.name:
        raise no_such_model(model, served)


def no_such_model(model: str, served: Served) -> RequestError:
    return RequestError(
        f"The model {model!r} does not exist here; {served.name!r} does.",
        status=404,
        param="model",
        code="model_not_found",
    )


def _longest(served: Served, config: ServerConfig) -> int:
    return min(served.context, config.max_tokens or served.context)


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream = fields.boolean("stream")
    options = fields.inside("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise invalid("stream_options needs stream to be true.", "stream_options")
    include_usage = options.boolean("include_usage")
    if options.boolean("include_obfuscation"):
        raise invalid("stream_options.include_obfuscation cannot be true.", "stream_options.include_obfuscation")
    options.done()
    return stream, include_usage


def _generation(fields: Fields, served: Served, config: ServerConfig, **fixed: Any) -> GenerationConfig:
    """How the answer is sampled. Temperature is 1 where nothing is said, as at OpenAI."""
    _without_effect(fields)
    repeats = fields.integer("no_repeat_ngram_size", 0, served.context)
    top_k = fields.integer("top_k", -1, served.vocab_size)
    seed = fields.integer("seed", 0, MAX_SEED)
    values = {
        "n": fields.integer("n", 1, config.max_rows),
        "temperature": _default(fields.number("temperature", 0, 2), 1.0),
        "top_p": fields.number("top_p", 0, 1, above=True),
        "top_k": None if top_k == -1 else top_k,
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "logit_bias": _logit_bias(fields, served),
        "stop": _stops(fields),
        "seed": secrets.randbits(63) if seed is None else seed,
    }
    given = fixed | {name: value for name, value in values.items() if value is not None}
    if repeats is not None:
        given["no_repeat_ngram_size"] = repeats
    try:
        return GenerationConfig(**given)
    except MMGPTError as error:
        name = str(error).split(maxsplit=1)[0].rstrip(":")
        raise invalid(str(error), name if name in fields.values else "") from None


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _without_effect(fields: Fields) -> None:
    """Fields that change nothing about an answer in the protocol itself, as far as they do not."""
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(name)
    fields.choice("service_tier", ("auto", "default"))
    if fields.boolean("store"):
        raise invalid("store cannot be true: nothing is kept here.", "store")
    metadata = fields.inside("metadata")  # of what is stored
    for name in metadata.values if metadata else ():
        metadata.text(name)  # type: ignore[union-attr]


def _logit_bias(fields: Fields, served: Served) -> dict[int, float] | None:
    biases = fields.inside("logit_bias")
    if biases is None:
        return None
    for name in biases.values:
        if not (name.isdecimal() and name.isascii() and len(name) < 10 and int(name) < served.vocab_size):
            raise invalid(f"{name!r} is no token id: they go from 0 to {served.vocab_size - 1}.", biases.at(name))
    return {int(name): biases.number(name, -100, 100) or 0.0 for name in biases.values}


def _stops(fields: Fields) -> tuple[str, ...] | None:
    value = fields.take("stop")
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise invalid("stop must be a string or an array of strings, none of them empty.", "stop", "invalid_type")
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop has {len(stops)} strings; at most {MAX_STOPS} are taken.", "stop")
    return tuple(stops)


def _constraint(fields: Fields) -> tuple[Constraint | None, str]:
    """`response_format`, or `structured_outputs`, where vLLM has regular expressions and choices; and which of them."""
    found: dict[str, Any] = {}
    wanted = fields.inside("response_format")
    if wanted is not None:
        type = wanted.choice("type", ("text", "json_object", "json_schema"))
        if type is None:
            raise invalid("response_format.type is missing.", "response_format.type")
        if type == "json_object":
            found["json_object"] = True
        if type == "json_schema":
            found["json_schema"] = _named_schema(wanted)
        wanted.done()
    other = fields.inside("structured_outputs")
    if other is not None:
        if found:
            raise invalid("response_format and structured_outputs exclude each other.", "structured_outputs")
        found = _structured(other)
    name = "response_format" if other is None else "structured_outputs"
    try:
        return (Constraint(**found), name) if found else (None, "")
    except ConfigError as error:
        raise invalid(str(error), name) from None


def _named_schema(wanted: Fields) -> dict[str, Any]:
    named = wanted.inside("json_schema")
    if named is None:
        raise invalid("response_format.json_schema is missing.", "response_format.json_schema")
    if named.text("name") is None:
        raise invalid("response_format.json_schema.name is missing.", "response_format.json_schema.name")
    named.text("description")
    named.boolean("strict")  # a schema is always enforced
    schema = named.inside("schema")
    named.done()
    return {} if schema is None else schema.values


def _structured(fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (regex := fields.text("regex")) is not None:
        found["regex"] = regex
    if (choices := fields.take("choice")) is not None:
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            path = fields.at("choice")
            raise invalid(f"{path} must be an array of strings, none of them empty.", path, "invalid_type")
        found["choices"] = tuple(choices)
    if (schema := fields.inside("json")) is not None:
        found["json_schema"] = schema.values
    if fields.boolean("json_object"):
        found["json_object"] = True
    fields.done({"grammar": "give json, regex or choice", "structural_tag": "give json, regex or choice"})
    if len(found) != 1:
        raise invalid("structured_outputs needs one of json, regex, choice and json_object.", "structured_outputs")
    return found


def _prompts(fields: Fields, served: Served) -> list[str | list[int]]:
    value = fields.take("prompt")
    if value is None:
        raise RequestError("The field prompt is missing.", param="prompt", code="missing_required_parameter")
    is_list = isinstance(value, list) and not (value and all(_is_id(item) for item in value))
    prompts = value if is_list else [value]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise invalid(f"prompt has {len(prompts)} prompts; from 1 to {MAX_PROMPTS} are taken.", "prompt")
    for number, prompt in enumerate(prompts):
        path = f"prompt[{number}]" if is_list else "prompt"
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(_is_id(item) for item in prompt)):
            wanted = "a string, an array of token ids, or an array of those"
            raise invalid(f"{path} must be {wanted}, not {kind(prompt)}.", path, "invalid_type")
        if not prompt:
            raise invalid(f"{path} is empty.", path)
        if isinstance(prompt, list) and not all(0 <= id < served.vocab_size for id in prompt):
            wrong = next(id for id in prompt if not 0 <= id < served.vocab_size)
            raise invalid(f"{path}: {wrong} is no token id; they go from 0 to {served.vocab_size - 1}.", path)
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
