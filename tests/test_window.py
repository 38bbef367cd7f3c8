"""Tests of requests that are under way side by side: rows are those of the loop."""

import os
import signal
import threading
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    Lime,
    RemoteLLMAttribution,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
    VLLMProvider,
)

from captum_cage import (
    ChatTokenInput,
    GraphContextAttribution,
    TokenIdsInput,
    window,
)
from captum_cage.methods import CLime, LShap
from captum_cage.remote import ReliableProvider
from served import StandIn
from tiny import LocalProvider, tiny_model

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana. How many?"
TARGET = " Mia has 7 pens. So 7. The answer is 7."
SHORT = " Mia has 3 + 4 = 7 pens."
METHODS = [
    (FeatureAblation, {}),
    (FeatureAblation, {"num_trials": 2}),
    (ShapleyValueSampling, {"n_samples": 2}),
    (Lime, {"n_samples": 8}),
    (KernelShap, {"n_samples": 8}),
    (CLime, {}),
    (LShap, {}),
]


class Local(LocalProvider):
    """A local model as a server, which tells how it is asked.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        concurrency (int, optional): what it says of itself. Default: None, nothing
        share (bool, optional): what it says of itself. Default: None, nothing
        delay (float, optional): seconds that an answer takes. Default: ``0.0``
    """

    api_url = ""

    def __init__(self, model, tokenizer, concurrency=None, share=None, delay=0.0):
        super().__init__(model, tokenizer)
        if concurrency is not None:
            self.concurrency = concurrency
        if share is not None:
            self.share = share
        self.delay, self.asked, self.together = delay, [], 0
        self.fails_from = None  # number of the request from which all fail
        self.interrupts_at = None
        self._under_way, self._lock = 0, threading.Lock()

    def get_logprobs(self, input_prompt, target_str, tokenizer=None):
        """The model's scores."""
        with self._lock:
            self.asked.append((input_prompt, target_str))
            number = len(self.asked)
            self._under_way += 1
            self.together = max(self.together, self._under_way)
        try:
            time.sleep(self.delay)
            if number == self.interrupts_at:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            if self.fails_from is not None and number >= self.fails_from:
                raise ConnectionResetError(f"request {number}")
            return super().get_logprobs(input_prompt, target_str, tokenizer)
        finally:
            with self._lock:
                self._under_way -= 1


@pytest.fixture(scope="module")
def model(tokenizer):
    """A small Llama in double precision, so that sums say what was asked."""
    return tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float64)


@pytest.fixture(scope="module")
def inp(tokenizer):
    """A prompt."""
    return TextTokenInput(PROMPT, tokenizer)


def wrapped(provider, method=FeatureAblation, tokenizer=None, **more):
    """A graph attribution that asks a provider."""
    base = method(RemoteLLMAttribution.placeholder_model)
    tokenizer = tokenizer or provider.tokenizer
    return GraphContextAttribution(
        RemoteLLMAttribution(base, tokenizer, provider, **more)
    )


def explained(provider, inp, target=TARGET, method=FeatureAblation, **options):
    """Rows, and the next random number after them."""
    torch.manual_seed(0)
    options = {"units": "sentence", **options}
    result = wrapped(provider, method).attribute(inp, target, **options)
    return result.graph.rows, torch.rand(1).item()


def assert_same(found, expected):
    """To the last bit."""
    assert np.array_equal(found[0], expected[0])
    assert found[1] == expected[1]


