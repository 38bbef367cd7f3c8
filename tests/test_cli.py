import copy
import json
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValueSampling,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    set_seed,
)
from typer.testing import CliRunner

from captum_cage import cli, methods
from captum_cage._version import __version__
from captum_cage.attribution import GraphContextAttribution
from captum_cage.demo import sample_problems
from captum_cage.engines.registry import engine_names
from captum_cage.export import SUFFIXES, to_dot
from captum_cage.inputs import ChatTokenInput, TokenIdsInput
from captum_cage.methods import Capability, UnitMethod, catalogue
from captum_cage.methods.catalogue import capabilities
from captum_cage.result import GraphAttributionResult
from tiny import tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana."
TARGET = " Mia has 3 + 4 = 7 pens. The answer is 7."
PROGRAM = [sys.executable, "-c", "from captum_cage.cli import main; main()"]


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    """A small model on disk, as transformers saves it."""
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No network, a known width, no wish about colour; seeds do not leak."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def run(*arguments, **options):
    """What the program does when it is called with these arguments."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], **options)


def explain(folder, *arguments, prompt=PROMPT, target=TARGET, **options):
    """The same for ``captum-cage explain`` with the small model."""
    targets = [] if target is None else ["--target", target]
    texts = ["--prompt", prompt, *targets]
    return run("explain", "--model", folder, *texts, *arguments, **options)


def one_line(text):
    """Text with single spaces."""
    return " ".join(text.split())


@pytest.fixture(scope="session")
def saved(folder, tmp_path_factory):
    """A result that the program saved."""
    path = tmp_path_factory.mktemp("saved") / "result.npz"
    assert explain(folder, "--explain", "answer", "--save", path, "-q").exit_code == 0
    return path


class TestProgram:
    """What the program does before and around its commands."""

    def test_version_is_printed(self):
        """On stdout, alone."""
        done = run("--version")
        assert (done.exit_code, done.stdout) == (0, f"captum-cage {__version__}\n")
        assert done.stderr == ""

    @pytest.mark.parametrize(
        "command", ["", "batch", "demo", "explain", "methods", "show"]
    )
    def test_help_has_examples(self, command):
        """For the program and for every command."""
        done = run(*command.split(), "--help")
        assert done.exit_code == 0
        assert re.search(rf"Examples:\s+captum-cage {command}", done.stdout)

    def test_help_documents_the_exit_codes(self):
        """All five of them."""
        assert (
            "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or input, 3 done "
            "but for some examples of a batch, 130 interrupted."
        ) in one_line(run("--help").stdout)

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["explain", "--modle", "x"], "No such option: --modle"),
            (["explain", "--model", "x"], "--prompt: must be given, or --messages"),
            (["demo", "--kind", "three"], "Invalid value for '--kind'"),
            (["explode"], "No such command 'explode'"),
            (["show", "x", "--top", "-1"], "Invalid value for '--top'"),
            (
                ["show", "x", "--export", "x.svg"],
                "--export: must end in one of .csv, .dot, .graphml, .json, .npz, "
                ".safetensors, but 'x.svg' came. The end of its name says",
            ),
            (["demo", "--export", "none/x.csv"], "--export: must name a file that can"),
        ],
    )
    def test_wrong_usage_is_exit_code_2(self, arguments, complaint):
        """Told on stderr."""
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert complaint in one_line(done.stderr)

    def test_an_interrupt_is_exit_code_130(self, folder, monkeypatch):
        """One line, no traceback."""

        def interrupted(*_args, **_kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(GraphContextAttribution, "attribute", interrupted)
        done = explain(folder)
        assert (done.exit_code, done.stdout) == (130, "")
        assert done.stderr.endswith("captum-cage: interrupted\n")

    @pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError])
    def test_an_unexpected_failure_is_exit_code_1(self, kind, folder, monkeypatch):
        """With its traceback, also where a library raises what our checks raise."""

        def broken(*_args, **_kwargs):
            raise kind("out of order")

        monkeypatch.setattr(GraphContextAttribution, "attribute", broken)
        done = explain(folder)
        assert (done.exit_code, type(done.exception)) == (1, kind)

    def test_a_traceback_can_be_asked_for(self, folder):
        """Of an error that is otherwise one line."""
        arguments = ["explain", "--model", folder, "--prompt", "x", "--method", "guess"]
        assert isinstance(run(*arguments).exception, SystemExit)
        assert isinstance(run("--traceback", *arguments).exception, ValueError)

    def test_warnings_are_one_line(self, folder, monkeypatch):
        """On stderr, without the place in our source."""
        known = GraphContextAttribution.attribute

        def attribute(*args, **kwargs):
            warnings.warn("so so", stacklevel=1)
            return known(*args, **kwargs)

        monkeypatch.setattr(GraphContextAttribution, "attribute", attribute)
        done = explain(folder)
        assert done.exit_code == 0
        assert "\ncaptum-cage: warning: so so\n" in done.stderr


class TestDryRun:
    """``captum-cage explain --dry-run``: the cost, and nothing else."""

    def test_the_cost_is_printed(self, folder, monkeypatch):
        """As a table."""
        monkeypatch.delattr(GraphContextAttribution, "answer")
        done = explain(folder, "--dry-run", "--units", "word")
        assert done.exit_code == 0
        assert "model passes (sequences)" in done.stdout
        assert "FeatureAblation, fused" in done.stdout

    def test_numbers_are_written(self, folder, tmp_path, monkeypatch):
        """To stdout, alone, or to a file."""
        monkeypatch.delattr(GraphContextAttribution, "answer")
        done = explain(folder, "--dry-run", "--json", "-")
        assert json.loads(done.stdout)["sources"] == 2
        file = tmp_path / "cost.json"
        done = explain(folder, "--dry-run", "--json", file, "-q", target=None)
        assert (done.exit_code, done.stdout) == (0, "")
        assert json.loads(file.read_text())["generated_tokens"] == 100

    def test_what_comes_besides_is_named(self, folder):
        """Its cost is not in the numbers."""
        done = explain(folder, "--dry-run", "--evaluate")
        assert "--verify, --evaluate and --alternatives come besides" in done.stderr
        assert "come besides" not in explain(folder, "--dry-run").stderr

    def test_the_seed_is_set(self, folder, monkeypatch):
        """The samples that are counted are those that would be drawn."""
        seeds = []
        monkeypatch.setattr(cli.transformers, "set_seed", seeds.append)
        explain(folder, "--dry-run", "--seed", "7")
        assert seeds == [7]

    def test_what_would_be_refused_is_refused(self, folder):
        """Before the work."""
        done = explain(folder, "--dry-run", "--explain", "nowhere")
        assert done.exit_code == 2
        assert "does not occur in the generated text" in done.stderr


class TestProcess:
    """The program as a process, with streams of its own."""

    def test_results_and_notes_go_to_their_streams(self, folder):
        """Piped, stdout is JSON and nothing else, and stderr is plain lines."""
        arguments = ["explain", "--model", folder, "--prompt", "-", "--target", TARGET]
        done = subprocess.run(
            [*PROGRAM, *arguments, "--json", "-"],
            input=PROMPT + "\n",
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["source_text"] == PROMPT
        assert found["generated_text"] == TARGET
        lines = done.stderr.splitlines()
        assert lines[0] == f"captum-cage: loading {folder}"
        assert all(line.startswith("captum-cage: ") for line in lines)

    def test_ctrl_c_ends_it(self, folder):
        """Exit code 130 and no traceback."""
        arguments = ["explain", "--model", folder, "--prompt", PROMPT * 4]
        arguments += ["--target", TARGET, "--units", "token"]
        arguments += ["--method", "shapley-sampling", "--samples", "1000"]
        process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            # A shell that starts a job in the background has it ignore interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "explaining" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert lines[-1] == "captum-cage: interrupted\n"
        assert not any("Traceback" in line for line in lines)

    def test_a_reader_that_stops_early_is_no_error(self, saved):
        """As in ``captum-cage show result.npz | head -1``."""
        process = subprocess.Popen(
            [*PROGRAM, "show", str(saved)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(timeout=60)


def in_python(folder, inp=None, make=None, target=TARGET, **options):
    """The same explanation by the library."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    if inp is None:
        end = tokenizer.unk_token_id
        inp = TokenIdsInput(tokenizer(PROMPT).input_ids, tokenizer, baselines=end)
    make = make or (lambda model: LLMAttribution(FeatureAblation(model), tokenizer))
    cage = GraphContextAttribution(make(model))
    return cage.attribute(inp, target=target, **options)


