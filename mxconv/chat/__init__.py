"""Chat templates: messages to the text that a model was trained on, rendered as transformers renders them."""

from mxconv.chat.template import ChatTemplate

__all__ = ["ChatTemplate"]
