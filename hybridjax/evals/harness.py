"""Tasks of lm-evaluation-harness (the extra `eval`).

    python -m hybridjax.evaluate --workdir=runs/NAME --harness=hellaswag,arc_easy

Nothing is truncated, since the models have no longest text; where evaluation chose a base of the
log scaling, it is used.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridjax.config import UserError
from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals.completion import complete
from hybridjax.evals.likelihood import Request, log_likelihoods
from hybridjax.files import one_line
from hybridjax.models.decoder import Decoder
from hybridjax.workdir import Run

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ModuleNotFoundError as error:
    raise UserError(
        f"tasks need lm-evaluation-harness ({error}): pip install 'hybridjax[eval]'"
    ) from error

SCORES = ("acc_norm", "acc", "contains", "exact_match", "f1")  # shares, more is better
BOOTSTRAPS = 1000  # draws for the errors of metrics that are not means


class HarnessModel(TemplateLM):
    """A model as the harness asks it, which splits texts into prefix and continuation."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, logit_base: float | None = None):
        super().__init__()
        self._model, self._tokenizer, self._base = model, tokenizer, logit_base

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        return self._score([(prefix, continuation) for _, prefix, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], **_) -> list[float]:
        texts = [request.args[0] for request in requests]
        scored = self._score([([self.prefix_token_id], self.tok_encode(text)) for text in texts])
        return [nats for nats, _ in scored]

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        return log_likelihoods(self._model, requests, self._base)

    def generate_until(self, requests: list[Instance], **_) -> list[str]:
        texts: dict[int, str] = {}
        by_options = defaultdict(list)
        for i, request in enumerate(requests):
            by_options[json.dumps(request.args[1], sort_keys=True)].append(i)
        for text, members in by_options.items():
            options = normalize_gen_kwargs(json.loads(text))
            prompts = [self.tok_encode(requests[i].args[0]) for i in members]
            answers = complete(
                self._model,
                self._tokenizer,
                [np.array(prompt or [self.prefix_token_id]) for prompt in prompts],
                tokens=options["max_gen_toks"],
                until=options["until"],
                logit_base=self._base,
                temperature=options.get("temperature", 0.0),
                top_k=options.get("top_k", 0),
                top_p=options.get("top_p", 1.0),
            )
            texts |= dict(zip(members, answers, strict=True))
        return [texts[i] for i in range(len(requests))]


class Tasks(TaskManager):
    """Tasks that the harness knows by these names, or that are files in `folder`."""

    def __init__(self, names: Sequence[str], folder: str | None = None):
        super().__init__(include_path=folder or None)
        self.names = list(names)
        if unknown := set(names) - set(self.all_tasks):
            known = "`lm-eval ls tasks` lists what there is"
            raise UserError(f"there is no task {min(unknown)!r}: {known}")

    def load(self, task_list):
        """Raises `UserError` where the data is missing."""
        data = f"cannot load the data of {', '.join(task_list)}: "
        with one_line(data, "fetch it once where there is a network, into HF_HOME"):
            return super().load(task_list)

    def measure(self, model: HarnessModel, limit: int | None = None) -> dict[str, Any]:
        """The harness's results; `limit`: examples per task, None: all."""
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # JAX does not survive a fork
        return lm_eval.simple_evaluate(
            model,
            tasks=self.names,
            task_manager=self,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )


def mean_score(results: dict[str, Any], tasks: Sequence[str]) -> float:
    """Of the first of `SCORES` that each task has."""
    values = []
    for task in tasks:
        metrics = {key.partition(",")[0]: x for key, x in results["results"][task].items()}
        found = [metrics[name] for name in SCORES if name in metrics]
        if not found:
            raise UserError(f"{task} measures {', '.join(metrics)}, none of {', '.join(SCORES)}")
        values.append(found[0])
    return float(np.mean(values))


def summary(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the results."""
    kept = {name: results[name] for name in ("results", "n-shot", "n-samples", "versions")}
    names = dict(name=run.config.name, step=run.step, logit_base=run.logit_base)
    return {**names, "lm_eval": lm_eval.__version__, **kept}


def table(results: dict[str, Any]) -> str:
    return make_table(results)