class TestRows:
    """The same numbers, in the same order, with the same draws."""

    @pytest.mark.parametrize(("method", "options"), METHODS)
    def test_rows_are_those_of_the_loop(self, model, tokenizer, inp, method, options):
        """For each method that perturbs; nothing is asked twice."""
        one_by_one = Local(model, tokenizer)
        expected = explained(one_by_one, inp, method=method, **options)
        for width, share in ((8, False), (1, True), (8, True)):
            provider = Local(model, tokenizer, width, share)
            found = explained(provider, inp, method=method, **options)
            assert_same(found, expected)
            assert len(provider.asked) <= len(one_by_one.asked)
            if not share:
                scores, *rows = provider.asked
                assert Counter(rows) == Counter(set(one_by_one.asked[1:]))
                assert scores == one_by_one.asked[0]

    @pytest.mark.parametrize("units", ["word", "token"])
    def test_so_are_those_of_smaller_units(self, model, tokenizer, inp, units):
        """With as many requests as sequences that an engine would need."""
        target = " Mia has 7 pens."
        one_by_one = Local(model, tokenizer)
        expected = explained(one_by_one, inp, target, units=units)
        provider = Local(model, tokenizer, 4, share=True)
        found = explained(provider, inp, target, units=units)
        assert_same(found, expected)
        G, N = found[0].shape
        # The scores, the plain text, and one per unit but the last, which no row sees.
        assert len(provider.asked) == 1 + 1 + N - 1
        assert len(one_by_one.asked) == 1 + sum(N - G + t + 1 for t in range(G))

    def test_templates_and_chats_are_asked_alike(self, model, tokenizer):
        """Any input that is text or ids."""
        messages = [{"role": "user", "content": PROMPT}]
        inputs = [
            TextTemplateInput("{} has 3 {}. {}", ["Ana", "pens", "How many?"]),
            ChatTokenInput(messages, tokenizer),
        ]
        for inp in inputs:
            expected = explained(Local(model, tokenizer), inp)
            assert_same(explained(Local(model, tokenizer, 8, True), inp), expected)

    def test_probabilities_are_attributed_alike(self, model, tokenizer, inp):
        """They are made of the same scores."""
        rows = []
        for more in ({}, {"concurrency": 8, "share": True}):
            cage = wrapped(Local(model, tokenizer, **more), attr_target="prob")
            rows.append(cage.attribute(inp, TARGET, units="sentence").graph.rows)
        assert np.array_equal(*rows)

    @pytest.mark.parametrize("options", [{"tolerance": 0.2}, {"strategy": "loop"}])
    def test_fewer_rows_and_the_loop_by_name(self, model, tokenizer, inp, options):
        """Whichever rows are asked for."""
        options |= {"explain": "The answer", "normalization": "positive"}
        options.pop("normalization")
        expected = explained(Local(model, tokenizer), inp, **options)
        found = explained(Local(model, tokenizer, 8, True), inp, **options)
        assert_same(found, expected)

    def test_draws_are_drawn_alike(self, model, tokenizer, inp):
        """Each draw goes on from where the last one left the generators."""
        options = {"method": ShapleyValueSampling, "n_samples": 2, "draws": 2}
        expected = explained(Local(model, tokenizer), inp, **options)
        assert_same(explained(Local(model, tokenizer, 8), inp, **options), expected)

    def test_a_text_that_is_read_otherwise_when_it_goes_on_is_asked_alone(
        self, model, tokenizer, inp
    ):
        """Its scores do not stand among those of the longer one."""
        (HAS,), (FOUR,) = tokenizer.encode(" has"), tokenizer.encode(" 4")

        class Ending:
            """Reads a last " has" as " 4"."""

            def __getattr__(self, name):
                return getattr(tokenizer, name)

            def __len__(self):
                return len(tokenizer)

            def encode(self, text, **more):
                ids = tokenizer.encode(text, **more)
                return [*ids[:-1], FOUR if ids[-1] == HAS else ids[-1]] if ids else []

        one_by_one, shared = Local(model, Ending()), Local(model, Ending(), 8, True)
        with pytest.warns(UserWarning, match="reads the text of 1 of 8 rows as other"):
            expected = explained(one_by_one, inp, SHORT, units="word")
        with pytest.warns(UserWarning, match="reads the text of 1 of 8 rows as other"):
            found = explained(shared, inp, SHORT, units="word")
        assert_same(found, expected)
        G, N = found[0].shape
        # Row 1, of "has", is asked alone: the plain text, and one per unit before it.
        assert len(shared.asked) == 1 + 1 + (N - 1) + 1 + (N - G + 1)

    def test_a_target_that_alone_has_fewer_tokens_is_no_reason_to_mix_scores_up(
        self, model, tokenizer, inp
    ):
        """A provider gives as many scores as the target has when read alone."""

        class Short:
            """Reads a target that begins with " has 3" as one token less."""

            def __getattr__(self, name):
                return getattr(tokenizer, name)

            def __len__(self):
                return len(tokenizer)

            def encode(self, text, add_special_tokens=True):
                ids = tokenizer.encode(text)
                cut = text.startswith(" has 3") and not add_special_tokens
                return ids[1:] if cut else ids

        one_by_one, shared = Local(model, Short()), Local(model, Short(), 8, True)
        expected = explained(one_by_one, inp, SHORT, units="word")
        assert_same(explained(shared, inp, SHORT, units="word"), expected)
        # The row of "has" without what stands before it is asked alone.
        assert len(shared.asked) == 1 + expected[0].shape[1] + 1

    def test_a_tokenizer_with_a_token_in_front_of_texts(self, model, tokenizer):
        """Texts begin alike all the same, and each target without it."""

        class Starting:
            """Begins each text with a token."""

            bos_token_id = 1

            def __getattr__(self, name):
                return getattr(tokenizer, name)

            def __len__(self):
                return len(tokenizer)

            def encode(self, text, add_special_tokens=True):
                return [1] * add_special_tokens + tokenizer.encode(text)

        one_by_one, shared = Local(model, Starting()), Local(model, Starting(), 8, True)
        inp = TokenIdsInput(Starting().encode(PROMPT), tokenizer)
        expected = explained(one_by_one, inp, SHORT, units="word")
        assert_same(explained(shared, inp, SHORT, units="word"), expected)
        assert len(shared.asked) == 1 + expected[0].shape[1]


