"""Tests of the provider that repeats, bounds, checks and keeps, over real sockets."""

import contextvars
import pickle
import random
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    RemoteLLMAttribution,
    RemoteLLMProvider,
    TextTokenInput,
    VLLMProvider,
)

from captum_cage import GraphContextAttribution
from captum_cage.methods import TextSimilarityProvider
from captum_cage.remote import ReliableProvider, RequestCounts, stopped
from served import MODEL_NAME, EchoProvider, RefusedError, StandIn
from tiny import tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana."
TARGET = " Mia has 7 pens."
PASSING = (500, 503, "429 after 0", "reset", "truncated", "half JSON")
PROVIDERS = (EchoProvider, VLLMProvider)


@pytest.fixture(scope="module")
def running(model, tokenizer):
    """A server that stands in for vLLM."""
    with StandIn(model, tokenizer) as found:
        yield found


@pytest.fixture
def server(running):
    """The server, well-behaved and asked nothing so far."""
    running.faults, running.dead, running.die_after = [], False, None
    running.texts.clear()
    return running


@pytest.fixture(scope="module")
def expected(running, tokenizer):
    """The target's scores by the server's model."""
    return expected_scores(running, tokenizer, TARGET)


def expected_scores(server, tokenizer, target):
    """Scores of a target after the prompt."""
    count = len(tokenizer.encode(target, add_special_tokens=False))
    return server.scores(PROMPT + target)[1][-count:]


def reliable(provider, **options):
    """A provider that waits no longer than tests should."""
    return ReliableProvider(provider, **{"backoff": 0.001, **options})


class Own(RemoteLLMProvider):
    """A provider that does what a test says.

    Args:
        *acts: for each call an error to raise, a function to call or an answer.
    """

    api_url = ""

    def __init__(self, *acts):
        self.acts, self.calls = list(acts), []

    def _act(self, *asked):
        self.calls.append(asked)
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        if isinstance(act, BaseException):
            raise act
        return act() if callable(act) else act

    def generate(self, prompt, **gen_args):
        """The next act."""
        return self._act(prompt, gen_args)

    def get_logprobs(self, input_prompt, target_str, tokenizer=None):
        """The next act."""
        return self._act(input_prompt, target_str, tokenizer)


class TestRetries:
    """What is tried again, and what is not."""

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("fault", PASSING)
    def test_what_may_pass_is_tried_again(
        self, server, tokenizer, expected, provider, fault
    ):
        """One fault costs one more request; the answer is as without."""
        asking = reliable(provider(server.url))
        server.faults = [fault]
        found = asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert found == pytest.approx(expected, abs=1e-6)
        assert asking.counts == RequestCounts(asked=2, retried=1)
        assert server.texts == [PROMPT + TARGET] * 2

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("status", [400, 401, 404, 422])
    def test_what_the_server_refuses_is_not(self, server, tokenizer, provider, status):
        """Raised at once, with the status and the text."""
        asking = reliable(provider(server.url))
        server.faults = [status]
        match = rf"must accept the request, but it refused the text .*Ana.*{status}"
        with pytest.raises(ConnectionError, match=match):
            asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert len(server.texts) == 1

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_in_the_end_the_error_names_text_attempts_and_cause(
        self, server, tokenizer, provider
    ):
        """After the last attempt; a long text is shortened."""
        asking = reliable(provider(server.url), retries=2)
        server.faults = [500, "reset", 503, 500]
        match = r"in 3 attempts, but 3 attempts failed .* 'Ana .* \.\.\. .*503"
        with pytest.raises(ConnectionError, match=match):
            asking.get_logprobs(PROMPT * 9, TARGET, tokenizer)
        assert len(server.texts) == 3
        assert asking.counts == RequestCounts(asked=3, retried=2)

    def test_a_text_is_asked_for_as_patiently(self, server):
        """Generating, too, survives what passes."""
        asking = reliable(VLLMProvider(server.url))
        asking.provider.client = asking.provider.client.with_options(max_retries=0)
        expected = asking.provider.generate(PROMPT, max_new_tokens=3)
        server.faults = [500, "reset"]
        assert asking.generate(PROMPT, max_new_tokens=3, do_sample=False) == expected
        assert asking.counts.retried == 2

    def test_a_server_that_is_not_there_is_named(self, tokenizer):
        """By the client's own error."""
        asking = reliable(EchoProvider("http://127.0.0.1:9/v1"), retries=1)
        with pytest.raises(ConnectionError, match=r"2 attempts failed.*Connection"):
            asking.get_logprobs(PROMPT, TARGET, tokenizer)

    @pytest.mark.parametrize("error", [TypeError("mine"), KeyError("mine")])
    def test_a_mistake_in_a_provider_is_raised_as_it_is(self, error):
        """Once."""
        asking = reliable(Own(error))
        with pytest.raises(type(error), match="mine"):
            asking.get_logprobs(PROMPT, TARGET)
        assert len(asking.provider.calls) == 1

    def test_an_error_behind_an_error_counts(self):
        """As Captum's provider wraps those of its client."""

        def fail():
            try:
                raise ConnectionResetError("gone")
            except ConnectionResetError:
                raise RuntimeError("something") from None

        def hide():
            try:
                raise RefusedError(503, {})
            except RefusedError as error:
                raise RuntimeError("something") from error

        asking = reliable(Own(fail, hide, [-0.5]))
        assert asking.get_logprobs(PROMPT, TARGET) == [-0.5]


