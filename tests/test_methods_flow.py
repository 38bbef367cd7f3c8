"""Information flow routes, against loops over layers, heads and pairs of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LLMGradientAttribution
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.methods import IFR
from captum_cage.methods.blocks import Block
from captum_cage.methods.flow import route_shares
from captum_cage.testing import check_engine
from tiny import tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana. How many?"
TARGET = " The answer is 18. So she sells 9."
ORDERS = {"l1": 1, "l2": 2}
PRODUCT = {"aggregation": "product"}


def small(arch="llama", dtype=torch.float64, **changes):
    """A small model."""
    return tiny_model(arch, vocab_size=len(tiny_tokenizer()), dtype=dtype, **changes)


def ids_of(text=PROMPT):
    """Token ids of a text."""
    return torch.tensor(tiny_tokenizer().encode(text))


def near_by_loop(after, before, parts, order):
    """Proximities of tokens and of the stream, from what each head brings from each.

    Args:
        after: the sum, ``(width,)``.
        before: the stream before, ``(width,)``.
        parts: ``(heads, K, width)``.
        order: of the norm.
    """
    size = np.linalg.norm(after, order)
    near = np.zeros(parts.shape[1])
    for head in parts:
        for j, part in enumerate(head):
            near[j] += max(0.0, size - np.linalg.norm(after - part, order))
    stream = max(0.0, size - np.linalg.norm(after - before, order))
    return near, stream


def shares_by_loop(after, before, parts, order):
    """Shares of a position."""
    near, stream = near_by_loop(after, before, parts, order)
    total = near.sum() + stream
    return near / total if total else near


def shares_of_a_llama(model, ids, order):
    """Shares of all positions in each layer, from a plain pass with its weights read.

    Returns:
        list: one array of shape ``(n, n)`` per layer.
    """
    model.config._attn_implementation = "eager"
    streams, values, added = [], [], []
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kw: streams.append(
                    (args[0] if args else kw["hidden_states"])[0].numpy()
                ),
                with_kwargs=True,
            ),
            layer.self_attn.v_proj.register_forward_hook(
                lambda _, __, out: values.append(out[0].numpy())
            ),
            layer.self_attn.register_forward_hook(
                lambda _, __, out: added.append(out[0][0].numpy())
            ),
        ]
    with torch.no_grad():
        attention = model(ids[None], output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    model.config._attn_implementation = "sdpa"
    config = model.config
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    group = heads // config.num_key_value_heads
    found = []
    for layer, module in enumerate(model.model.layers):
        output = module.self_attn.o_proj.weight.detach().numpy()
        weights = attention[layer][0].numpy()
        n = len(ids)
        shares = np.zeros((n, n))
        for i in range(n):
            parts = np.zeros((heads, n, config.hidden_size))
            for head in range(heads):
                own = slice(head // group * size, (head // group + 1) * size)
                block = output[:, head * size : (head + 1) * size]
                for j in range(i + 1):
                    parts[head, j] = weights[head, i, j] * (
                        block @ values[layer][j, own]
                    )
            after = streams[layer][i] + added[layer][i]
            shares[i] = shares_by_loop(after, streams[layer][i], parts, order)
        found.append(shares)
    return found


class TestRows:
    """Rows of a whole text."""

    @pytest.mark.parametrize("proximity", ORDERS)
    def test_they_are_sums_of_shares_at_the_position_that_predicts(self, proximity):
        """Each row adds up, over the layers, the shares of the position before it."""
        model, ids = small(), ids_of()
        layers = shares_of_a_llama(model, ids, ORDERS[proximity])
        found = IFR(model, proximity).rows(ids, ids[-5:])
        # Eager attention takes its softmax in float32.
        np.testing.assert_allclose(found, sum(layers)[-5:], atol=1e-6)

    def test_a_product_follows_routes_through_positions(self):
        """Shares and the stream's rest, as matrices, are multiplied."""
        model, ids = small(), ids_of()
        total = np.eye(len(ids))
        for shares in shares_of_a_llama(model, ids, 1):
            total = (shares + np.diag(1 - shares.sum(axis=1))) @ total
        found = IFR(model, "l1", "product").rows(ids, ids[-5:])
        np.testing.assert_allclose(found, total[-5:], atol=1e-6)
        np.testing.assert_allclose(found.sum(dim=1), 1.0, atol=1e-6)

    def test_nothing_flows_from_later_tokens(self):
        """Entries after the predicting position are zero."""
        ids = ids_of()
        found = IFR(small()).rows(ids, ids[-6:])
        later = np.triu(np.ones((6, len(ids)), dtype=bool), len(ids) - 5)
        assert not found.numpy()[later].any()

    @pytest.mark.parametrize("length", [130, 200])
    def test_pieces_of_a_long_text_fit_together(self, length):
        """More positions than one piece holds give the rows of each position alone."""
        model = small(max_position_embeddings=256)
        ids = torch.arange(length) % 90 + 10
        together = IFR(model).rows(ids, ids[-100:])
        for place in (0, 50, 99):
            alone = IFR(model).rows(ids[: length - 99 + place], ids[:1])
            np.testing.assert_allclose(
                together[place, : alone.shape[1]], alone[0], atol=1e-9
            )

    def test_all_rows_take_one_pass(self, monkeypatch):
        """However many rows, a text is read once; and twice more to look at a model."""
        model = small()
        calls = []
        plain = model.forward

        def counted(*args, **kwargs):
            calls.append(1)
            return plain(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
        ids = ids_of()
        method = IFR(model)
        method.rows(ids, ids[-2:])
        calls.clear()
        method.rows(ids, ids[-10:])
        assert len(calls) == 1

    def test_a_half_precision_model_gives_finite_rows(self):
        """Shares are computed in at least float32."""
        ids = ids_of()
        found = IFR(small(dtype=torch.bfloat16)).rows(ids, ids[-5:])
        assert found.isfinite().all()


class TestShares:
    """Shares of one block, whatever it holds."""

    @settings(deadline=None, max_examples=60)
    @given(
        seed=st.integers(0, 10**6),
        heads=st.integers(1, 4),
        some=st.integers(1, 12),
        width=st.sampled_from([1, 3, 16, 64]),
        scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
        sharp=st.sampled_from([0.0, 1.0, 10.0]),
    )
    @pytest.mark.parametrize("proximity", ORDERS)
    def test_they_equal_a_loop(self, proximity, seed, heads, some, width, scale, sharp):
        """Also where parts are larger than the sum, and weights are sharp or zero."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        values, output = drawn(heads, some, 2), drawn(heads, 2, width) * scale
        weights = (drawn(heads, some, some) * sharp).tril().softmax(dim=-1).tril()
        before = drawn(some, width)
        before[0] = 0
        parts = weights[..., None] * (values @ output)[:, None]
        after = before + parts.sum(dim=(0, 2))
        block = Block(
            0, 0, some, weights, weights, values, output, before=before, after=after
        )
        found, stream = route_shares(block, proximity)
        for i in range(some):
            near, rest = near_by_loop(
                after[i].numpy(),
                before[i].numpy(),
                parts[:, i].numpy(),
                ORDERS[proximity],
            )
            total = near.sum() + rest
            # Next to nothing in all is made of rounding, here and there.
            assume(total == 0 or total > 1e-5)
            expected = near / total if total else near
            np.testing.assert_allclose(found[i], expected, atol=1e-9)
        sums = found.sum(dim=1) + stream
        assert ((sums - 1).abs() < 1e-9).logical_or(sums == 0).all()


class TestEngine:
    """All rows at once."""

    @pytest.mark.parametrize(
        ("arch", "options", "units"),
        [
            *((arch, {}, "token") for arch in ("llama", "gpt2", "qwen3", "gemma3")),
            *((arch, PRODUCT, "sentence") for arch in ("llama", "gpt2", "gemma3")),
            ("qwen3", PRODUCT, "token"),
            ("qwen3", {}, "sentence"),
        ],
    )
    def test_rows_are_the_loops(self, arch, options, units):
        """Whatever the architecture and the units."""
        method = IFR(small(arch), **options)
        llm_attr = LLMGradientAttribution(method, tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(llm_attr, inp, TARGET, units=units)

    def test_an_interrupted_call_keeps_the_table(self):
        """The rows of all tokens are found again when the call is repeated."""
        llm_attr = LLMGradientAttribution(IFR(small()), tiny_tokenizer())
        cage = GraphContextAttribution(llm_attr)
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        whole = cage.attribute(inp, TARGET).graph.rows
        assert np.array_equal(whole, cage.attribute(inp, TARGET).graph.rows)


class TestErrors:
    """What is refused."""

    def test_unknown_options_are_refused(self):
        """Both options are one of two words."""
        with pytest.raises(ValueError, match="proximity: must be one of 'l1', 'l2'"):
            IFR(small(), "l3")
        with pytest.raises(ValueError, match="aggregation: must be one of 'sum'"):
            IFR(small(), aggregation="mean")

    @pytest.mark.parametrize("family", ["gpt_neox", "phi"])
    def test_parallel_blocks_are_refused(self, family):
        """Layers that add attention and the rest at once have no such block."""
        model = small(dtype=torch.float32, model_type=family)
        with pytest.raises(ValueError, match="IFR: needs decoder layers that add"):
            IFR(model).rows(ids_of(), ids_of()[-2:])
