"""The suite's reward, how a user's reward is found and read, and the contract it keeps."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, Prompt
from megatron_ext.data.rewards import BadReward, correctness, load_reward, read_reward
from megatron_ext.errors import UserError
from megatron_ext.rl.rewards import boxed, boxed_reward, outcome_reward, skill_reward
from megatron_ext.rl.scoring.contract import check_reward

COUNT = Prompt("c", "count", np.zeros(1, np.int32), NO_TILES, "3", {"skill": "count", "answer": "3"})
GOLD = "<ocr> 3 </ocr> <count> 4 </count> <ans> 7 </ans>"
COMPOSITE = Prompt(
    "m", "composite", np.zeros(1, np.int32), NO_TILES, GOLD, {"skill": "composite", "answer": GOLD, "parts": [("ocr", "3"), ("count", "4"), ("ans", "7")]}
)


def test_a_single_skill_is_right_or_wrong():
    assert skill_reward(COUNT, "3")["reward"] == 1.0
    assert skill_reward(COUNT, "4") == {"reward": 0.0, "correct": 0.0, "partial": 0.0, "format": 1.0}
    assert skill_reward(COUNT, "three")["format"] == 0.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (GOLD, 1.0),
        ("<ocr> 3 </ocr> <count> 4 </count> <ans> 8 </ans>", 0.4 * 2 / 3 + 0.1),
        ("<ocr> 3 </ocr> <count> 4 </count>", 0.4 * 2 / 3),
        ("<ocr> 1 </ocr> <count> 1 </count> <ans> 1 </ans>", 0.1),
        ("no idea", 0.0),
    ],
)
def test_a_composite_earns_parts_and_form_but_never_more_than_half(answer, reward):
    assert skill_reward(COMPOSITE, answer)["reward"] == pytest.approx(reward)


def test_the_reward_is_one_exactly_when_every_step_is_right():
    for steps in itertools.product(("3", "9"), ("4", "9"), ("7", "9")):
        text = "<ocr> {} </ocr> <count> {} </count> <ans> {} </ans>".format(*steps)
        assert (skill_reward(COMPOSITE, text)["reward"] == 1.0) == (steps == ("3", "4", "7"))


@pytest.mark.parametrize(
    ("answer", "right", "steps"),
    [
        (GOLD, 1.0, 1.0),
        ("<count>5</count><ocr>2</ocr><ans>7</ans>", 1.0, 0.0),
        ("<ocr>3</ocr><count>5</count><ans>7</ans>", 1.0, 0.5),
        ("<ocr>3</ocr><count>4</count><ans>8</ans>", 0.0, 1.0),
        ("<ocr>3</ocr><ans>7</ans>", 0.0, 0.5),
        ("7", 0.0, 0.0),
    ],
)
def test_an_outcome_is_right_by_the_final_answer_alone_in_an_answer_that_shows_steps(answer, right, steps):
    found = outcome_reward(COMPOSITE, answer)
    assert (found["reward"], found["correct"], found["steps"]) == (right, right, steps)


@pytest.mark.parametrize("answer", ["3", "4", "three", ""])
def test_the_outcome_of_a_single_skill_is_its_answer(answer):
    assert outcome_reward(COUNT, answer)["reward"] == skill_reward(COUNT, answer)["reward"] == float(answer == "3")


@given(st.text())
def test_any_text_gets_a_reward_between_0_and_1(text):
    for prompt in (COUNT, COMPOSITE):
        value, parts = read_reward(skill_reward(prompt, text))
        assert 0 <= value <= 1 and set(parts) == {"correct", "partial", "format"}


@pytest.mark.parametrize("reward", [skill_reward, outcome_reward])
def test_the_suites_rewards_keep_the_contract(reward):
    check_reward(reward)
    check_reward(reward, [COUNT, COMPOSITE])


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.int64(1), np.bool_(True), {"reward": 0.5, "style": 1}])
def test_numbers_and_dicts_of_numbers_are_rewards(value):
    total, parts = read_reward(value)
    assert isinstance(total, float) and total in (0.5, 1.0)
    assert parts == ({"style": 1.0} if isinstance(value, dict) else {})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "reward_wrong_type"),
        ("1.0", "reward_wrong_type"),
        ([1.0], "reward_wrong_type"),
        (np.ones(2), "reward_wrong_type"),
        (1j, "reward_wrong_type"),
        ({"score": 1.0}, "reward_wrong_type"),
        ({"reward": 1.0, 3: 1.0}, "reward_wrong_type"),
        ({"reward": 1.0, "style": "good"}, "reward_wrong_type"),
        (math.nan, "reward_not_finite"),
        ({"reward": math.inf}, "reward_not_finite"),
        ({"reward": 1.0, "style": math.nan}, "reward_not_finite"),
    ],
)
def test_everything_else_is_refused_with_a_reason(value, reason):
    with pytest.raises(BadReward) as error:
        read_reward(value)
    assert error.value.reason == reason


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    def write(source: str) -> str:
        name = f"user_reward_{abs(hash((source, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


def test_a_dotted_path_leads_to_the_function(user_module):
    assert load_reward("megatron_ext.rl.rewards:skill_reward") is skill_reward
    assert load_reward(user_module("def mine(prompt, text): return 2.0") + ":mine")(COUNT, "") == 2.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("skill_reward", "'skill_reward' is not of the form module:function; for example megatron_ext.rl.rewards:skill_reward"),
        ("a:b:c", "is not of the form"),
        (":mine", "is not of the form"),
        ("no_such_package.rewards:mine", "there is no module 'no_such_package'"),
        ("megatron_ext.rl.reward:mine", "there is no module 'megatron_ext.rl.reward'"),
        ("megatron_ext.rl.rewards:skil_reward", "has no 'skil_reward'; did you mean 'skill_reward'?"),
        ("megatron_ext.rl.rewards:PARTIAL_WEIGHT", "is a float, not a function"),
    ],
)
def test_a_wrong_path_says_what_is_wrong_with_it(path, message):
    with pytest.raises(UserError) as error:
        load_reward(path)
    assert error.value.where == "rl.reward" and message in str(error.value)


def test_a_module_that_cannot_be_imported_says_why(user_module):
    with pytest.raises(UserError, match=r"importing 'user_reward_\d+' fails: No module named 'not_installed_anywhere'; install what it imports"):
        load_reward(user_module("import not_installed_anywhere\ndef mine(prompt, text): return 1.0") + ":mine")
    with pytest.raises(UserError, match=r"fails: ZeroDivisionError: division by zero"):
        load_reward(user_module("1 / 0") + ":mine")


def counting_calls():
    calls = itertools.count()
    return lambda prompt, text: next(calls)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompt, text: int(text), r"raised ValueError: .* on prompt 'plain' and response ''"),
        (lambda prompt, text: math.nan, r"the reward is nan"),
        (lambda prompt, text: "good", r"the reward is a str: 'good'"),
        (lambda prompt, text: float(len(text)) if len(text) < 5000 else math.inf, r"the reward is inf on prompt 'plain' and response 'aaaa"),
        (counting_calls(), r"gave \(0.0, {}\) and then \(1.0, {}\) for the same prompt"),
    ],
    ids=["raises", "nan", "wrong type", "not finite on long text", "not deterministic"],
)
def test_a_reward_that_breaks_the_contract_is_told_where(reward, message):
    with pytest.raises(UserError, match=message):
        check_reward(reward)


def test_importing_rewards_imports_no_torch():
    code = "import sys, megatron_ext.rl.scoring.worker, megatron_ext.rl.scoring.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def prompt_of(answer: str) -> Prompt:
    return Prompt("b", "maths", np.zeros(1, np.int32), NO_TILES, answer, {"skill": "maths", "answer": answer})


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("12", r"<think>6 + 6</think> It is \boxed{12}.", 1.0),
        ("12", r"It is \boxed{12.0}", 0.9),
        ("1,200", r"<think></think>\boxed{1200}", 1.0),
        (r"\boxed{\frac{1}{2}}", r"first \boxed{3}, then $\boxed{ \frac{1}{2} }$", 0.9),
        ("B", r"<think>not A</think>\boxed{\text{B}}", 1.0),
        ("B", r"<think>not B</think>\boxed{A}", 0.1),
        ("12", "12", 0.0),
        ("12", r"\boxed{12", 0.0),
    ],
)
def test_a_boxed_answer_earns_nine_tenths_and_its_form_the_rest(answer, response, reward):
    assert boxed_reward(prompt_of(answer), response)["reward"] == pytest.approx(reward)


def test_the_last_box_counts_with_the_braces_inside_it():
    assert boxed(r"\boxed{1} \boxed{a{b}{c}}d}") == "a{b}{c}"
    assert boxed("no box") is boxed(r"\boxed{open") is None


@given(st.text() | st.text(st.sampled_from("\\boxed{}1,. $text")))
def test_a_boxed_reward_has_a_value_for_any_text(text):
    value, parts = read_reward(boxed_reward(prompt_of("1"), text))
    assert 0 <= value <= 1 and set(parts) == {"correct", "format"}


def test_the_boxed_reward_keeps_the_contract():
    check_reward(boxed_reward, [prompt_of("1")])


def half(prompt: Prompt, response: str) -> float:
    return 0.5 if response == "half" else 1 / len(response)


def test_an_answer_is_right_where_its_reward_says_so(capsys):
    """Where a part is named "correct", by it; otherwise by the total."""
    right = correctness("megatron_ext.rl.rewards:boxed_reward", 1.0)
    assert right(prompt_of("2"), r"\boxed{2}") and not right(prompt_of("2"), r"<think></think>\boxed{3}")
    mine = correctness(f"{__name__}:half", 0.5)
    assert mine(COUNT, "half") and mine(COUNT, "2") and not mine(COUNT, "333")
    assert not mine(COUNT, "")
    assert "test_rewards:half failed on prompt 'c', whose answer counts as wrong: ZeroDivisionError" in capsys.readouterr().err