def offer_refilled(monkeypatch, *, needs_masked_lm=True):
    """Offer one more method; the arguments that its objects are made with."""
    made = []

    class Refilled(UnitMethod):
        capability = Capability(
            name="refilled",
            summary="nothing",
            source="nobody",
            wrapper="perturbation",
            cost="none",
            needs=("a masked language model",),
            counted="tries",
        )

        def effects(self, ids, feature_of_token, targets, **options):
            del ids, options
            return torch.ones((len(targets), int(feature_of_token.max()) + 1))

    def needing(self, model, masked_lm, masked_tokenizer, tries=1):
        UnitMethod.__init__(self, model)
        made.append(
            {
                "masked_lm": masked_lm,
                "masked_tokenizer": masked_tokenizer,
                "tries": tries,
            }
        )

    def plain(self, model, tries=1):
        needing(self, model, None, None, tries)

    Refilled.__init__ = needing if needs_masked_lm else plain
    monkeypatch.setattr(methods, "Refilled", Refilled, raising=False)
    monkeypatch.setattr(methods, "__all__", [*methods.__all__, "Refilled"])
    return made


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """A small masked language model on disk."""
    path = tmp_path_factory.mktemp("masked")
    tokenizer = copy.deepcopy(tiny_tokenizer("wordpiece"))
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


