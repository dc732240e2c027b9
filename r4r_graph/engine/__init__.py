"""Engines: what turns requests into texts and rating distributions.

`local` runs a base model with its adapters here, `fake` needs no model; both sit behind the
micro-batcher in `batching`. `server` asks a model server, `chat_engine` any LangChain chat model;
both sit behind the event loop in `remote`. `chat` shows an engine as a LangChain chat model.
"""

from r4r_graph.engine.base import (
    Engine,
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Message,
    RateRequest,
    RateResult,
)
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.chat import EngineChatModel
from r4r_graph.engine.fake import fake_engine
from r4r_graph.engine.local import load_local_engine

__all__ = [
    "BatchingEngine",
    "Engine",
    "EngineChatModel",
    "EngineInfo",
    "GenerateRequest",
    "GenerateResult",
    "Message",
    "RateRequest",
    "RateResult",
    "fake_engine",
    "load_local_engine",
]
