"""OpenAI's completions API, the server's side: requests are validated, responses formatted.

    request = parse_request(body, path, model, tokenizer, max_tokens)    # or an HTTPError
    full_response(request, sequences, texts, reasons)                    # in one piece
    chunk(request, index, text)                                          # or as events of a stream

  - A chat takes the form that training and `alpaca chat` use; a completion continues its
    prompt as it is. Instead of a prompt it may have an `instruction` and an `input`, which go into
    the model's template: the page sends these.
  - top_k and repetition_penalty go beyond OpenAI's fields. A field of theirs that would change the
    answer and is not supported is refused, never ignored; their defaults are accepted.
  - `max_tokens` is cut to what the server allows; finish_reason is "length" then.

platform.openai.com/docs/api-reference
"""

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from alpaca.common.errors import UserError
from alpaca.common.json_files import bounded_json
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence
from alpaca.serving.http import HTTPError
from dataset import chat_prompt, encode_prompt
from tokenizer import Tokenizer

MAX_CHOICES, MAX_STOPS, MAX_STOP_LENGTH = 8, 16, 200
MIN_LOGPROB = -9999.0  # JSON has no -inf
UNSUPPORTED = {  # field: the values that change nothing, which are accepted; null always is
    "audio": (), "moderation": (), "prediction": (), "web_search_options": (),
    "best_of": (1,), "echo": (False,), "suffix": ("",), "store": (False,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],), "response_format": ({"type": "text"},),
    "reasoning_effort": ("none", "medium"), "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
}  # fmt: skip


