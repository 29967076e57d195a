"""Rollouts: a feed that asks the model of this step for answers to prompts, and has them judged.

What a batch holds is a function of the seed, the step and the weights: a run that was killed has the same series.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen3_jax.data.lanes import refuse_other_order
from qwen3_jax.decode import Pool, Result, ThinkingTokens
from qwen3_jax.request import Request
from qwen3_jax.rl.judges import Judges
from qwen3_jax.rl.pack import Rollout, is_settled, to_batch, with_advantages
from qwen3_jax.rl.prompts import Asked, Prompts
from qwen3_jax.rl.rewards import records_of, with_reward
from qwen3_jax.tasks.deadline import DIED, NO_RESULT
from qwen3_jax.text.answer import AnswerReader
from qwen3_jax.text.tokenizer import load_tokenizer
from qwen3_jax.train.config import TrainConfig
from qwen3_jax.train.feed import describe_tokenizer
from qwen3_jax.train.objective import Batch, BatchArray, batch_structs

Groups = list[list[Rollout]]  # the answers to each prompt


class RolloutFeed:
    """Answers of the present weights to the next prompts, packed.

    Each step has a pool of its own: its programs are compiled once, and its weights and cache are freed before the
    update.

    conclusion: how prompts are written, where that is not obvious.

    Args:
      arrays: the objective's, of packed rows: `advantages` among them where answers are compared.

    Raises:
      ValueError: for files or settings that do not fit, or a batch that does not divide over the mesh.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, arrays: Mapping[str, BatchArray]) -> None:
        assert config.rollouts is not None
        self._config, self._rollouts = config, config.rollouts
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        self._tokens = ThinkingTokens.from_tokenizer(self._tokenizer)
        self._reader = AnswerReader(self._tokenizer, self._tokens)
        self._prompts = Prompts(config, self._tokenizer)
        self.conclusion = self._prompts.form.conclusion
        self._structs = batch_structs(arrays, mesh, config.accumulation * config.rollouts.updates)
        self._judges = Judges(config.rollouts.judges) if "advantages" in arrays else None
        self._step = 0
        self._log: Path | None = None
        self.numbers: dict[str, float] = {}

    def next(self, params: Any) -> Batch:
        self._step += 1
        start = time.perf_counter()
        groups, left_out = self._groups(params)
        self.numbers |= self._summary([*groups, *left_out]) | {"time/rollout_step": time.perf_counter() - start}
        self._write(groups, left_out)
        settings = (self._config.data, self._rollouts.updates, self._config.accumulation, self._tokenizer.pad_id)
        arrays = to_batch(groups, *settings)

        def put(name: str, struct: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback(struct.shape, struct.sharding, lambda index: arrays[name][index])

        return {name: put(name, struct) for name, struct in self._structs.items()}

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, "drawn": dict(self._prompts.drawn), "order": self._prompts.order}

    def set_state(self, state: dict[str, Any]) -> None:
        accept = self._config.data.accept_changed
        refuse_other_order(self._prompts.order, {"prompts": state}, ["prompts"], accept_changed=accept)
        self._step = state["step"]
        self._prompts.drawn = dict(state["drawn"])

    def describe(self, directory: Path) -> None:
        """The tokenizer, and from now on `rollouts-STEP.jsonl` of each step."""
        describe_tokenizer(self._config.data, directory, has_chats=True, is_base=self._prompts.form.is_base)
        self._log = directory

    def _groups(self, params: Any) -> tuple[Groups, Groups]:
        """Answers to the prompts of a step, by prompt, and those that a refill has replaced."""
        wanted = self._config.data.batch_size // self._rollouts.samples
        pool = Pool(
            self._config.model,
            params,
            tokens=self._tokens,
            rows=self._rollouts.rows,
            max_new=self._rollouts.max_new_tokens,
            dtype=self._rollouts.dtype,
            # Always the same programs: those of a cache that follows its rows would depend on what came before.
            max_prompt=self._config.data.sequence_length - self._rollouts.max_new_tokens,
        )
        kept: Groups = []
        settled: Groups = []
        self.numbers = {"rollout/prompts": 0.0}
        refills = 0 if self._judges is None else self._rollouts.refills
        for _ in range(1 + refills):
            first = self._rollouts.samples * int(self.numbers["rollout/prompts"])
            groups = self._answered(pool, first, wanted - len(kept))
            self.numbers["rollout/prompts"] += len(groups)
            for group in groups:
                (settled if is_settled(group) and refills else kept).append(group)
            if len(kept) == wanted:
                break
        self.numbers |= {"rollout/utilisation": pool.load.utilisation, "rollout/tokens": pool.load.tokens}
        missing = wanted - len(kept)
        groups = [*kept, *settled[:missing]]
        if self._judges is not None:
            groups = with_advantages(groups, self._rollouts.advantage)
        return groups, settled[missing:]

    def _answered(self, pool: Pool, first: int, count: int) -> Groups:
        """`samples` answers to each of the next `count` prompts, numbered from `first` on."""
        requests: list[tuple[Asked, Request]] = []
        for _ in range(count):
            asked = self._prompts.draw()
            rng = random.Random(f"{self._config.seed} {self._step} {asked.key}")
            changes: dict[str, Any] = {"seed": rng.getrandbits(32)}
            if self._rollouts.budgets:
                changes["thinking_budget"] = rng.choice(self._rollouts.budgets)
            request = dataclasses.replace(asked.request, **changes)
            requests += [(asked, dataclasses.replace(request, sample=i)) for i in range(self._rollouts.samples)]
        for number, (_, request) in enumerate(requests):
            pool.submit(number, request)
        results: dict[int, Result] = {}
        while events := pool.step():
            for event in events:
                if event.result is None:
                    continue
                assert isinstance(event.key, int)
                results[event.key] = event.result
                if self._judges is not None:
                    asked, said = requests[event.key][0], self._reader.record(event.result)
                    records = records_of(self._rollouts, asked.record)
                    self._judges.submit(event.key, asked.document, records, said["thinking"], said["content"])
        rollouts = [
            Rollout(first + number, asked, request, results[number], {}, is_masked=self._is_masked(results[number]))
            for number, (asked, request) in enumerate(requests)
        ]
        if self._judges is not None:
            verdicts = self._judges.collect()
            rollouts = [with_reward(self._rollouts, rollout, verdicts[i]) for i, rollout in enumerate(rollouts)]
        size = self._rollouts.samples
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]

    def _is_masked(self, result: Result) -> bool:
        return self._rollouts.mask_truncated and result.finish_reason == "length"

    def _summary(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
        """Series of the step, each a mean over all its answers, also those that a refill has replaced."""
        rollouts = [rollout for group in groups for rollout in group]
        results = [rollout.result for rollout in rollouts]

        def mean(values: Any) -> float:
            return float(np.mean(list(values)))

        numbers = {
            "rollout/new_tokens": mean(len(result.token_ids) for result in results),
            "rollout/thinking_tokens": mean(result.thinking_tokens for result in results),
            "rollout/forced_tokens": mean(sum(result.forced) for result in results),
            "rollout/cut_thoughts": mean(result.thinking_end in ("budget", "room") for result in results),
            "rollout/out_of_room": mean(result.finish_reason == "length" for result in results),
        }
        if self._judges is None:
            return numbers
        numbers["reward"] = mean(rollout.reward for rollout in rollouts)
        parts = rollouts[0].verdicts
        for part in parts if len(parts) > 1 else ():
            numbers[f"reward/{part}"] = mean(rollout.verdicts[part].score for rollout in rollouts)
        for budget in sorted({*map(str, self._rollouts.budgets)}):
            if got := [r.reward for r in rollouts if str(r.request.thinking_budget) == budget]:
                numbers[f"reward/budget_{budget}"] = mean(got)
        reasons = [verdict.reason for rollout in rollouts for verdict in rollout.verdicts.values()]
        numbers["rollout/not_judged"] = float(sum(reason.startswith((NO_RESULT, DIED)) for reason in reasons))
        numbers["rollout/settled_groups"] = mean(map(is_settled, groups))
        return numbers

    def _write(self, groups: Groups, left_out: Groups) -> None:
        if self._log is None:
            return
        path = self._log / f"rollouts-{self._step:06d}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for part in (groups, left_out):
                for group in part[: round(self._rollouts.log * len(part))]:
                    for rollout in group:
                        line = self._line(rollout) | {"is_learnt": part is groups}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _line(self, rollout: Rollout) -> dict[str, Any]:
        asked = rollout.asked
        line: dict[str, Any] = {"source": asked.key[0], "document": asked.index, "id": asked.record.get("id")}
        line |= {"sample": rollout.request.sample, "settings": rollout.request.settings()}
        if rollout.verdicts:
            line |= {"reward": rollout.reward, "advantage": rollout.advantage}
            line["verdicts"] = {name: verdict._asdict() for name, verdict in rollout.verdicts.items()}
        line |= self._reader.record(rollout.result)
        return line | {"logprobs": rollout.result.logprobs, "forced": [int(x) for x in rollout.result.forced]}