class TestTime:
    """Waits and limits."""

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_the_server_says_how_long_to_wait(self, server, tokenizer, provider):
        """Retry-After is longer than the wait that would be ours."""
        asking = reliable(provider(server.url))
        server.faults = ["429 after 0.3"]
        start = time.monotonic()
        asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert 0.3 <= time.monotonic() - start < 3.0

    def test_it_may_name_a_date(self):
        """As HTTP allows."""
        then = datetime.now(timezone.utc) + timedelta(seconds=1000)
        error = RefusedError(429, {"Retry-After": format_datetime(then, usegmt=True)})
        asking = reliable(Own(error), limit=500.0)
        with pytest.raises(ConnectionError, match=r"asks to wait for 99\d"):
            asking.get_logprobs(PROMPT, TARGET)

    @pytest.mark.parametrize("wish", ["soon", "nan", "-5", "inf"])
    def test_what_is_no_time_is_not_waited_for(self, wish):
        """Then the wait is our own."""
        error = RefusedError(429, {"Retry-After": wish})
        asking = reliable(Own(error, [-0.5]))
        assert asking.get_logprobs(PROMPT, TARGET) == [-0.5]

    def test_a_wait_beyond_the_limit_is_not_begun(self, server, tokenizer):
        """The error comes at once."""
        asking = reliable(EchoProvider(server.url), limit=5.0)
        server.faults = ["429 after 100"]
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"within 5 s .*to wait for 100 s"):
            asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert time.monotonic() - start < 3.0

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("fault", ["slow 5", "drip"])
    def test_a_slow_answer_is_given_up(
        self, server, tokenizer, expected, provider, fault
    ):
        """Also of a provider without a time-out, and of a server that drips."""
        asking = reliable(provider(server.url), timeout=0.3)
        server.faults = [fault]
        start = time.monotonic()
        found = asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert time.monotonic() - start < 3.0
        assert found == pytest.approx(expected, abs=1e-6)
        assert asking.counts.retried == 1

    def test_no_answer_in_time_is_a_time_out(self):
        """Of the attempts, and of the whole."""
        never = threading.Event()
        asking = reliable(Own(never.wait), timeout=0.05, retries=1)
        with pytest.raises(TimeoutError, match=r"2 attempts failed.*within 0.05 s"):
            asking.get_logprobs(PROMPT, TARGET)
        asking = reliable(Own(never.wait), limit=0.2, retries=1000)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"within 0.2 s"):
            asking.get_logprobs(PROMPT, TARGET)
        assert time.monotonic() - start < 3.0
        never.set()

    def test_waits_double_and_jitter_draws_nothing_of_the_program_s(self):
        """Half to all of 1, 2, 4 s, a minute at most; generators stay as they are."""

        class Noting(threading.Event):
            """Notes how long it would be waited for."""

            def wait(self, timeout=None):
                waits.append(timeout)
                return False

        waits = []
        before = random.getstate(), torch.get_rng_state()
        asking = ReliableProvider(
            Own(ConnectionResetError()), retries=9, backoff=1.0, limit=1000.0
        )
        context = contextvars.copy_context()
        context.run(stopped.set, Noting())
        with pytest.raises(ConnectionError, match="10 attempts failed"):
            context.run(asking.get_logprobs, PROMPT, TARGET)
        longest = [min(2.0**number, 60.0) for number in range(9)]
        assert len(waits) == 9
        for wait, most in zip(waits, longest, strict=True):
            assert most / 2 <= wait <= most
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