class TestExplain:
    """captum-cage explain."""

    def test_the_numbers_are_those_of_the_library(self, folder, tmp_path):
        """The file of --json holds what ``to_dict`` gives, and the view is printed."""
        file = tmp_path / "result.json"
        done = explain(folder, "--explain", "The answer is", "--json", file)
        expected = in_python(folder, units="sentence", explain="The answer is")
        assert done.exit_code == 0
        assert json.loads(file.read_text()) == expected.to_dict()
        assert 'Explained: "The answer is 7."' in done.stdout

    def test_a_graph_is_written_beside_it(self, folder, tmp_path):
        """Before it is printed; wrong names are refused before the model is loaded."""
        path = tmp_path / "graph.dot"
        done = explain(folder, "--export", path)
        assert done.exit_code == 0
        assert path.read_text(encoding="utf-8") == to_dot(
            in_python(folder, units="sentence")
        )
        done = run("explain", "--model", "none", "--prompt", "a", "--export", "graph")
        assert done.exit_code == 2
        assert "error: --export: must end in one of" in done.stderr

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            (
                "shapley-sampling --samples 3",
                lambda model, tok: LLMAttribution(ShapleyValueSampling(model), tok),
            ),
            (
                "LayerIntegratedGradients --steps 3",
                lambda model, tok: LLMGradientAttribution(
                    LayerIntegratedGradients(model, model.model.embed_tokens), tok
                ),
            ),
            (
                "gradient-x-activation",
                lambda model, tok: LLMGradientAttribution(
                    LayerGradientXActivation(model, model.model.embed_tokens), tok
                ),
            ),
        ],
    )
    def test_methods_have_two_names(self, name, make, folder, tokenizer):
        """One of our own and Captum's; counts and seeds reach them."""
        method, *count = name.split()
        done = explain(folder, "--method", method, *count, "--json", "-")
        kwargs = {count[0].replace("--", "n_"): int(count[1])} if count else {}
        expected = in_python(
            folder, make=lambda m: make(m, tokenizer), units="sentence", **kwargs
        )
        found = json.loads(done.stdout)
        assert found["meta"] == expected.to_dict()["meta"]
        assert found["seq_attr"] == pytest.approx(expected.seq_attr.tolist(), abs=1e-5)

    @pytest.mark.parametrize("name", [known.name for _, known in capabilities()])
    def test_every_method_has_a_name(self, name, folder, masked):
        """And explains, with what it needs."""
        method, declared = catalogue.method_named(name)
        arguments = ["--method", name, "--json", "-"]
        if declared.counted is not None:
            count = "--steps" if declared.counted == "n_steps" else "--samples"
            arguments += [count, "6"]
        if catalogue.needs_argument(method, "masked_lm") is not None:
            arguments += ["--masked-lm", masked]
        done = explain(folder, *arguments, target=" Mia. The answer")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["meta"]["method"] == method.__name__

    def test_every_method_is_listed_in_the_error(self, folder):
        """An unknown name is refused before the model is loaded."""
        done = explain(folder, "--method", "guess")
        assert done.exit_code == 2
        names = ", ".join(declared.name for _, declared in capabilities())
        assert done.stderr == (
            f"captum-cage: error: --method: must be one of {names}, or the name of its "
            "class, but 'guess' came. Pass one of these.\n"
        )

    def test_counts_may_go_to_the_constructor(self, folder, monkeypatch):
        """Where ``attribute`` does not take them."""
        seen = offer_refilled(monkeypatch, needs_masked_lm=False)
        done = explain(folder, "--method", "refilled", "--samples", "7")
        assert done.exit_code == 0
        assert [made["tries"] for made in seen] == [7]

    def test_a_masked_language_model_is_passed_on(self, folder, masked, monkeypatch):
        """With its tokenizer, ready to use, of the type that was asked for."""
        seen = offer_refilled(monkeypatch)
        arguments = ["--method", "refilled", "--masked-lm", masked]
        done = explain(folder, *arguments, "--dtype", "bfloat16")
        assert done.exit_code == 0
        assert f"captum-cage: loading {masked}" in done.stderr
        (made,) = seen
        assert type(made["masked_lm"]) is BertForMaskedLM
        assert made["masked_lm"].dtype is torch.bfloat16
        assert not made["masked_lm"].training
        assert made["masked_tokenizer"].mask_token == "[MASK]"

    def test_a_masked_language_model_that_is_missing(self, folder, monkeypatch):
        """It is asked for before the model is loaded."""
        offer_refilled(monkeypatch)
        done = explain(folder, "--method", "refilled")
        assert done.exit_code == 2
        assert done.stderr.startswith("captum-cage: error: --masked-lm: Refilled repl")

    def test_a_masked_language_model_that_nobody_needs(self, folder, monkeypatch):
        """The methods that take one are named."""
        offer_refilled(monkeypatch)
        done = explain(folder, "--masked-lm", "bert")
        assert done.exit_code == 2
        assert done.stderr.startswith(
            "captum-cage: error: --masked-lm: FeatureAblation does not take it. It is "
            "for "
        )
        assert "refilled" in done.stderr

    def test_a_masked_language_model_that_cannot_be_loaded(self, folder, monkeypatch):
        """The option is named."""
        offer_refilled(monkeypatch)
        done = explain(folder, "--method", "refilled", "--masked-lm", "/nowhere")
        assert done.exit_code == 2
        assert "error: --masked-lm: there is no folder '/nowhere'." in done.stderr

    def test_a_package_that_is_missing(self, folder, monkeypatch):
        """The extra that brings it is named before the model is loaded."""
        monkeypatch.setattr(catalogue, "find_spec", lambda _: None)
        done = explain(folder, "--method", "lime")
        assert done.exit_code == 2
        assert done.stderr == (
            "captum-cage: error: --method: lime needs scikit-learn, which is not "
            "installed. Run: pip install captum-cage[sklearn]\n"
        )

    def test_a_chat_goes_through_the_template(self, folder, tokenizer):
        """Only the user's message is attributed."""
        done = explain(folder, "--chat", "--system", "Be brief.", "--json", "-")
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": PROMPT},
        ]
        inp = ChatTokenInput(messages, tokenizer, baselines=tokenizer.unk_token_id)
        found = json.loads(done.stdout)
        assert found == in_python(folder, inp, units="sentence").to_dict()
        assert [u["text"] for u in found["units"] if not u["generated"]] == [
            "Ana has 3 pens.",
            "Mia has 4 more pens than Ana.",
        ]

    def test_the_model_generates_where_no_target_is_given(self, folder):
        """At most as many tokens as allowed."""
        arguments = ["--max-new-tokens", "3", "--units", "token", "--json", "-"]
        found = json.loads(explain(folder, *arguments, target=None).stdout)
        assert sum(unit["generated"] for unit in found["units"]) == 3

    def test_special_tokens_of_the_prompt_are_not_attributed(self, folder):
        """They are read, and no sources."""
        prompt = "<|user|>Ana has 3 pens. Leo has 5 cups.<|end|>"
        found = json.loads(explain(folder, "--json", "-", prompt=prompt).stdout)
        sources = [u["text"] for u in found["units"] if not u["generated"]]
        assert sources == ["Ana has 3 pens.", "Leo has 5 cups."]
        assert found["source_text"] == prompt

    def test_special_tokens_at_the_end_are_not_explained(self, folder):
        """Unless --explain says so."""
        target = "The answer is 7.<eos>"
        found = json.loads(explain(folder, "--json", "-", target=target).stdout)
        assert [unit["text"] for unit in found["units"]][-1] == "<eos>"
        assert found["explained"] == [0]
        arguments = ["--explain", "-1", "--json", "-"]
        assert json.loads(explain(folder, *arguments, target=target).stdout)[
            "explained"
        ] == [1]

    @pytest.mark.parametrize(
        ("span", "explained"),
        [
            ("answer", [1]),
            ("0", [0]),
            ("-1", [1]),
            (":", [0, 1]),
            ("1:", [1]),
            ("/M.*7/", [0, 1]),
            ("/", None),
            ("zzz", None),
            ("/(/", None),
            ("5", None),
        ],
    )
    def test_forms_of_what_to_explain(self, span, explained, saved):
        """Text, number, range, pattern; what is not there is an error."""
        done = run("show", saved, "--explain", span, "--json", "-")
        if explained is None:
            assert (done.exit_code, done.stdout) == (2, "")
            assert re.match(r"captum-cage: error: (--)?explain: .*\n$", done.stderr)
        else:
            assert json.loads(done.stdout)["explained"] == explained

    def test_texts_come_from_files_and_stdin(self, folder, tmp_path):
        """A file by @, stdin by a dash; one newline at the end is dropped."""
        (tmp_path / "target").write_bytes(b"The answer\r\nis 7.\r\n\n")
        arguments = ["--json", "-"]
        target = f"@{tmp_path / 'target'}"
        done = explain(
            folder, *arguments, prompt="-", target=target, input="Ana – 3.\n"
        )
        found = json.loads(done.stdout)
        assert found["source_text"] == "Ana – 3."
        assert found["generated_text"] == "The answer\nis 7.\n"

    def test_a_doubled_at_is_a_plain_one(self, folder):
        """For texts that begin with it."""
        found = json.loads(explain(folder, "--json", "-", prompt="@@Ana ok").stdout)
        assert found["source_text"] == "@Ana ok"

    def test_a_prompt_of_one_unit_is_pointed_out(self, folder):
        """It gets everything, whatever the model does."""
        done = explain(folder, prompt="Ana has 3 pens.")
        assert "note: the prompt is one unit" in done.stderr
        assert "one unit" not in explain(folder).stderr

    def test_quiet_says_nothing(self, folder, tmp_path):
        """But it writes the files."""
        file = tmp_path / "result.json"
        done = explain(folder, "--quiet", "--json", file)
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
        assert json.loads(file.read_text())["generated_text"] == TARGET

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_the_type_of_numbers_can_be_chosen(self, dtype, folder, monkeypatch):
        """It is the type of the model's parameters."""
        seen = []
        known = cli.llm_attribution
        monkeypatch.setattr(
            cli,
            "llm_attribution",
            lambda method, model, tokenizer: (
                seen.append(model.dtype),
                known(method, model, tokenizer),
            )[1],
        )
        assert explain(folder, "--dtype", dtype).exit_code == 0
        assert seen == [getattr(torch, dtype)]


