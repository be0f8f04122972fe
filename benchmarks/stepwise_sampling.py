"""Step-wise sampling against a plain pipeline call with as many network evaluations, on the testbed's model; CPU seconds of one thread.

    python benchmarks/stepwise_sampling.py

Both sample the same prompts under guidance. The plain call has as many steps as the step-wise source asks the network per prompt. The
source also decodes and judges every candidate, which the plain call does once per prompt; its time is given with and without that.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable

import torch

from diffpref.evaluation.generate import generate
from diffpref.locations import asset
from diffpref.models.backbone import load_backbone
from diffpref.scorers.step_aware import load_step_aware
from diffpref.sources.stepwise import Place, StepwiseSampling, new_asked, sample_pairs
from diffpref.testbed.prompts import draw_prompts
from diffpref.testbed.sampling import GUIDANCE

PROMPTS = 4


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the second call."""
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print a line of JSON."""
    torch.set_num_threads(1)
    backbone = load_backbone(str(asset("testbed", "pipeline")))
    prompts = draw_prompts("pairs", PROMPTS).texts
    own = StepwiseSampling(num_steps=10, first_branch=2, guidance_scale=GUIDANCE, rollout_batch_size=64, threshold=0.0)
    sizes = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(PROMPTS, 1, 6)
    cond = dataclasses.replace(backbone.encode_prompts(prompts), time_ids=sizes)
    places = [Place(0, i) for i in range(PROMPTS)]
    asked: list[int] = []
    inner = backbone.predictor(backbone.denoiser)

    def policy(x, t, c):  # type: ignore[no-untyped-def]
        asked.append(t.numel())
        return inner(x, t, c)

    def rollout(decode, scorer):  # type: ignore[no-untyped-def]
        ask = new_asked(own, backbone.process, policy, backbone.null_prompt(), decode, scorer, torch.device("cpu"))
        return lambda: sample_pairs(own, ask, places, prompts, cond, (8, 8, 8), seed=0)

    judge = load_step_aware(f"spm={asset('testbed', 'step_aware_scorer')}")
    whole = seconds(rollout(backbone.decode, judge))
    evaluations = sum(asked) / 2 / PROMPTS / 2  # two calls, each with guidance
    bare = seconds(rollout(lambda x: x, lambda x, _, t: x.mean((1, 2, 3))))
    steps = round(evaluations)
    plain = seconds(
        lambda: generate(backbone.pipeline, prompts, range(PROMPTS), num_inference_steps=steps, guidance_scale=GUIDANCE, batch_size=PROMPTS)
    )
    theory = own.first_branch + 1 + own.num_candidates * (own.num_steps - own.first_branch - 1)
    found = {
        "prompts": PROMPTS,
        "evaluations_per_prompt": evaluations,
        "evaluations_in_theory": theory,
        "plain_call_seconds_per_prompt": plain / PROMPTS,
        "stepwise_seconds_per_prompt": whole / PROMPTS,
        "stepwise_without_decoding_and_judging": bare / PROMPTS,
        "ratio": whole / plain,
        "ratio_without_decoding_and_judging": bare / plain,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
