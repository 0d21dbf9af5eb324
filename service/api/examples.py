"""Examples of answers, for the API's description. A test checks them against the schemas."""

import json
from typing import Any

_SPECULATION = {
    "speculative_decoding": {
        "num_spec_steps": 3,
        "num_spec_tokens": 4,
        "num_draft_tokens": 9,
        "num_accepted_draft_tokens": 5,
        "mean_acceptance_length": 2.67,
        "draft_acceptance_rate": 0.556,
        "acceptance_histogram": [0, 2, 0, 1, 0],
    }
}
_USAGE = {
    "prompt_tokens": 8,
    "completion_tokens": 11,
    "total_tokens": 19,
    "prompt_tokens_details": {"cached_tokens": 7},
}
_COMPLETION_HEAD = {
    "id": "cmpl-94b4b7f567f248189de08999fc04a365",
    "object": "text_completion",
    "created": 1795706111,
    "model": "diffuspec-python",
}
_CHAT_HEAD = {
    "id": "chatcmpl-802b1375f68f41d1bc767d34741bff23",
    "object": "chat.completion",
    "created": 1795706111,
    "model": "diffuspec-python",
}
_CHUNK_HEAD = {**_CHAT_HEAD, "object": "chat.completion.chunk"}
_GOES_ON = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None}
_ENDS = {**_GOES_ON, "finish_reason": "stop"}
_MODEL = {
    "id": "diffuspec-python",
    "object": "model",
    "created": 1795706000,
    "owned_by": "diffuspec",
    "max_model_len": 1024,
    "drafter": "diffusion (qwen2, block, 1.3M, identical vocabulary) + own text + n-grams",
}

ANSWERS: dict[str, Any] = {
    "Completion": {
        **_COMPLETION_HEAD,
        "choices": [{**_ENDS, "text": "    with open(path) as file:\n"}],
        "usage": _USAGE,
        "metrics": _SPECULATION,
    },
    "ChatCompletion": {
        **_CHAT_HEAD,
        "choices": [
            {**_ENDS, "message": {"role": "assistant", "content": "with open(path) as file:\n", "refusal": None}}
        ],
        "usage": _USAGE,
        "metrics": _SPECULATION,
    },
    "ModelList": {"object": "list", "data": [_MODEL]},
    "ModelCard": _MODEL,
    "Tokenized": {"count": 3, "max_model_len": 1024, "tokens": [615, 517, 201]},
    "Detokenized": {"prompt": "import os\n"},
    "TokenizerInfo": {
        "type": "BPE",
        "size": 2048,
        "vocabulary_size": 2048,
        "max_model_len": 1024,
        "special_tokens": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    },
    "Health": {"status": "ok"},
    "Startup": {"phase": "loading", "progress": 0.4, "detail": "reading the target", "seconds": 2.5},
    "Version": {"version": "0.1.0"},
}

# The events of a stream with `include_usage`, without the last one, `[DONE]`.
CHUNKS: dict[str, list[str]] = {
    name: [json.dumps(chunk) for chunk in chunks]
    for name, chunks in {
        "Completion": [
            {**_COMPLETION_HEAD, "choices": [{**_GOES_ON, "text": "    with open"}], "usage": None},
            {**_COMPLETION_HEAD, "choices": [{**_ENDS, "text": "(path) as file:\n"}], "usage": None},
            {**_COMPLETION_HEAD, "choices": [], "usage": _USAGE, "metrics": _SPECULATION},
        ],
        "ChatCompletionChunk": [
            {
                **_CHUNK_HEAD,
                "choices": [{**_GOES_ON, "delta": {"role": "assistant", "content": "with open"}}],
                "usage": None,
            },
            {**_CHUNK_HEAD, "choices": [{**_ENDS, "delta": {"content": "(path) as file:\n"}}], "usage": None},
            {**_CHUNK_HEAD, "choices": [], "usage": _USAGE, "metrics": _SPECULATION},
        ],
    }.items()
}
