"""Scores of other libraries on the examples of ``benchmarks/faithfulness.py``.

Runs in the environment of the other library, which needs neither Captum nor this
package: it reads examples and a model, and writes a score for each source::

    python benchmarks/faithfulness.py --export runs/examples.jsonl
    other/bin/python benchmarks/rivals.py flashtrace runs/examples.jsonl \
        --model captum_cage/demo --out runs/flashtrace.jsonl
    python benchmarks/faithfulness.py --rivals runs/flashtrace.jsonl --out runs/demo

Each library explains the same stretch of the same text, in the way that its own
documentation recommends. Scores of tokens are summed over each source; whatever a
library does to tokens on its own account, such as leaving some out, counts for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__: list[str] = []

Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """One example, in characters and tokens.

    Attributes:
        prompt (str): what the model gets.
        completion (str): what it wrote.
        sources (list): ranges of the prompt that are scored.
        prompt_offsets (list): range of each token of the prompt.
        explained (tuple): first explained token of the completion, and the one after
            the last.
        wanted (str): the explained stretch.
    """

    prompt: str
    completion: str
    sources: list[Span]
    prompt_offsets: list[Span]
    explained: tuple[int, int]
    wanted: str

    @classmethod
    def of(cls, record: dict[str, Any], tokenizer: Any) -> Text:
        """An example as it was exported."""
        prompt, completion = record["prompt"], record["completion"]
        start = completion.rindex(record["explain"])
        stop = start + len(record["explain"])

        def offsets(text: str) -> list[Span]:
            read = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            )
            return [(a, b) for a, b in read["offset_mapping"]]

        written = offsets(completion)
        inside = [i for i, (a, b) in enumerate(written) if a < stop and start < b]
        return cls(
            prompt,
            completion,
            [(a, b) for a, b in record["sources"]],
            offsets(prompt),
            (inside[0], inside[-1] + 1),
            record["explain"],
        )

    def summed(self, scores: Sequence[float]) -> list[float]:
        """Scores of the sources, from those of the prompt's tokens."""
        if len(scores) != len(self.prompt_offsets):
            raise SystemExit(
                f"{len(scores)} scores came for {len(self.prompt_offsets)} tokens of "
                "the prompt: the library reads the text otherwise."
            )
        found = []
        for start, stop in self.sources:
            inside = [
                score
                for score, (a, b) in zip(scores, self.prompt_offsets, strict=True)
                if a < stop and start < b
            ]
            found.append(float(sum(inside)))
        return found


def of_flashtrace(model: Any, tokenizer: Any) -> Callable[[Text], list[float]]:
    """FlashTrace's default: information flow, one hop."""
    tracer = import_module("flashtrace").FlashTrace(model, tokenizer)

    def explain(text: Text) -> list[float]:
        first, stop = text.explained
        found = tracer.trace(
            prompt=text.prompt,
            target=text.completion,
            output_span=(first, stop - 1),
            hops=1,
            method="flashtrace",
        )
        return text.summed([float(score) for score in found.scores])

    return explain


def of_inseq(model: Any, tokenizer: Any) -> Callable[[Text], list[float]]:
    """Input x gradient by inseq, summed over the explained tokens."""
    inseq = import_module("inseq")
    if tokenizer.bos_token is None:  # which it needs, though it does not read it
        tokenizer.bos_token = tokenizer.eos_token
        model.config.bos_token_id = tokenizer.eos_token_id
    wrapped = inseq.load_model(
        model, "input_x_gradient", tokenizer=tokenizer, device="cpu"
    )

    def explain(text: Text) -> list[float]:
        out = wrapped.attribute(
            text.prompt, text.prompt + text.completion, show_progress=False
        )
        found = out.sequence_attributions[0]
        scores = found.target_attributions
        while scores.dim() > 2:
            scores = scores.norm(dim=-1)
        count = len(text.prompt_offsets)
        first, stop = text.explained
        rows = scores[:count, first:stop].nan_to_num()
        return text.summed(rows.sum(dim=1).tolist())

    return explain