def sampling():
    """Names of the methods that count samples."""
    return ", ".join(
        declared.name
        for _, declared in capabilities()
        if declared.counted not in (None, "n_steps")
    )


def errors(name):
    """Cases: arguments that replace or extend sound ones, and what is told."""
    cases = {
        "no such file": (
            {"prompt": "@nowhere"},
            "--prompt: must name a file that can be read, but '@nowhere' came (No such "
            "file or directory). For a text that begins with @, write @@.",
        ),
        "empty prompt": ({"prompt": ""}, "--prompt: must have some text"),
        "empty target": ({"target": ""}, "target: must have a token"),
        "not utf-8": (
            {"prompt": "-", "input": b"a\xff"},
            "--prompt: must be a text in UTF-8, but '-' is not (invalid start byte at "
            "byte 1). Convert it first.",
        ),
        "stdin twice": (
            {"prompt": "-", "target": "-"},
            "--prompt: stdin can be read once. Put the other text in a file.",
        ),
        "span not found": ({"more": ["--explain", "zzz"]}, "explain: the text 'zzz'"),
        "no chat": ({"more": ["--system", "x"]}, "--system: is a message of a chat"),
        "samples": (
            {"more": ["--samples", "3"]},
            f"--samples: FeatureAblation does not take it. It is for {sampling()}. "
            "Leave it out, or choose another --method.",
        ),
        "steps": (
            {"more": ["--steps", "3", "--method", "lime"]},
            "--steps: Lime does not take it. It is for integrated-gradients",
        ),
        "too many units": (
            {"more": ["--method", "shapley", "--units", "token"]},
            "ShapleyValues: takes at most 7 units",
        ),
        "no folder": (
            {"more": ["--json", "nowhere/result.json"]},
            "--json: must name a file that can be written, but 'nowhere/result.json' "
            "came and its folder does not exist. Name another file.",
        ),
        "no folder for a page": (
            {"more": ["--html", "nowhere/page.html"]},
            "--html: must name a file that can be written, but 'nowhere/page.html' "
            "came and its folder does not exist. Name another file.",
        ),
        "a folder": (
            {"more": ["--save", "."]},
            "--save: must name a file that can be written, but '.' came and it is a "
            "folder. Name another file.",
        ),
    }
    return cases if name is None else cases[name]


