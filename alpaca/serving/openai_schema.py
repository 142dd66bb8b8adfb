"""OpenAI's completions API from the server's side: a request checked, an answer shaped.

    asked = understood(body, path, model, tokenizer, most)     # or a Problem
    whole(asked, sequences, texts, reasons)                    # the answer in one piece
    piece(asked, index, text)                                  # or as server-sent events

  - A chat goes into the form that training and `alpaca chat` use; a completion goes on
    from its prompt as it is. Instead of a prompt it may have an `instruction` and an `input`, which
    go into Alpaca's template: what the page sends.
  - Beyond OpenAI's fields there are top_k and repetition_penalty. A field of theirs that would
    change the answer and is not supported is refused, never ignored.
  - `max_tokens` beyond what the server gives is cut to it; finish_reason "length" tells.

platform.openai.com/docs/api-reference

Shown by tests/test_demo.py: test_openai_chat.
"""

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from alpaca.inference.engine import Sequence
from alpaca.inference.sampling import SamplingParams
from alpaca.serving.http import Problem
from dataset import chat_prompt, format_prompt
from tokenizer import SPACE, Tokenizer

MOST_ANSWERS, MOST_STOPS = 8, 16
LENGTHS = ("max_tokens", "max_completion_tokens")  # the older name and the newer
NEVER = -9999.0  # a logprob of -inf is no JSON
UNSUPPORTED: dict[str, tuple] = {  # and what means nothing
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),  # there are no functions, see below
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Asked:
    """A request for answers, checked."""

    chat: bool
    text: str  # what a person wrote, for the filter
    prompts: list[list[int]]
    ways: list[SamplingParams]  # of the answers to each prompt
    stream: bool
    usage: bool  # also at the end of a stream
    about: dict[str, Any]  # id, created and model, which every piece of the answer repeats

    @property
    def each(self) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompt and way of every answer, the answers to one prompt together."""
        return [ids for ids in self.prompts for _ in self.ways], self.ways * len(self.prompts)


# ---------------------------------------------------------------- a request


def read_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise Problem(400, "the body is no JSON object")
    return content


def text_of(body: dict, name: str, default: str | None = None) -> str:
    """A field that holds a text; without a default it must be there."""
    value = body.get(name)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise Problem(400, f"{name} must be a text", param=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Problem(400, f"{name} holds half a surrogate pair", param=name) from None
    return value


def number(body: dict, name: str, default: Any, low: float, high: float, kind: type = float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise Problem(400, f"{name} must be {what} from {low} to {high}", param=name)
    return kind(value)


def yes_or_no(body: dict, name: str) -> bool:
    value = body.get(name)
    if not (value is None or isinstance(value, bool)):
        raise Problem(400, f"{name} must be true or false", param=name)
    return bool(value)


def understood(body: dict, path: str, model: str, tokenizer: Tokenizer, most: int) -> Asked:
    """The request to /v1/completions or /v1/chat/completions, for a server of `model` that gives
    `most` tokens."""
    chat = path.endswith("chat/completions")
    if body.get("model") not in (None, model):
        said = f"there is no model {str(body['model'])[:100]!r} here: the one that is, is {model!r}"
        raise Problem(404, said, param="model", code="model_not_found")
    for name, nothing in UNSUPPORTED.items():
        if body.get(name) not in (None, *nothing):
            raise Problem(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    stream, n = yes_or_no(body, "stream"), number(body, "n", 1, 1, MOST_ANSWERS, int)
    logprobs = number(body, "logprobs", None, 0, 5, int) if not chat else None
    if chat and yes_or_no(body, "logprobs"):
        logprobs = number(body, "top_logprobs", 0, 0, 20, int)
    elif body.get("top_logprobs") is not None:
        raise Problem(400, "top_logprobs are told with logprobs only", param="top_logprobs")
    if stream and logprobs is not None:
        raise Problem(400, "logprobs are told without stream only", param="logprobs")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Problem(400, "stream_options must be an object", param="stream_options")
    text, prompts = conversation(body, tokenizer) if chat else texts(body, tokenizer)
    if n * len(prompts) > MOST_ANSWERS:
        raise Problem(400, f"at most {MOST_ANSWERS} answers to a request", param="n")
    about = {"id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)}
    about |= {"created": int(time.time()), "model": model}
    way = sampling(body, most, logprobs)
    ways = [replace(way, seed=way.seed + i) for i in range(n)]
    return Asked(chat, text, prompts, ways, stream, yes_or_no(options, "include_usage"), about)


def sampling(body: dict, most: int, logprobs: int | None) -> SamplingParams:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(s and isinstance(s, str) for s in stops):
        raise Problem(400, "stop must be a text or a list of texts", param="stop")
    if len(stops) > MOST_STOPS or max(map(len, stops), default=0) > 200:
        raise Problem(400, f"at most {MOST_STOPS} stops of 200 characters", param="stop")
    longest = [number(body, name, most, 1, 1 << 30, int) for name in LENGTHS]
    seed = number(body, "seed", None, 0, (1 << 63) - 1, int)
    return SamplingParams(
        temperature=number(body, "temperature", 1.0, 0, 2),
        top_k=number(body, "top_k", 0, 0, 1 << 30, int),
        top_p=max(1e-6, number(body, "top_p", 1.0, 0, 1)),  # 0: the likeliest alone
        repetition_penalty=number(body, "repetition_penalty", 1.0, 0.1, 10),
        seed=secrets.randbits(31) if seed is None else seed,
        max_new_tokens=min(most, *longest),
        stop=tuple(stops),
        logprobs=logprobs,
    )


def texts(body: dict, tokenizer: Tokenizer) -> tuple[str, list[list[int]]]:
    """Of a completion: what was written, and the prompts' ids."""
    if "instruction" in body:
        instruction, input = text_of(body, "instruction"), text_of(body, "input", "")
        if not instruction.strip():
            raise Problem(400, "the instruction is empty: say what to do", param="instruction")
        written, asked = f"{instruction}\n{input}".strip(), [format_prompt(instruction, input)]
    else:
        given = body.get("prompt")
        asked = given if isinstance(given, list) else [given]
        asked = [text_of({"prompt": one}, "prompt") for one in asked[: MOST_ANSWERS + 1]]
        if not asked:
            raise Problem(400, "prompt is an empty list", param="prompt")
        written = "\n".join(asked)
    return written, [tokenizer.encode(one, bos=True) for one in asked]