@dataclass(frozen=True)
class CompletionRequest:
    chat: bool
    text: str  # all that the user wrote, for the filter
    prompts: list[list[int]]
    params: list[SamplingParams]  # of the choices for each prompt
    stream: bool
    include_usage: bool  # at the end of a stream too
    header: dict[str, Any]  # id, created and model, repeated in every chunk

    @property
    def sequences(self) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompt and parameters of every choice, those of one prompt in a row."""
        prompts = [ids for ids in self.prompts for _ in self.params]
        return prompts, self.params * len(self.prompts)


# ---------------------------------------------------------------- requests


def invalid(param: str, message: str, code: str | None = None) -> HTTPError:
    return HTTPError(400, message, param=param, code=code)


def parse_body(body: bytes) -> dict[str, Any]:
    try:
        content = bounded_json(body, "the body")
    except UserError as error:
        raise HTTPError(400, str(error)) from None
    if not isinstance(content, dict):
        raise HTTPError(400, "the body is not a JSON object")
    return content


def get_text(body: dict, name: str, default: str | None = None) -> str:
    """A string field; without a default it is required."""
    value = default if body.get(name) is None else body[name]
    if not isinstance(value, str):
        raise invalid(name, f"{name} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(name, f"{name} holds half a surrogate pair") from None
    return value


def get_number(body: dict, name: str, default: Any, low: float, high: float, kind=float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise invalid(name, f"{name} must be {what} from {low} to {high}")
    return kind(value)


def get_bool(body: dict, name: str) -> bool:
    value = body.get(name)
    if not (value is None or isinstance(value, bool)):
        raise invalid(name, f"{name} must be true or false")
    return bool(value)


def parse_request(
    body: dict, path: str, model: str, tokenizer: Tokenizer, max_tokens: int
) -> CompletionRequest:
    """A request to a server that has this one model and allows so many tokens in an answer."""
    chat = path.endswith("chat/completions")
    if body.get("model") not in (None, model):
        message = f"there is no model {str(body['model'])[:100]!r} here, only {model!r}"
        raise HTTPError(404, message, param="model", code="model_not_found")
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) not in (None, *harmless):
            values = " or ".join(map(json.dumps, (*harmless, None)))
            message = f"{name} must be {values}: nothing else is supported"
            raise invalid(name, message, "unsupported_parameter")
    stream, n = get_bool(body, "stream"), get_number(body, "n", 1, 1, MAX_CHOICES, int)
    logprobs = get_number(body, "logprobs", None, 0, 5, int) if not chat else None
    if chat and get_bool(body, "logprobs"):
        logprobs = get_number(body, "top_logprobs", 0, 0, 20, int)
    elif body.get("top_logprobs") not in (None, 0):
        raise invalid("top_logprobs", "top_logprobs needs logprobs")
    if stream and logprobs is not None:
        raise invalid("logprobs", "logprobs are not available with stream")
    options = body.get("stream_options") or {}
    names = {"include_usage", "include_obfuscation"}  # the latter pads chunks; here are no pads
    if not isinstance(options, dict) or options.keys() - names:
        raise invalid("stream_options", 'stream_options must be {"include_usage": true or false}')
    text, prompts = (parse_messages if chat else parse_prompts)(body, tokenizer)
    if n * len(prompts) > MAX_CHOICES:
        raise invalid("n", f"at most {MAX_CHOICES} answers to a request")
    id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
    header = {"id": id, "created": int(time.time()), "model": model}
    first = parse_sampling(body, max_tokens, logprobs)
    params = [replace(first, seed=first.seed + i) for i in range(n)]
    include_usage = get_bool(options, "include_usage")
    return CompletionRequest(chat, text, prompts, params, stream, include_usage, header)


def parse_sampling(body: dict, max_tokens: int, logprobs: int | None) -> SamplingParams:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(s and isinstance(s, str) for s in stops):
        raise invalid("stop", "stop must be a string or a list of strings")
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_LENGTH:
        raise invalid("stop", f"at most {MAX_STOPS} stop strings of {MAX_STOP_LENGTH} characters")
    names = ("max_tokens", "max_completion_tokens")  # the older name and the newer
    limits = [get_number(body, name, max_tokens, 1, 1 << 30, int) for name in names]
    seed = get_number(body, "seed", None, 0, (1 << 63) - 1, int)
    return SamplingParams(
        temperature=get_number(body, "temperature", 1.0, 0, 2),
        top_k=get_number(body, "top_k", 0, 0, 1 << 30, int),
        top_p=max(1e-6, get_number(body, "top_p", 1.0, 0, 1)),  # 0: the likeliest token only
        repetition_penalty=get_number(body, "repetition_penalty", 1.0, 0.1, 10),
        seed=secrets.randbits(31) if seed is None else seed,
        max_new_tokens=min(max_tokens, *limits),
        stop=tuple(stops),
        logprobs=logprobs,
    )


def parse_prompts(body: dict, tokenizer: Tokenizer) -> tuple[str, list[list[int]]]:
    """What the user wrote in a completion request, and the ids of its prompts."""
    if "instruction" in body:
        instruction, input = get_text(body, "instruction"), get_text(body, "input", "")
        if not instruction.strip():
            raise invalid("instruction", "the instruction is empty")
        written = f"{instruction}\n{input}".strip()
        return written, [encode_prompt(instruction, input, tokenizer)]
    given = body.get("prompt")
    given = given if isinstance(given, list) else [given]
    prompts = [get_text({"prompt": one}, "prompt") for one in given[: MAX_CHOICES + 1]]
    if not prompts:
        raise invalid("prompt", "prompt is an empty list")
    return "\n".join(prompts), [tokenizer.encode(one, bos=True) for one in prompts]


def parse_messages(body: dict, tokenizer: Tokenizer) -> tuple[str, list[list[int]]]:
    """The same for a chat: a system message or none, then user and assistant in turns."""
    given, messages, expected = body.get("messages"), [], "user"
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise invalid("messages", "messages must be a list of objects")
    for place, message in enumerate(given):
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role != expected and not (role == "system" and place == 0):
            raise invalid("messages", f"messages[{place}] must have the role {expected}")
        if role != "system":
            expected = "assistant" if role == "user" else "user"
        content, name = message.get("content"), f"messages[{place}].content"
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            if any(part.get("type") != "text" for part in content):
                raise invalid("messages", "content other than text is not supported")
            content = "\n".join(get_text({name: part.get("text")}, name) for part in content)
        messages.append({"role": role, "content": get_text({name: content}, name)})
    if expected != "assistant" or not messages[-1]["content"].strip():
        raise invalid("messages", "the last message must be the user's, and not empty")
    written = "\n".join(message["content"] for message in messages)
    return written, [chat_prompt(messages, tokenizer)]


# ---------------------------------------------------------------- responses


def full_response(
    request: CompletionRequest, sequences: list[Sequence], texts: list[str], reasons: list[str]
) -> dict:
    """An answer that the filter stopped has no log-probabilities."""
    choices = []
    for index, (s, text, reason) in enumerate(zip(sequences, texts, reasons, strict=True)):
        message, logprobs = {"role": "assistant", "content": text}, None
        if s.params.logprobs is not None and reason != "content_filter":
            logprobs = (chat_logprobs if request.chat else completion_logprobs)(s, text)
        answer = {"message": message} if request.chat else {"text": text}
        choices.append(choice(index, answer, reason, logprobs))
    kind = "chat.completion" if request.chat else "text_completion"
    content = {"object": kind, "choices": choices, "usage": usage(request, sequences)}
    return request.header | content


def choice(index: int, answer: dict, reason: str | None, logprobs: dict | None = None) -> dict:
    return {"index": index, **answer, "logprobs": logprobs, "finish_reason": reason}


def usage(request: CompletionRequest, sequences: list[Sequence]) -> dict[str, int]:
    read, written = sum(map(len, request.prompts)), sum(len(s.ids) for s in sequences)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def chunk(
    request: CompletionRequest, index: int, text: str, reason: str | None = None, note: str = ""
) -> bytes:
    """More of an answer's text, or its end. `note`, our own field, explains the end to a person."""
    delta = {} if reason else {"content": text}
    answer = {"delta": delta} if request.chat else {"text": text}
    more = {"note": note} if note else {}
    return chunk_event(request, [choice(index, answer, reason) | more])