class TestAnswersChecked:
    """No answer is taken that is none."""

    @pytest.mark.parametrize(
        ("fault", "match"),
        [
            ("no choices", "must give 'prompt_logprobs', but NoneType None"),
            ("few scores", "tokenizer: must read .* it read 2 tokens"),
            ("one score less", "tokenizer: must read .* tokens are not the same"),
            ("one score more", "tokenizer: must read .* tokens are not the same"),
            ("NaN", "finite log-probabilities, 0 or less, but nan came for token"),
            ("positive", "0 or less, but 0.5 came for token"),
        ],
    )
    def test_a_vllm_server_s_wrong_answer_is_an_error(
        self, server, tokenizer, tmp_path, fault, match
    ):
        """Not repeated, not kept, and never scores of other tokens."""
        asking = reliable(VLLMProvider(server.url), cache=tmp_path)
        server.faults = [fault]
        with pytest.raises(ValueError, match=match):
            asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert len(server.texts) == 1
        asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert len(server.texts) == 2

    @pytest.mark.parametrize(
        ("answer", "match"),
        [
            ([-0.5], "must give 6 log-probabilities, one per token .*but 1 came"),
            ([-0.5] * 7, "must give 6 log-probabilities.*7 came"),
            ([None] * 6, "must give a list of log-probabilities, but list"),
            (None, "must give a list of log-probabilities, but NoneType"),
            ([-0.5] * 5 + [float("-inf")], "finite .*-inf came for token 5"),
        ],
    )
    def test_so_is_any_provider_s(self, tokenizer, answer, match):
        """The error names target and text."""
        assert len(tokenizer.encode(TARGET, add_special_tokens=False)) == 6
        asking = reliable(Own(answer))
        with pytest.raises(ValueError, match=match + ".*Mia has 7 pens.*after 'Ana"):
            asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert len(asking.provider.calls) == 1

    def test_rounding_above_zero_is_zero(self):
        """As sums in a low precision give."""
        assert reliable(Own([1e-8, -1.0])).get_logprobs(PROMPT, TARGET) == [0.0, -1.0]

    def test_a_special_token_in_front_may_be_the_server_s_alone(self, model, tokenizer):
        """Scores are counted from the end."""

        class Starting:
            """A server's tokenizer that begins each text with a token."""

            def encode(self, text):
                return [1, *tokenizer.encode(text)]

            def decode(self, ids):
                return tokenizer.decode(ids)

        with StandIn(model, Starting()) as server:
            asking = reliable(VLLMProvider(server.url))
            found = asking.get_logprobs(PROMPT, TARGET, tokenizer)
            assert found == server.scores(PROMPT + TARGET)[1][-6:]

    def test_another_tokenizer_than_the_server_s_is_found_out(self, server):
        """By the ids that the server names."""
        other = tiny_tokenizer("sentencepiece")
        asking = reliable(VLLMProvider(server.url))
        with pytest.raises(ValueError, match="tokenizer: must read a text as the serv"):
            asking.get_logprobs(PROMPT, TARGET, other)

    def test_what_is_no_text_is_an_error(self):
        """Where a text is to be written."""
        with pytest.raises(TypeError, match=r"generate\(\) must give a text"):
            reliable(Own(None)).generate(PROMPT)


