"""The text of single ids: whole characters as they are, parts of one as their bytes."""

from megatron_tip.training.id_text import id_text
from tests.helpers.tiny_tokenizer import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


class SentencePiece:
    """A tokenizer whose unknown characters are bytes of their own."""

    def decode(self, ids):
        return "\ufffd"

    def convert_ids_to_tokens(self, token):
        return "<0xE2>" if token == 1 else "no bytes \u2603"


def test_whole_characters_are_what_the_tokenizer_says():
    for token in TOKENIZER.encode("the fox", add_special_tokens=False):
        assert id_text(token, TOKENIZER) == TOKENIZER.decode([token])


def test_parts_of_a_character_are_shown_by_their_bytes():
    ids = TOKENIZER.encode("\u6570", add_special_tokens=False)
    assert "".join(id_text(token, TOKENIZER) for token in ids) == "\u27e8E6\u27e9\u27e895\u27e9\u27e8B0\u27e9"


def test_bytes_of_other_vocabularies():
    assert id_text(1, SentencePiece()) == "\u27e8E2\u27e9"
    assert id_text(2, SentencePiece()) == "\ufffd"