class TestErrors:
    """What the user got wrong is one line on stderr and exit code 2."""

    @pytest.mark.parametrize("name", errors(None))
    def test_one_line_says_what_is_wrong(self, name, folder):
        """Nothing on stdout, the error last."""
        options, told = errors(name)
        more = options.pop("more", [])
        done = explain(folder, *more, **options)
        assert (done.exit_code, done.stdout) == (2, "")
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"captum-cage: error: {told}")

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("nobody/nothing", "couldn't connect to|offline mode"),
            ("/nowhere", "there is no folder '/nowhere'. Check the path."),
        ],
    )
    def test_a_model_that_cannot_be_loaded(self, name, told):
        """The name and the cause."""
        done = explain(name)
        assert (done.exit_code, done.stdout) == (2, "")
        line = done.stderr.splitlines()[-1]
        assert line.startswith("captum-cage: error: --model: ")
        assert name in line
        assert re.search(told, line)

    def test_a_folder_without_a_model(self, tmp_path):
        """The cause, as transformers tells it."""
        done = explain(tmp_path)
        assert done.exit_code == 2
        assert re.search(r"error: --model: '.*' could not be loaded\. .+", done.stderr)

    def test_code_of_a_model_runs_only_when_allowed(self, folder, tmp_path):
        """A model that brings code is refused, and the flag is named."""
        for path in Path(folder).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        settings = json.loads((tmp_path / "config.json").read_text())
        settings["model_type"] = "odd"
        settings["auto_map"] = {
            "AutoConfig": "odd.OddConfig",
            "AutoModelForCausalLM": "odd.OddModel",
        }
        (tmp_path / "config.json").write_text(json.dumps(settings))
        (tmp_path / "odd.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
            "class OddModel(LlamaForCausalLM):\n    config_class = OddConfig\n"
        )
        done = explain(tmp_path)
        assert done.exit_code == 2
        assert "If you trust it, pass --trust-remote-code." in done.stderr
        assert not (tmp_path / "ran").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_device_that_is_not_there(self, folder):
        """The remedy is named."""
        done = explain(folder, "--device", "cuda")
        assert "--device: must be there, but torch finds no CUDA device" in done.stderr
        assert done.exit_code == 2

    def test_errors_cannot_steer_the_terminal(self, folder):
        """What came is quoted without control characters, on one line."""
        done = explain(folder, "--explain", "\x1b[2J\nx")
        assert "\x1b" not in done.stderr
        assert done.stderr.count("captum-cage: error") == 1
        assert done.stderr.splitlines()[-1].startswith("captum-cage: error")