class TestCache:
    """Answers on disk."""

    def test_an_answer_is_asked_for_once(self, server, tokenizer, expected, tmp_path):
        """Another provider of the same model finds it."""
        for count in range(2):
            asking = reliable(EchoProvider(server.url), cache=tmp_path)
            found = asking.get_logprobs(PROMPT, TARGET, tokenizer)
            assert found == pytest.approx(expected, abs=1e-6)
            assert asking.counts == RequestCounts(asked=1 - count, cached=count)
        assert len(server.texts) == 1

    def test_another_model_text_or_target_is_another_question(
        self, tokenizer, tmp_path
    ):
        """So is another kind of provider; a new object of the same is not."""

        class Other(Own):
            """Another provider."""

        def asked(kind, model, prompt, target):
            provider = kind([-0.5] * 6)
            asking = reliable(provider, cache=tmp_path, model=model)
            asking.get_logprobs(prompt, target, tokenizer)
            return len(provider.calls)

        first = (Own, "a", PROMPT, TARGET)
        assert asked(*first) == 1
        assert asked(Other, *first[1:]) == 1
        assert asked(Own, "b", PROMPT, TARGET) == 1
        assert asked(Own, "a", PROMPT + ".", TARGET) == 1
        assert asked(Own, "a", PROMPT, " Ana has 7 pens.") == 1
        assert asked(Own, "a", PROMPT + TARGET[:4], TARGET[4:] + TARGET[:4]) == 1
        assert asked(*first) == 0

    def test_failures_are_not_kept(self, server, tokenizer, tmp_path):
        """The next call asks again."""
        asking = reliable(EchoProvider(server.url), cache=tmp_path, retries=0)
        for fault in (500, 400, "reset", "few scores"):
            server.faults = [fault]
            with pytest.raises((ConnectionError, ValueError), match="provider: "):
                asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert asking.get_logprobs(PROMPT, TARGET, tokenizer)
        assert asking.counts == RequestCounts(asked=5)

    def test_only_texts_that_are_not_sampled_are_kept(self, tmp_path):
        """Those of temperature 0."""
        asking = reliable(Own(" 3", " 4", " 5", " 6"), cache=tmp_path, model="a")
        arguments = [{}, {"temperature": 0.7}, {"temperature": 0}, {"temperature": 0}]
        found = [asking.generate(PROMPT, **more) for more in arguments]
        assert found == [" 3", " 4", " 5", " 5"]
        assert asking.generate(PROMPT, temperature=0, max_tokens=2) == " 6"

    def test_shared_answers_serve_another_cut_of_the_same_text(
        self, server, tokenizer, tmp_path
    ):
        """A score of a causal model does not depend on where the target begins."""
        asking = reliable(VLLMProvider(server.url), cache=tmp_path)
        whole = asking.get_logprobs(PROMPT, TARGET, tokenizer)
        rest = asking.get_logprobs(PROMPT + TARGET[:4], TARGET[4:], tokenizer)
        assert len(server.texts) == 1
        assert rest == whole[-len(rest) :]
        more = asking.get_logprobs(PROMPT[:-5], PROMPT[-5:] + TARGET, tokenizer)
        assert len(server.texts) == 2
        assert more[-len(whole) :] == whole

    def test_a_model_must_have_a_name(self, tmp_path):
        """Or answers of another would be taken for its own."""
        with pytest.raises(ValueError, match="model: must name the model"):
            reliable(Own([-0.5]), cache=tmp_path)

    def test_it_is_sent_to_another_process(self, server, tokenizer, tmp_path):
        """With its cache and its counts."""
        asking = reliable(EchoProvider(server.url), cache=tmp_path)
        found = asking.get_logprobs(PROMPT, TARGET, tokenizer)
        sent = pickle.loads(pickle.dumps(asking))
        assert sent.get_logprobs(PROMPT, TARGET, tokenizer) == found
        assert sent.counts == RequestCounts(asked=1, cached=1)


