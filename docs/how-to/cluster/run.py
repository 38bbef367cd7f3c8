"""Explain the examples of a file on a Ray cluster; the same call goes on after a kill.

``python run.py examples.jsonl explained --model Qwen/Qwen3-8B --workers 8 --gpus 0.5``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from captum.attr import FeatureAblation, LLMAttribution
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_cage import GraphContextAttribution, batch
from captum_cage.demo import load_demo


def explainer(name: str) -> GraphContextAttribution:
    """What each worker makes for itself: a model on the GPUs that Ray gave it."""
    model: Any
    tokenizer: Any
    if name == "demo":
        model, tokenizer = load_demo()
    else:
        count = torch.cuda.device_count()
        place = "auto" if count > 1 else "cuda" if count == 1 else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", device_map=place
        )
    return GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain, and print what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", help="a file of JSON lines or Parquet")
    parser.add_argument("out", help="the folder of results, on this machine")
    parser.add_argument("--model", default="demo", help="name or folder of a model")
    parser.add_argument("--workers", type=int, default=2, help="models at once")
    parser.add_argument("--gpus", type=float, default=0.0, help="for each of them")
    parser.add_argument("--cpus", type=float, default=1.0, help="for each of them")
    parser.add_argument("--address", help="of the cluster; default: as Ray finds it")
    options = parser.parse_args(arguments)
    report = batch.run(
        partial(explainer, options.model),
        options.examples,
        options.out,
        backend=batch.RayCluster(
            address=options.address, num_cpus=options.cpus, num_gpus=options.gpus
        ),
        workers=options.workers,
        units="sentence",
        show_progress=True,
    )
    print(report)


if __name__ == "__main__":
    main()
