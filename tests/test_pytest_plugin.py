"""The pytest plugin: its fixtures, and what it says of a test that changes a model."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
import torch

kept = []


def test_a_model_is_made_once(tiny_causal_lm):
    kept.append(tiny_causal_lm("llama", seed=3))
    assert kept[0] is tiny_causal_lm("llama", seed=3)
    assert kept[0] is not tiny_causal_lm("llama", seed=4)
    assert tiny_causal_lm("llama", seed=0) is tiny_causal_lm()


def test_that_reads_attention_and_truncates(tiny_causal_lm, tiny_tokenizer):
    given = {"return_tensors": "pt", "truncation": True, "max_length": 3}
    ids = tiny_tokenizer("byte")("a" * 9, **given).input_ids
    assert tiny_causal_lm()(ids, output_attentions=True).logits.shape == (1, 3, 640)


def test_and_kept_for_the_next_test(tiny_causal_lm, tiny_tokenizer):
    assert kept[0] is tiny_causal_lm("llama", seed=3)
    ids = tiny_tokenizer("char")("Ana", return_tensors="pt").input_ids
    assert kept[0](ids).logits.shape == (1, 3, 640)


def test_that_changes_a_model(tiny_causal_lm):
    tiny_causal_lm(seed=3).train()


def test_behind_it_gets_another(tiny_causal_lm):
    model = tiny_causal_lm(seed=3)
    assert model is not kept[0]
    assert not model.training


def test_that_changes_a_tokenizer(tiny_tokenizer):
    tiny_tokenizer("char").add_tokens(["x y"])


def test_that_takes_gradients(tiny_causal_lm):
    model = tiny_causal_lm("gpt2")
    model(torch.tensor([[1, 2]])).logits.sum().backward()


def test_that_fails_anyway(tiny_causal_lm):
    tiny_causal_lm()
    raise ValueError("its own")
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The run of these tests, in a Python of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "test_it.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "captum_cage.pytest_plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-vv", "-rA", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_changes_are_errors_of_the_test_that_made_them(done):
    """The others pass; the next test gets a model as it was."""
    assert "1 failed, 7 passed, 3 errors" in done


def test_the_message_says_what_was_changed_and_what_to_do(done):
    """The call, the changes, the remedy."""
    assert "tiny_causal_lm('llama', seed=3) was changed by this test:" in done
    assert "mode of the model was evaluation and is training" in done
    assert "length of the tokenizer was 640 and is 641" in done
    assert "gradient of parameter" in done
    assert "make one of your own: captum_cage.testing.tiny_causal_lm()" in done


def test_a_run_that_uses_no_fixture_imports_no_torch(pytester):
    """The plugin is loaded in every run of a machine that has the package."""
    pytester.makepyfile(
        """
        import sys

        def test_it():
            assert "captum_cage.pytest_plugin" in sys.modules
            assert "torch" not in sys.modules
        """
    )
    found = pytester.runpytest_subprocess("-p", "captum_cage.pytest_plugin")
    found.assert_outcomes(passed=1)
