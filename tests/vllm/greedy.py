"""Whether what an engine drew is what the student of this process would draw greedily, token by token."""

import torch

LEAST_GAP = 2e-3  # nats between the two likeliest tokens, under which engines may choose either


def compared_with_own(generate):
    """Wrap ``ServerEngine.generate`` of greedy rollouts; return the method and what it finds: tokens, rows and ties."""
    found = {"tokens": 0, "rows": 0, "ties": []}

    def both(self, prompts):
        theirs = generate(self, prompts)
        for prompt, one in zip(prompts, theirs, strict=True):
            with torch.no_grad():
                logits = self._student(input_ids=torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            gaps = logprobs.amax(1) - own
            assert float(gaps.max()) < LEAST_GAP, f"step {self.host.step}: {float(gaps.max()):.4f} nats from greedy"
            assert float((torch.tensor(one.logprobs) - own).abs().max()) < 1e-3
            found["ties"] += [gap for gap in gaps.tolist() if gap > 0]
            found["tokens"] += len(one.ids)
            found["rows"] += 1
        return theirs

    return both, found


def said(found):
    return (
        f"{found['rows']} rollouts of {found['tokens']} tokens in all are greedy by the student's own logits; "
        f"{len(found['ties'])} tokens were ties within {LEAST_GAP} nats"
    )
