"""Teachers that somebody else wrote against the protocol alone: nothing of the package's own classes."""

import torch
from transformers import AutoModelForCausalLM

from kd_plugin.lineage import Source
from kd_plugin.signals import HiddenSignal, OutputHead, SparseSignal
from kd_plugin.teachers import Capabilities
from kd_plugin.vocab import Vocabulary
from tests.tiny import byte_tokenizer


class InProcessStranger:
    """Gives hidden states, and has the four members of a teacher and no other."""

    capabilities = Capabilities("a stranger", frozenset({"hidden"}), in_process=True)

    def __init__(self, path):
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        self.source = Source(name="stranger", ref=path)
        self.vocabulary = Vocabulary.from_tokenizer(byte_tokenizer())

    def score(self, input_ids, attention_mask, positions):
        with torch.no_grad():
            hidden = self._model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        head = OutputHead.from_model(self._model, self.vocabulary.size)
        return HiddenSignal(hidden.flatten(0, 1)[positions], head)


class RemoteStranger(InProcessStranger):
    """Lists its likeliest tokens, as something that answers from elsewhere would, and in no order."""

    capabilities = Capabilities("a remote stranger", frozenset({"top_k", "sampled_token"}), temperature=1.0)

    def __init__(self, path, top_k=32):
        super().__init__(path)
        self._top_k = top_k

    def score(self, input_ids, attention_mask, positions):
        signal = super().score(input_ids, attention_mask, positions)
        logprobs = signal.head.logits(signal.hidden).log_softmax(-1)
        listed, ids = logprobs.topk(self._top_k)
        tail = torch.log1p(-listed.exp().sum(-1).clamp(max=1 - 1e-7))
        after = input_ids.flatten()[(positions + 1).clamp(max=input_ids.numel() - 1)]
        mixed = torch.arange(self._top_k - 1, -1, -1)
        return SparseSignal(ids[:, mixed], listed[:, mixed], tail, None, logprobs.gather(1, after[:, None]).squeeze(1))