class TestMethodsOfOnesOwn:
    """What looks at the answers is computed with them."""

    def test_questions_that_depend_on_answers_are_asked_then(
        self, model, tokenizer, inp
    ):
        """And made-up scores never get into a row."""

        class Adaptive(FeatureAblation):
            """Asks once more for the unit that matters most."""

            def attribute(self, inputs, additional_forward_args=None, **_):
                def value(absent):
                    sample = inputs.clone()
                    sample[0, absent] = 0
                    found = self.forward_func(sample, *additional_forward_args)
                    return found.reshape(-1)[0].item()

                plain = value([])
                effects = [plain - value([unit]) for unit in range(inputs.shape[1])]
                first = int(np.argmax(effects))
                effects[first] = plain - value([first, (first + 1) % len(effects)])
                return torch.tensor([effects])

        expected = explained(Local(model, tokenizer), inp, method=Adaptive)
        found = explained(Local(model, tokenizer, 8), inp, method=Adaptive)
        assert_same(found, expected)

    def test_a_method_that_cannot_do_with_made_up_scores(self, model, tokenizer, inp):
        """It is asked with true ones, one by one."""

        class Choosy(ShapleyValueSampling):
            """Fails where two scores are equal."""

            def attribute(self, inputs, additional_forward_args=None, n_samples=2):
                noise = torch.rand(1).item()
                plain = self.forward_func(inputs, *additional_forward_args)
                other = self.forward_func(inputs * 0, *additional_forward_args)
                if torch.equal(plain, other):
                    raise ZeroDivisionError
                found = super().attribute(
                    inputs,
                    additional_forward_args=additional_forward_args,
                    n_samples=n_samples,
                )
                return found + noise

        options = {"method": Choosy, "n_samples": 2}
        expected = explained(Local(model, tokenizer), inp, **options)
        assert_same(explained(Local(model, tokenizer, 8), inp, **options), expected)