class TestQuestions:
    """Foils, parts, conversations, intervals, paths that are tested."""

    def test_a_foil_is_told_and_explained(self, folder):
        """By a text, or by the number of a unit."""
        done = explain(folder, "--foil", "7=9")
        assert 'Why: "7" rather than "9"' in one_line(done.stdout)
        found = json.loads(explain(folder, "--foil", "#-1=Leo", "--json", "-").stdout)
        assert found["explained"] == [1]
        assert found["foils"][0][0] == 1
        assert found["foils"][0][2].strip() == "Leo"

    @pytest.mark.parametrize("foil", ["7", "=9", "7="])
    def test_a_foil_needs_a_place_and_a_text(self, folder, foil):
        """With a sign between the two."""
        done = explain(folder, "--foil", foil)
        assert done.exit_code == 2
        assert "error: --foil: must be a place and what might stand" in done.stderr

    def test_alternatives_are_listed(self, folder):
        """Those of the model, and not where stdout is for JSON."""
        done = explain(folder, "--alternatives", "7")
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["The", "model's", "candidates", "probability"]
        assert len([line for line in lines[1:9] if line.endswith("%")]) == 8
        json.loads(explain(folder, "--alternatives", "7", "--json", "-").stdout)

    def test_paths_are_tested(self, folder):
        """Below the paths, and in the file."""
        done = explain(folder, "--verify", "1")
        assert re.search(r"The path (holds|does not hold): '", done.stdout)
        found = json.loads(explain(folder, "--verify", "2", "--json", "-").stdout)
        assert [set(check) >= {"holds", "predicted"} for check in found["checks"]] == [
            True,
            True,
        ]

    def test_intervals_are_shown_for_several_draws(self, folder):
        """In a column of their own."""
        arguments = ["--method", "shapley-sampling", "--samples", "2", "--draws", "3"]
        done = explain(folder, *arguments, "--explain", "answer")
        assert "95% interval" in done.stdout
        assert re.search(r"\d% to +\d+\.\d%", done.stdout)

    def test_a_part_is_explained(self, folder, tmp_path):
        """That of a text whose thoughts are marked; another has none."""
        target = "<think>Mia has 7.</think> The answer is 7."
        done = explain(folder, "--part", "answer", target=target)
        assert done.exit_code == 2
        assert "no answer was found" in done.stderr  # the tokenizer has no markers
        saved = tmp_path / "r.npz"
        explain(folder, "--save", saved)
        assert "no think was found" in run("show", saved, "--part", "think").stderr
        both = explain(folder, "--part", "think", "--explain", "7")
        assert "--part: names what to explain, as --explain does" in both.stderr

    def test_a_conversation_comes_from_a_file(self, folder, tmp_path):
        """Turns of the assistant are explained, the others are sources."""
        file = tmp_path / "messages.json"
        file.write_text(
            json.dumps(
                [
                    {"role": "user", "content": "Ana has 3 pens."},
                    {"role": "assistant", "content": "Mia has 4."},
                    {"role": "tool", "content": "Leo has 5."},
                    {"role": "assistant", "content": "So Ana has 7."},
                ]
            )
        )
        arguments = ["--model", folder, "--messages", file, "--json", "-"]
        found = json.loads(run("explain", *arguments, "--units", "message").stdout)
        assert [unit["generated"] for unit in found["units"]] == [
            *(False, True),
            *(False, True),
        ]
        assert found["explained"] == [0, 1]

    @pytest.mark.parametrize(
        ("content", "more", "told"),
        [
            ("[", [], "--messages: must be JSON"),
            ("[" * 100_000, [], "--messages: must be JSON"),
            ("3", [], "--messages: must be a JSON list of messages, but int came"),
            ("[]", ["--chat"], "--messages: is a conversation already"),
            ("[]", ["--prompt", "x"], "--prompt: must be given, or --messages"),
            ("[]", [], "messages: must have a message"),
        ],
    )
    def test_a_conversation_that_is_none(self, folder, tmp_path, content, more, told):
        """Named with what is wrong."""
        file = tmp_path / "messages.json"
        file.write_text(content)
        done = run("explain", "--model", folder, "--messages", file, *more)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"captum-cage: error: {told}" in done.stderr

    def test_a_prompt_or_messages_must_be_given(self, folder):
        """One of the two."""
        done = run("explain", "--model", folder)
        assert "error: --prompt: must be given, or --messages in" in done.stderr


