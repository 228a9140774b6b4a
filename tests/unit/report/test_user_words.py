"""Samples are headed by what the user said, whatever template wrote the prompt."""

import pytest

from megatron_tip.report.user_words import user_words

CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
DEEPSEEK = "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>{}<\uff5cAssistant\uff5c>"
MISTRAL = "<s>[INST] {} [/INST]"
PLAIN = "<|bos|>system: own\nuser: {}\nassistant: "
ANSWERED = "<|im_start|>user\nFirst?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n" + CHATML


@pytest.mark.parametrize("template", [CHATML, LLAMA3, DEEPSEEK, MISTRAL, PLAIN, ANSWERED])
@pytest.mark.parametrize("words", ["What is 3 + 4?", "Two lines:\nuser and assistant"])
def test_the_last_message_of_the_user_is_found(template: str, words: str):
    assert user_words(template.format(words)) == words


@pytest.mark.parametrize("prompt", ["What is 3 + 4?", "", "<|im_start|>user\n<|im_end|>"])
def test_what_has_no_known_form_stays(prompt: str):
    assert user_words(prompt) == prompt