class TestArguments:
    """What it takes."""

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"retries": -1}, ValueError, "retries: must be 0 or more"),
            ({"retries": 1.5}, TypeError, "retries: must be a whole number"),
            ({"concurrency": 0}, ValueError, "concurrency: must be 1 or more"),
            ({"backoff": -1}, ValueError, "backoff: must be seconds, 0 or more"),
            ({"timeout": 0}, ValueError, "timeout: must be seconds, above 0"),
            ({"timeout": None}, TypeError, "timeout: must be seconds"),
            ({"limit": float("inf")}, ValueError, "limit: must be seconds"),
            ({"limit": float("nan")}, ValueError, "limit: must be seconds"),
            ({"limit": True}, TypeError, "limit: must be seconds"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, options, error, match):
        """When it is made."""
        with pytest.raises(error, match=match):
            ReliableProvider(Own([-0.5]), **options)

    def test_the_size_of_the_cache_is_a_number(self, tmp_path):
        """Of one answer or more."""
        with pytest.raises(ValueError, match="cache_size: must be 1 or more"):
            reliable(Own([-0.5]), cache=tmp_path, model="a", cache_size=0)

    def test_a_provider_must_score(self):
        """An address is none."""
        with pytest.raises(TypeError, match="provider: must be a provider of Captum's"):
            ReliableProvider("http://localhost:8000/v1")

    def test_only_a_vllm_server_s_scores_are_shared_unasked(self, server):
        """Whether a score depends on what follows, only its author knows."""
        assert ReliableProvider(VLLMProvider(server.url)).share
        assert not ReliableProvider(EchoProvider(server.url)).share
        assert ReliableProvider(EchoProvider(server.url), share=True).share

    def test_it_says_whose_it_is(self, server):
        """The model's name and address are the provider's."""
        asking = ReliableProvider(VLLMProvider(server.url))
        assert (asking.model_name, asking.api_url) == (MODEL_NAME, server.url)


def test_rows_through_a_server_that_misbehaves_are_the_model_s(
    server, tokenizer, tmp_path
):
    """Every fifth answer or so fails in another way, and no number changes."""
    inp = TextTokenInput(PROMPT, tokenizer)
    method = FeatureAblation(RemoteLLMAttribution.placeholder_model)

    def explained(provider):
        llm_attr = RemoteLLMAttribution(method, tokenizer, provider)
        cage = GraphContextAttribution(llm_attr)
        return cage.attribute(inp, TARGET, units="word")

    plain = explained(EchoProvider(server.url))
    asked = len(server.texts)
    asking = reliable(
        EchoProvider(server.url), cache=tmp_path, timeout=0.4, backoff=0.01
    )
    server.faults = [
        fault
        for passing in (*PASSING, "slow 2", "drip")
        for fault in (None, None, None, None, passing)
    ]
    found = explained(asking)
    assert (found.graph.rows == plain.graph.rows).all()
    assert asking.counts.retried == 8
    assert found.meta["model"] == MODEL_NAME
    again = explained(reliable(EchoProvider(server.url), cache=tmp_path))
    assert (again.graph.rows == plain.graph.rows).all()
    assert len(server.texts) - asked == asking.counts.asked


def test_similarities_are_not_shared(tokenizer):
    """What a text's similarity is to a target says nothing of a part of it."""
    provider = TextSimilarityProvider(
        lambda prompt: " Mia has 7 pens." if "Ana" in prompt else " none of it is so",
        lambda one, other: 0.9 if one == other else 0.1,
    )
    rows = []
    for asked in (provider, ReliableProvider(provider)):
        method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        llm_attr = RemoteLLMAttribution(method, tokenizer, asked)
        result = GraphContextAttribution(llm_attr).attribute(
            TextTokenInput(PROMPT, tokenizer), TARGET, units="word"
        )
        rows.append(result.graph.rows)
    assert (rows[0] == rows[1]).all()


def test_two_threads_use_one_tokenizer(tokenizer):
    """Scores are counted in each request's thread, where texts are read at once."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    failed = []

    def ask(server, number):
        asking = reliable(VLLMProvider(server.url, MODEL_NAME))
        try:
            for _ in range(5):
                asking.get_logprobs(PROMPT + " more" * number, TARGET, tokenizer)
        except Exception as error:  # noqa: BLE001  # told below
            failed.append(error)

    with StandIn(model, tokenizer) as server:
        threads = [
            threading.Thread(target=ask, args=(server, number)) for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