class TestMethods:
    """captum-cage methods."""

    def test_every_method_is_listed(self):
        """By its name, with what it measures and costs; what it needs, if anything."""
        done = run("methods")
        assert (done.exit_code, done.stderr) == (0, "")
        told = one_line(done.stdout)
        for method, declared in capabilities():
            assert declared.name in told
            about = told.split(f" {declared.name} ", 1)[1]
            assert about.startswith(declared.summary)
            cost = about.removeprefix(declared.summary).lstrip()
            assert cost.startswith(declared.cost)
            slow = cost.removeprefix(declared.cost).startswith(", row by row")
            assert slow is (method.__name__ not in engine_names())
        assert "lime" in told
        assert told.count("needs scikit-learn") >= 2

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_it_fits_the_width(self, width):
        """No name of a method is broken; no line is longer."""
        lines = run("methods", "--width", width).stdout.splitlines()
        assert max(map(len, lines)) <= width
        names = {declared.name for _, declared in capabilities()}
        assert names <= {line.split()[0] for line in lines if line.strip()}

    def test_as_json(self, tmp_path):
        """All that is declared, and whether there is an engine."""
        done = run("methods", "--json", "-")
        found = json.loads(done.stdout)
        assert [entry["name"] for entry in found] == [d.name for _, d in capabilities()]
        for entry, (method, declared) in zip(found, capabilities(), strict=True):
            assert entry["class"] == method.__name__
            assert entry["engine"] is (method.__name__ in engine_names())
            assert entry["inputs"] == list(catalogue.accepted_inputs(declared))
            assert entry["needs"] == list(declared.needs)
        file = tmp_path / "methods.json"
        done = run("methods", "--json", file)
        assert json.loads(file.read_text()) == found
        assert "what it measures" in done.stdout

    def test_a_file_that_cannot_be_written(self, tmp_path):
        """As with the other commands."""
        done = run("methods", "--json", tmp_path / "none" / "x.json")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "error: --json: must name a file that can be written" in done.stderr


class TestShow:
    """captum-cage show."""

    def test_a_saved_result_is_shown_without_the_model(self, saved):
        """The same numbers as were saved, on stdout alone."""
        done = run("show", saved)
        expected = GraphAttributionResult.load(saved)
        assert (done.exit_code, done.stderr) == (0, "")
        assert 'Explained: "The answer is 7."' in done.stdout
        for share in expected.seq_attr.tolist():
            assert f" {share:.1%}" in done.stdout

    def test_another_span_is_explained(self, saved, tmp_path):
        """And can be saved in turn."""
        again = tmp_path / "again.npz"
        done = run("show", saved, "--explain", "3 + 4", "--save", again)
        assert 'Explained: "Mia has 3 + 4 = 7 pens."' in done.stdout
        assert GraphAttributionResult.load(again).explained == (0,)

    def test_it_is_written_for_other_programs(self, saved, tmp_path):
        """As the ends of the names say; what holds all of it can be shown again."""
        paths = [tmp_path / f"out{suffix}" for suffix in SUFFIXES]
        options = [word for path in paths for word in ("--export", path)]
        done = run("show", saved, "--explain", 0, "-q", *options)
        assert (done.exit_code, done.output) == (0, "")
        expected = GraphAttributionResult.load(saved).explaining(0)
        for path in paths:
            expected.export(tmp_path / f"expected{path.suffix}")
            assert (
                path.read_bytes() == (tmp_path / f"expected{path.suffix}").read_bytes()
            )
        for suffix in (".json", ".npz", ".safetensors"):
            again = run("show", tmp_path / f"out{suffix}", "--json", "-")
            assert json.loads(again.stdout) == expected.to_dict()

    def test_a_page_is_written(self, saved, folder, tmp_path):
        """Of a saved result and of a new one: the page of the very result."""
        page = tmp_path / "page.html"
        done = run("show", saved, "--html", page)
        told = (0, f"captum-cage: wrote {page}\n")
        assert (done.exit_code, done.stderr) == told
        assert 'Explained: "The answer is 7."' in done.stdout
        result = GraphAttributionResult.load(saved)
        assert page.read_text(encoding="utf-8") == result.to_html()
        run("show", saved, "--explain", "3 + 4", "--html", page)
        other = result.explaining("3 + 4").to_html()
        assert page.read_text(encoding="utf-8") == other
        done = explain(folder, "--explain", "answer", "--html", page, "-q")
        assert (done.exit_code, done.stdout) == (0, "")
        assert page.read_text(encoding="utf-8") == result.to_html()

    def test_what_is_no_result_is_refused(self, tmp_path):
        """A file of another kind, and no file."""
        (tmp_path / "text").write_text("no result")
        wrong, missing = (run("show", tmp_path / name) for name in ("text", "none"))
        assert (wrong.exit_code, missing.exit_code) == (2, 2)
        assert "must be a result saved by GraphAttributionResult.save" in wrong.stderr
        assert missing.stderr.endswith("none': No such file or directory\n")

    def test_its_size_can_be_chosen(self, saved):
        """Width, sources and paths."""
        done = run("show", saved, "--width", 50, "--top", 1, "--paths", 1)
        assert max(map(len, done.stdout.splitlines())) <= 50
        assert "1 more" in done.stdout
        assert done.stdout.count('%  "') == 1


