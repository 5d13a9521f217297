"""Tokenizer, chat template, streaming detokenizer."""

from paceline.text.chat import ChatTemplate, Message
from paceline.text.detokenizer import Detokenizer
from paceline.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Message", "Tokenizer"]