class TestWindow:
    """How many at once."""

    def test_no_more_are_under_way_than_the_window_holds(self, model, tokenizer, inp):
        """And as many as that."""
        provider = Local(model, tokenizer, concurrency=3, delay=0.01)
        explained(provider, inp)
        assert provider.together == 3

    def test_a_server_gets_them_over_as_many_sockets(self, model, tokenizer, inp):
        """With Captum's own provider for vLLM."""
        expected = explained(Local(model, tokenizer), inp)
        with StandIn(model, tokenizer, delay=0.05) as server:
            asking = ReliableProvider(VLLMProvider(server.url), concurrency=4)
            asking.tokenizer = tokenizer
            assert_same(explained(asking, inp), expected)
            assert server.together == 4

    def test_a_provider_that_says_nothing_is_asked_one_by_one(
        self, model, tokenizer, inp
    ):
        """It may not bear threads."""
        provider = Local(model, tokenizer, delay=0.002)
        explained(provider, inp)
        assert provider.together == 1

    def test_an_object_with_its_own_way_to_ask_keeps_it(self, model, tokenizer, inp):
        """A subclass of Captum's object may do anything with an answer."""

        class Doubling(RemoteLLMAttribution):
            """Doubles what is said."""

            def _remote_forward_func(self, *args, **kwargs):
                return 2 * super()._remote_forward_func(*args, **kwargs)

        rows = []
        for provider in (Local(model, tokenizer), Local(model, tokenizer, 8)):
            base = FeatureAblation(RemoteLLMAttribution.placeholder_model)
            cage = GraphContextAttribution(Doubling(base, tokenizer, provider))
            rows.append(cage.attribute(inp, TARGET, units="sentence").graph.rows)
            assert provider.together == 1
        assert np.array_equal(*rows)

    @pytest.mark.parametrize("share", [False, True])
    @pytest.mark.parametrize("more", [[], [-1.0] * 9])
    def test_a_wrong_number_of_scores_is_an_error(
        self, model, tokenizer, inp, share, more
    ):
        """And never some of them."""

        class Wrong(Local):
            """Gives one score less, or more."""

            def get_logprobs(self, input_prompt, target_str, tokenizer=None):
                found = super().get_logprobs(input_prompt, target_str, tokenizer)
                return found if len(self.asked) < 5 else [*found[1:], *more]

        match = r"provider: must give \d+ log-probabilities, one per token .* came for"
        with pytest.raises(ValueError, match=match):
            explained(Wrong(model, tokenizer, 4, share), inp)

    def test_threads_leave_the_filters_of_warnings_as_they_were(
        self, model, tokenizer, inp, monkeypatch
    ):
        """They are those of the whole process; a row is drafted in one at a time."""
        inside, together = [], []
        row = window.loop_row

        def drafted(task, step):
            if isinstance(task.llm_attr.provider, window._Notes):
                inside.append(step)
                together.append(len(inside))
                time.sleep(0.005)
                inside.pop()
            return row(task, step)

        monkeypatch.setattr(window, "loop_row", drafted)
        before = list(warnings.filters)
        threads = [
            threading.Thread(
                target=wrapped(Local(model, tokenizer, 2)).attribute,
                args=(inp, SHORT),
                kwargs={"units": "sentence"},
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(together) == 1
        assert list(warnings.filters) == before

    def test_progress_is_shown(self, model, tokenizer, inp, capsys):
        """In requests."""
        explained(Local(model, tokenizer, 8), inp, show_progress=True)
        assert "requests" in capsys.readouterr().err


class TestInterrupts:
    """Nothing that was answered is lost."""

    def test_an_interrupt_while_threads_start_stops_those_that_run(self, monkeypatch):
        """They ask nothing more."""
        asked, started = [], []

        class Interrupted(threading.Thread):
            """The second one is never started."""

            def start(self):
                if started:
                    raise KeyboardInterrupt
                started.append(self)
                super().start()

        def ask(request):
            asked.append(request)
            time.sleep(0.01)
            return [-1.0]

        monkeypatch.setattr(threading, "Thread", Interrupted)
        requests = [("", str(number)) for number in range(1000)]
        with pytest.raises(KeyboardInterrupt):
            next(window._side_by_side(requests, ask, 2, lambda *_: None))
        started[0].join(timeout=5)
        assert not started[0].is_alive()
        assert len(asked) < len(requests)

    @pytest.mark.parametrize("share", [False, True])
    def test_an_interrupt_ends_the_window_and_the_same_call_goes_on(
        self, model, tokenizer, inp, share
    ):
        """All but what was under way is asked once."""
        expected = explained(Local(model, tokenizer), inp, SHORT, units="word")
        provider = Local(model, tokenizer, 4, share, delay=0.001)
        provider.interrupts_at = 20
        cage = wrapped(provider)
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, SHORT, units="word")
        time.sleep(0.2)
        asked = len(provider.asked)
        assert asked <= 20 + 2 * 4
        time.sleep(0.05)
        assert len(provider.asked) == asked
        result = cage.attribute(inp, SHORT, units="word")
        assert np.array_equal(result.graph.rows, expected[0])
        again = Counter(provider.asked[1:])
        again.subtract(set(provider.asked[1:]))
        assert again.total() <= 2 * 4

    def test_an_interrupt_leaves_the_generators_as_the_loop_does(
        self, model, tokenizer, inp
    ):
        """After the last row that was finished, here none."""
        provider = Local(model, tokenizer, 4)
        provider.fails_from = 2
        torch.manual_seed(0)
        before = torch.get_rng_state()
        with pytest.raises(ConnectionResetError, match="request"):
            wrapped(provider, ShapleyValueSampling).attribute(
                inp, TARGET, units="sentence", n_samples=2
            )
        assert torch.equal(torch.get_rng_state(), before)

    def test_finished_rows_stay_when_the_provider_dies(
        self, model, tokenizer, inp, caplog
    ):
        """The error is the provider's; the same call goes on when it is back."""
        expected = explained(Local(model, tokenizer), inp, SHORT, units="word")
        provider = Local(model, tokenizer, 4)
        provider.fails_from = 80
        cage = wrapped(provider)
        with pytest.raises(ConnectionResetError, match="request 8"):
            cage.attribute(inp, SHORT, units="word")
        assert "rows; the same call goes on from there" in caplog.text
        asked = len(provider.asked)
        assert asked <= 80 + 4
        provider.fails_from = None
        result = cage.attribute(inp, SHORT, units="word")
        assert np.array_equal(result.graph.rows, expected[0])
        distinct = len(set(provider.asked))
        assert len(provider.asked) <= distinct + 1 + 2 * 4

    def test_a_server_that_dies_half_way(self, model, tokenizer, inp, tmp_path):
        """A clear error; another process with the same cache asks only for the rest."""
        with StandIn(model, tokenizer) as server:

            def asking():
                found = ReliableProvider(
                    VLLMProvider(server.url, "stand-in"),
                    retries=1,
                    backoff=0.001,
                    cache=tmp_path,
                )
                found.tokenizer = tokenizer
                return found

            server.die_after = 15
            with pytest.raises(ConnectionError, match=r"provider: must answer .*2 att"):
                explained(asking(), inp, SHORT, units="word")
            server.die_after, server.dead = None, False
            server.texts.clear()
            found = explained(asking(), inp, SHORT, units="word")
            fresh = len(server.texts)
        assert_same(found, explained(Local(model, tokenizer), inp, SHORT, units="word"))
        N = found[0].shape[1]
        # The scores serve as the plain text, too.
        assert fresh == N - 15

    def test_who_waits_to_try_again_stops_with_the_window(self, model, tokenizer, inp):
        """The first failure ends the waits of the others."""
        provider = Local(model, tokenizer)
        provider.fails_from = 2
        asking = ReliableProvider(provider, retries=2, backoff=0.2, share=True)
        asking.tokenizer = tokenizer
        with pytest.raises(ConnectionError, match="3 attempts failed"):
            explained(asking, inp, SHORT, units="word")
        asked = len(provider.asked)
        time.sleep(0.5)
        assert len(provider.asked) <= asked + 1