def first_chunks(request: CompletionRequest) -> bytes:
    """A chat's answers begin with their role."""
    start = {"delta": {"role": "assistant", "content": ""}}
    choices = [choice(i, start, None) for i in range(len(request.params))] if request.chat else []
    return b"".join(chunk_event(request, [one]) for one in choices)


def chunk_event(request: CompletionRequest, choices: list[dict], **more: Any) -> bytes:
    kind = "chat.completion.chunk" if request.chat else "text_completion"
    return event({**request.header, "object": kind, "choices": choices, **more})


def event(content: dict) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


# ---------------------------------------------------------------- log-probabilities


def visible_tokens(s: Sequence, text: str) -> Iterator[tuple[int, int, float, list]]:
    """Offset, token, log-probability and likeliest tokens, up to where a stop string cut."""
    stream, end = s.tokenizer.stream(after=s.prompt), -s.skipped
    for token, logprob, top in zip(s.ids, s.logprobs, s.top_logprobs, strict=True):
        start, end = end, end + len(stream.push(token))
        if end > len(text):
            return
        likeliest = [(other, max(value, MIN_LOGPROB)) for other, value in top]
        yield max(0, start), token, max(logprob, MIN_LOGPROB), likeliest


def chat_logprobs(s: Sequence, text: str) -> dict:
    def entry(token: int, logprob: float) -> dict:
        name, in_bytes = s.tokenizer.token_text(token), list(s.tokenizer.piece_bytes(token))
        return {"token": name, "logprob": logprob, "bytes": in_bytes}

    content = [
        {**entry(token, logprob), "top_logprobs": [entry(*pair) for pair in top]}
        for _, token, logprob, top in visible_tokens(s, text)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(s: Sequence, text: str) -> dict:
    content, name = list(visible_tokens(s, text)), s.tokenizer.token_text
    return {
        "tokens": [name(token) for _, token, _, _ in content],
        "token_logprobs": [logprob for _, _, logprob, _ in content],
        "top_logprobs": [{name(token): value for token, value in top} for *_, top in content],
        "text_offset": [start for start, *_ in content],
    }
