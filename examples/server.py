# SPDX-License-Identifier: Apache-2.0
"""A streaming server with many conversations: each is a cache of fixed size, so you know how many fit into memory.

pip install -e '.[examples]'
python examples/server.py --model Qwen/Qwen2.5-0.5B-Instruct --port 8000
curl -N localhost:8000/chat/ada --json '{"text": "Hello, who are you?"}'    # the answer, word by word
curl localhost:8000/chat                                                    # who is there, and what it costs
curl -X DELETE localhost:8000/chat/ada
"""

import argparse
from dataclasses import dataclass, field
from threading import Lock, Thread

import torch
import uvicorn
from chat import CACHE, encode_turn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from fixed_size_kv_cache import FixedSizeDynamicCache, enable


class Turn(BaseModel):
    text: str
    max_new_tokens: int = 256


@dataclass
class Conversation:
    cache: FixedSizeDynamicCache
    ids: torch.Tensor  # [1, S]
    lock: Lock = field(default_factory=Lock)  # one turn at a time; other conversations go on


def make_app(model, tokenizer, cache_size: int) -> FastAPI:
    app, conversations = FastAPI(), {}

    def answer(conversation: Conversation, turn: Turn, streamer: TextIteratorStreamer) -> None:
        try:
            with conversation.lock:
                new = encode_turn(tokenizer, turn.text, first=conversation.ids.shape[1] == 0)
                ids = torch.cat([conversation.ids, new.to(model.device)], dim=1)
                conversation.ids = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=turn.max_new_tokens,
                    streamer=streamer,
                    **{CACHE: conversation.cache},
                )
        finally:
            streamer.end()  # after an error too, or the client would wait for ever

    @app.post("/chat/{name}")
    def chat(name: str, turn: Turn) -> StreamingResponse:
        cache = FixedSizeDynamicCache(config=model.config, cache_size=cache_size)
        ids = torch.empty(1, 0, dtype=torch.long, device=model.device)
        conversation = conversations.setdefault(name, Conversation(cache, ids))
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        Thread(target=answer, args=(conversation, turn, streamer), daemon=True).start()
        return StreamingResponse(streamer, media_type="text/plain")

    @app.get("/chat")
    def list_conversations() -> dict:
        return {
            name: {"tokens": one.cache.get_seq_length(), "bytes": one.cache.nbytes}
            for name, one in conversations.copy().items()
        }

    @app.delete("/chat/{name}")
    def forget(name: str) -> None:
        if conversations.pop(name, None) is None:
            raise HTTPException(404, f"there is no conversation {name}")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve chats in constant memory each.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="a folder or a name on the Hub")
    parser.add_argument("--cache-size", type=int, default=1024, help="tokens per layer and KV head")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    enable(model, cache_size=args.cache_size)
    uvicorn.run(make_app(model, tokenizer, args.cache_size), port=args.port)


if __name__ == "__main__":
    main()