def conversation(body: dict, tokenizer: Tokenizer) -> tuple[str, list[list[int]]]:
    """The same of a chat: system, or not; then user and assistant by turns; the user last."""
    given, messages, expected = body.get("messages"), [], "user"
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise Problem(400, "messages must be a list of objects", param="messages")
    for place, message in enumerate(given):
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role != expected and not (role == "system" and place == 0):
            said = f"messages[{place}] is not the {expected}'s: they take turns"
            raise Problem(400, said, param="messages")
        if role != "system":
            expected = "assistant" if role == "user" else "user"
        content, named = message.get("content"), f"messages[{place}].content"
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            if any(part.get("type") != "text" for part in content):
                raise Problem(400, "contents other than text are not supported", param="messages")
            content = "".join(text_of({named: part.get("text")}, named) for part in content)
        messages.append({"role": role, "content": text_of({named: content}, named)})
    if expected != "assistant" or not messages[-1]["content"].strip():
        raise Problem(400, "the last message must be the user's", param="messages")
    written = "\n".join(message["content"] for message in messages)
    return written, [chat_prompt(messages, tokenizer)]


# ---------------------------------------------------------------- an answer


def whole(asked: Asked, sequences: list[Sequence], texts: list[str], reasons: list[str]) -> dict:
    """The answer in one piece. Of what the filter stopped nothing is told but that, and no token
    that spells what a stop text cut off."""
    choices = []
    for index, (s, text, reason) in enumerate(zip(sequences, texts, reasons, strict=True)):
        said = {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
        told = s.params.logprobs is not None and reason != "content_filter"
        logprobs = (chat_logprobs if asked.chat else plain_logprobs)(s, text) if told else None
        choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": reason})
    kind = "chat.completion" if asked.chat else "text_completion"
    return {**asked.about, "object": kind, "choices": choices, "usage": usage(asked, sequences)}


def usage(asked: Asked, sequences: list[Sequence]) -> dict[str, int]:
    read, written = sum(map(len, asked.prompts)), sum(len(s.ids) for s in sequences)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def piece(asked: Asked, index: int, text: str, reason: str | None = None, note: str = "") -> bytes:
    """More of an answer's text, or its end, as an event; `note`, ours, says why, for a person."""
    if asked.chat:
        said: dict[str, Any] = {"delta": {} if reason else {"content": text}}
    else:
        said = {"text": text}
    choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
    return piece_of(asked, [choice | ({"note": note} if note else {})])


def first_pieces(asked: Asked) -> bytes:
    """A chat's answers begin with who speaks."""
    if not asked.chat:
        return b""
    said = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return b"".join(piece_of(asked, [{"index": i, **said}]) for i in range(len(asked.ways)))


def last_piece(asked: Asked, sequences: list[Sequence]) -> bytes:
    return piece_of(asked, [], usage=usage(asked, sequences)) if asked.usage else b""


def piece_of(asked: Asked, choices: list[dict], **more: Any) -> bytes:
    kind = "chat.completion.chunk" if asked.chat else "text_completion"
    return event({**asked.about, "object": kind, "choices": choices, **more})


def event(content: dict) -> bytes:
    return b"data: %b\n\n" % json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")


def spelled(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """A token as text, and its bytes."""
    return tokenizer.piece(token).replace(SPACE, " "), list(tokenizer.piece_bytes(token))


def tokens_of(s: Sequence, text: str) -> Iterator[tuple[int, int, float, list]]:
    """Where in the text each of its tokens begins, the token, its logprob and the likeliest, up to
    the first that ends behind the text."""
    stream, end = s.tokenizer.stream(after=s.prompt), 0
    for token, logprob, likeliest in zip(s.ids, s.logprobs, s.top_logprobs, strict=True):
        start, end = end, end + len(stream.push(token))
        if end > len(text):
            return
        yield start, token, logprob, likeliest


def chat_logprobs(s: Sequence, text: str) -> dict:
    def told(token: int, logprob: float) -> dict:
        text, spelling = spelled(s.tokenizer, token)
        return {"token": text, "logprob": max(logprob, NEVER), "bytes": spelling}

    content = [
        {**told(token, logprob), "top_logprobs": [told(*pair) for pair in likeliest]}
        for _, token, logprob, likeliest in tokens_of(s, text)
    ]
    return {"content": content, "refusal": None}


def plain_logprobs(s: Sequence, text: str) -> dict:
    tokens = list(tokens_of(s, text))
    return {
        "tokens": [spelled(s.tokenizer, token)[0] for _, token, _, _ in tokens],
        "token_logprobs": [max(logprob, NEVER) for _, _, logprob, _ in tokens],
        "top_logprobs": [
            {spelled(s.tokenizer, token)[0]: max(value, NEVER) for token, value in likeliest}
            for *_, likeliest in tokens
        ],
        "text_offset": [start for start, *_ in tokens],
    }