class TestColour:
    """Escape codes go to terminals only."""

    @pytest.mark.parametrize(
        ("settings", "coloured"),
        [
            ({}, False),
            ({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, True),
            ({"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ],
    )
    def test_they_can_be_forced_and_forbidden(self, settings, coloured, saved):
        """Piped and with NO_COLOR there are none; the text is the same."""
        plain = run("show", saved).stdout
        done = run("show", saved, env=settings)
        assert ("\x1b[" in done.stdout) == coloured
        assert re.sub(r"\x1b\[[0-9;]*m", "", done.stdout) == plain

    def test_a_stream_of_another_encoding_gets_escapes(self, folder):
        """What it cannot write is no reason to fail."""
        arguments = ["explain", "--model", folder, "--target", TARGET, "--prompt"]
        done = CliRunner(charset="ascii").invoke(cli.app, [*arguments, "Zoë. Ana."])
        assert done.exit_code == 0
        assert "| direct: one step back" in done.stdout
        assert "Zo\\xeb." in done.stdout


@pytest.mark.filterwarnings("ignore:With all sources the model comes to")
class TestEvaluate:
    """captum-cage explain --evaluate."""

    def test_the_result_is_tested_and_printed(self, folder):
        """As the library does it, with what is known of the metrics."""
        done = explain(folder, "--evaluate", "--units", "sentence", "--width", "200")
        assert done.exit_code == 0, done.stderr
        table = done.stdout.split("Heaviest paths")[1]
        assert "regenerated: deletion" in table
        for order in ("result", "direct", "sequence", "one hop", "nearest", "random"):
            assert order in table
        done = explain(folder, "--evaluate", "--units", "sentence", "--json", "-")
        found = json.loads(done.stdout)["evaluation"]
        result = in_python(folder, units="sentence")
        expected = result.evaluate(gen_args=None).to_dict()
        assert found["scores"].keys() == expected["scores"].keys()
        assert found["removal"] == expected["removal"] == "delete"
        own = found["scores"]["result"]["span: rise"]
        assert own == pytest.approx(
            expected["scores"]["result"]["span: rise"], nan_ok=True
        )

    @pytest.mark.parametrize("removal", ["baseline", "suppress", "masked_lm"])
    def test_sources_go_as_they_are_told(self, folder, masked, removal):
        """In each way."""
        arguments = ["--evaluate", "--removal", removal, "--units", "sentence"]
        if removal == "masked_lm":
            arguments += ["--masked-lm", masked]
        done = explain(folder, *arguments, "--json", "-")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["evaluation"]["removal"].startswith(removal)

    def test_a_masked_language_model_is_asked_for(self, folder):
        """Before the model is loaded."""
        done = explain(folder, "--evaluate", "--removal", "masked_lm")
        assert done.exit_code == 2
        assert "--removal: masked_lm writes other words" in done.stderr
        assert "loading" not in done.stderr

    def test_a_statement_that_does_not_hold_loses_nothing(self, folder, tmp_path):
        """The result is saved before it is tested."""
        path = tmp_path / "kept.npz"
        arguments = ["--evaluate", "--statement", "eleven", "--save", path]
        done = explain(folder, *arguments)
        assert done.exit_code == 2
        assert "statement: must hold of the text that is explained" in done.stderr
        assert run("show", path).exit_code == 0

    def test_how_to_test_needs_a_test(self, folder):
        """It would be without effect."""
        done = explain(folder, "--statement", "7")
        assert done.exit_code == 2
        assert "--statement, --removal: say how a result is tested" in done.stderr


class TestDemo:
    """captum-cage demo."""

    def test_a_wrong_answer_is_told(self, model, tokenizer, monkeypatch):
        """The last sentence is explained all the same."""
        monkeypatch.setattr(cli, "load_demo", lambda: (model, tokenizer))
        monkeypatch.setattr(
            cli, "generation_arguments", lambda _: {"max_new_tokens": 5}
        )
        done = run("demo", "--kind", "one_question")
        problem = sample_problems(1, 0, "one_question")[0]
        assert done.exit_code == 0
        right = "note: the model got this one wrong. Right is: " + problem.completion
        assert one_line(right) in done.stderr
        assert "true fact" in done.stdout

    @pytest.mark.parametrize("kind", ["one_question", "two_questions", "distractors"])
    def test_its_true_facts_stand_above_all_others(self, kind):
        """In the order of the marginalised shares; the answer is the last one."""
        done = run("demo", "--kind", kind)
        problem = sample_problems(1, 0, kind)[0]
        answer = problem.answers[-1]
        assert (done.exit_code, done.stderr) == (0, "")
        assert f'Explained: "{answer.text}"' in done.stdout
        table = done.stdout.split("Sources")[1].split("Heaviest")[0]
        facts = re.findall(r"^[A-Z]\w+ has .+?\. +([* ]) +\d", table, re.MULTILINE)
        true = len(answer.facts)
        assert facts == ["*"] * true + [" "] * (len(facts) - true)

    def test_it_shows_the_two_heaviest_paths_to_facts(self):
        """From the answer through a step, in words."""
        paths = run("demo").stdout.split("Heaviest paths")[1]
        ends = re.findall(r'%  "(\w+ has [^"]+)"\s*$', paths, re.MULTILINE)
        assert paths.count(' "The second answer is') == 1
        assert len(ends) == 2
        assert len(re.findall(r'── "\w+ has [^"]+"\s*$', paths, re.MULTILINE)) >= 2
