"""Which chat model the settings name, and what makes it the same teacher another time."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel

from finetune.settings import TeacherSettings
from r4r_graph.chat_models import named_identity, open_chat_model
from r4r_graph.errors import ModelError, SettingError, TeacherError

ENGINE = "engine"
"""`teacher.model` that stands for our own base model."""


def provider_model(settings: TeacherSettings) -> BaseChatModel:
    """The chat model that the settings name; see `finetune.teacher.asking.open_teacher`."""
    if settings.base_url is None and not all(settings.model.partition(":")):
        raise SettingError(
            f"bad setting teacher.model={settings.model!r}: write provider:model, such as "
            f"openai:gpt-4o-mini, or {ENGINE}; or give the base_url of a server"
        )
    try:
        return open_chat_model(settings.model, settings.base_url, role="teacher")
    except ModelError as error:
        raise TeacherError(str(error)) from None


def engine_identity(base: str, digest: str, adapter: str | None) -> dict[str, Any]:
    """What makes an engine the same teacher."""
    return {"base": base, "digest": digest, "adapter": adapter}


def provider_identity(settings: TeacherSettings) -> dict[str, Any]:
    """What makes a provider's model the same teacher."""
    return named_identity(settings.model, settings.base_url)
