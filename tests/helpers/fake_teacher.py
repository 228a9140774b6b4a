"""A fake SGLang server that scores with a transformers model, exactly; it can be told to answer wrongly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.helpers.fake_sglang import FakeSGLang


class FakeTeacher(FakeSGLang):
    """Answers /generate of zero new tokens with the log-probabilities of the model in `folder`, at temperature 1.

    `names_ids = False`: as a server that knows nothing of token_ids_logprob. `spoil`: changes the answer's meta_info
    before it is sent.
    """

    def __init__(self, folder: Path, *, names_ids: bool = True) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._names_ids = names_ids
        self.spoil: Callable[[dict[str, Any]], None] = lambda meta: None
        super().__init__(vocab_size=self._model.config.vocab_size)

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, start = body["input_ids"], body["logprob_start_len"]
        with torch.no_grad():
            logprobs = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)[start:-1]
        answer = self.chunk([], total=0, finished=True)
        meta = answer["meta_info"]
        labels = torch.tensor(ids[start + 1 :])
        on_labels = logprobs.gather(1, labels[:, None]).squeeze(1).tolist()
        # As the real one does, it calls the last id of its vocabulary 0.
        names = [0 if token == self.vocab_size - 1 else token for token in labels.tolist()]
        meta["input_token_logprobs"] = [[None, ids[start], None], *triples(on_labels, names)]
        if num := body.get("top_logprobs_num"):
            values, tops = logprobs.topk(num)
            rows = zip(values.tolist(), tops.tolist(), strict=True)
            meta["input_top_logprobs"] = [None, *(triples(*row) for row in rows)]
        if self._names_ids and (wanted := body.get("token_ids_logprob")):
            meta["input_token_ids_logprobs"] = [None, *(triples(row, wanted) for row in logprobs[:, wanted].tolist())]
        self.spoil(meta)
        return answer


def triples(logprobs: list[float], ids: list[int]) -> list[list[Any]]:
    return [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]


def scored_by(folder: Path, ids: tuple[int, ...]) -> torch.Tensor:
    """`[s - 1, V]` float64 log-probabilities of the tokens behind each of `ids` but the last."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1]
