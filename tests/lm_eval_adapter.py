"""lm-evaluation-harness on our scorer: any of its tasks, with every shared prefix computed once.

    lm = LilleLM(Scorer("checkpoints/best_model.pt"))
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"], num_fewshot=0)

Some of its tasks import the package "evaluate", for which evaluate.py would stand in: run those
from another folder than the root.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evaluation.scoring import Scorer


class LilleLM(TemplateLM):
    """An `LM` of lm_eval; `prefix_id` stands before texts without a context."""

    def __init__(self, scorer: Scorer, prefix_id: int | None = None):
        super().__init__()
        self.scorer = scorer
        tokenizer = scorer.model.tokenizer
        eos = getattr(tokenizer, "eos_id", None)
        self.prefix_id = prefix_id if prefix_id is not None else eos
        if self.prefix_id is None:
            self.prefix_id = tokenizer.eos_token_id

    @property
    def eot_token_id(self) -> int:
        return self.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.scorer.model.encode([string])[0]

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
        pairs = [self.scorer.fit(context, end) for _, context, end in requests]
        return [(logprob, greedy) for logprob, greedy, _ in self.scorer.score_ids(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_id, self.scorer.model.block_size, 1
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scores = self.scorer.score_ids([(list(a), list(b)) for a, b in pairs])
            sums.append(sum(logprob for logprob, _, _ in scores))
        return sums

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        replies = []
        for request in requests:
            text, options = request.args
            n_new = min(options.get("max_gen_toks", 256), self.scorer.model.block_size // 2)
            ids = self.tok_encode(text)[-(self.scorer.model.block_size - n_new) :]
            (reply,) = self.scorer.model.generate([ids], n_new)
            for stop in options.get("until", []):
                reply = reply.split(stop)[0]
            replies.append(reply)
        return replies