def of_interpreto(model: Any, tokenizer: Any) -> Callable[[Text], list[float]]:
    """Occlusion of tokens by interpreto, summed over the explained tokens."""
    interpreto = import_module("interpreto")
    modes = import_module("interpreto.attributions").InferenceModes
    explainer = interpreto.Occlusion(
        model,
        tokenizer,
        batch_size=32,
        granularity=interpreto.Granularity.TOKEN,
        inference_mode=modes.LOG_SOFTMAX,
    )

    def explain(text: Text) -> list[float]:
        found = explainer.explain(text.prompt, text.completion)[0].attributions
        first, stop = text.explained
        count = len(text.prompt_offsets)
        rows = found[first:stop, :count].nan_to_num()
        return text.summed(rows.sum(dim=0).tolist())

    return explain


def of_context_cite(model: Any, tokenizer: Any) -> Callable[[Text], list[float]]:
    """ContextCite's own package: 64 ablations of sentences, a sparse linear fit.

    It writes the response itself, through the model's chat template. It is told where
    the sources are, as its own splitting needs data that it would download.
    """
    package = import_module("context_cite")
    base: Any = import_module("context_cite.context_partitioner").BaseContextPartitioner

    class Partitioner(base):
        """The sources as they are, and the rest of the prompt always there."""

        def __init__(self, text: Text) -> None:
            super().__init__(text.prompt)
            self.text = text

        @property
        def num_sources(self) -> int:
            return len(self.text.sources)

        def split_context(self) -> None:
            return

        def get_source(self, index: int) -> str:
            start, stop = self.text.sources[index]
            return self.text.prompt[start:stop]

        def get_context(self, mask: Any = None) -> str:
            prompt = self.text.prompt
            pieces, done = [], 0
            for number, (start, stop) in enumerate(self.text.sources):
                pieces.append(prompt[done:start].strip())
                if mask is None or mask[number]:
                    pieces.append(prompt[start:stop])
                done = stop
            pieces.append(prompt[done:].strip())
            return " ".join(piece for piece in pieces if piece)

    def explain(text: Text) -> list[float]:
        found = package.ContextCiter(
            model,
            tokenizer,
            text.prompt,
            "",
            prompt_template="{context}{query}",
            partitioner=Partitioner(text),
            generate_kwargs={"max_new_tokens": 128, "do_sample": False},
        )
        place = found.response.rfind(text.wanted)
        if place < 0:  # it wrote something else, of which nothing is asked
            return [0.0] * len(text.sources)
        scores = found.get_attributions(
            start_idx=place, end_idx=place + len(text.wanted), verbose=False
        )
        return [float(score) for score in scores]

    return explain


RIVALS: dict[str, Callable[[Any, Any], Callable[[Text], list[float]]]] = {
    "flashtrace": of_flashtrace,
    "inseq": of_inseq,
    "interpreto": of_interpreto,
    "context_cite": of_context_cite,
}


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The examples that were exported."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def main() -> None:
    """Score all examples by one library."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rival", nargs="?", choices=sorted(RIVALS))
    parser.add_argument("examples", nargs="?", type=Path)
    parser.add_argument("--model", default="captum_cage/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/rival.jsonl"))
    parser.add_argument(
        "--smoke", action="store_true", help="say which libraries are here, for CI"
    )
    options = parser.parse_args()
    if options.smoke:
        for name in RIVALS:
            print(f"{name}: {'here' if find_spec(name) else 'not installed here'}")
        return
    if options.rival is None or options.examples is None:
        parser.error("name a library and the file of examples")
    transformers = import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation="eager"
    ).eval()
    explain = RIVALS[options.rival](model, tokenizer)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as file:
        for record in records(options.examples):
            scores = explain(Text.of(record, tokenizer))
            line = {
                "rival": options.rival,
                "dataset": record["dataset"],
                "number": record["number"],
                "scores": scores,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
