"""The rewards that come with the program: what counts as the same answer, by example; and any text gets a value."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.batch import NO_TILES, Prompt
from megatron_ext.data.rewards import read_reward
from megatron_ext.rl import rewards
from megatron_ext.rl.rewards import combine, exact_match, final_answer, format_reward, length, length_within, maths, numeric, numeric_within, relaxed
from megatron_ext.rl.scoring.contract import check_reward

BUILT_IN = ("exact_match", "numeric", "relaxed", "maths", "format_reward", "length", "boxed_reward", "skill_reward", "outcome_reward")


def prompt_of(answer: str) -> Prompt:
    return Prompt("p", "maths", np.zeros(1, np.int32), NO_TILES, answer, {"skill": "maths", "answer": answer})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_keeps_the_contract(name):
    check_reward(getattr(rewards, name), [prompt_of("12"), prompt_of(r"\frac{1}{2}"), prompt_of("red"), prompt_of("")])


MARKS = st.text(st.sampled_from([*r"\boxed{}<think>/answer0123456789.,-−%$^!()+=_ xkm", "\n", "½", "\x00"]), max_size=60)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "maths"])
@given(text=st.text() | MARKS, gold=st.sampled_from(["12", "50 %", "5 km", "red", ""]))
def test_any_text_gets_a_value_between_0_and_1(name, text, gold):
    assert 0 <= read_reward(getattr(rewards, name)(prompt_of(gold), text))[0] <= 1


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=30) | MARKS)
def test_any_text_has_a_verdict_as_a_formula(text):
    assert read_reward(maths(prompt_of(r"\frac{1}{2}"), text))[0] in (0, 1)


def test_the_final_answer_is_what_is_marked_as_one():
    assert final_answer(r"<think>\boxed{1}</think> so \boxed{2} or \boxed{3}.") == "3"
    assert final_answer("<answer>a</answer> no: <answer> b </answer>") == "b"
    assert final_answer("<think>a</think>\nb<|im_end|>") == "b"
    assert final_answer(r"\boxed{open") == r"\boxed{open" and final_answer("<answer>open") == "open"


def test_an_exact_match_is_exact_up_to_white_space():
    assert exact_match(prompt_of("dark  red"), "<answer>\ndark red </answer>") == 1
    assert exact_match(prompt_of("red"), "Red") == exact_match(prompt_of("red"), "red.") == exact_match(prompt_of("red"), "") == 0


SAME = [
    *[("1,200", said) for said in ("1200", "1 200", "$1,200.00", "It is 1200.", "1.2e3", "<answer>1,200</answer>")],
    *[("50%", said) for said in ("50", "50 %", "0.5", "1/2", r"50\%", "about 50 percent")],
    *[("50", said) for said in ("50%", "50.0", "50 apples")],
    ("0.5", "50%"),
    ("-3", "x = −3"),
    ("-3", "- 3"),
    (r"\frac{3}{4}", "0.75"),
    ("0.75", r"\boxed{\frac{3}{4}}"),
    *[("5 km", said) for said in ("5", "5000 m", "5 kilometers.", "5 kilometres", r"5\text{ km}", "500000cm")],
    ("90 s", "1.5 minutes"),
    ("3", "first 1, then 2, so 3"),
    ("1", "<think>7</think> 1"),
]
OTHER = [
    *[("1,200", said) for said in ("1,201", "12", "", "none", "1.2", "9" * 5000)],
    *[("50%", said) for said in ("0.5%", "5", "5000%", "500")],
    ("50", "0.5"),
    *[("5 km", said) for said in ("5 m", "5 kg", "5 hours")],
    ("-3", "3"),
    ("4", "3-4 is -1"),
    ("2", "H2O"),
    ("7", "1/0"),
    ("red", "1"),
    ("0", "0.1"),
]


@pytest.mark.parametrize(("gold", "said"), SAME)
def test_the_same_number_written_otherwise_is_right(gold, said):
    assert numeric(prompt_of(gold), said) == 1


@pytest.mark.parametrize(("gold", "said"), OTHER)
def test_another_number_is_wrong(gold, said):
    assert numeric(prompt_of(gold), said) == 0


def test_a_tolerance_is_a_share_of_the_right_number():
    assert numeric(prompt_of("3.14159"), "3.1415") == 1 and numeric(prompt_of("3.14159"), "3.14") == 0
    assert relaxed(prompt_of("200"), "209") == 1 and relaxed(prompt_of("200"), "215") == 0
    assert numeric_within(0.2)(prompt_of("200"), "215") == 1


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        (r"\frac{1}{2}", r"\boxed{0.5}"),
        (r"\sqrt{8}", r"<think>hm</think> It is \boxed{2\sqrt{2}}."),
        ("(x+1)^2", r"\boxed{x^2 + 2x + 1}"),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
        ("x=3", r"\boxed{3}"),
        (r"$\pi/2$", r"\boxed{\dfrac{\pi}{2}}"),
        ("1,200", "1200"),
        ("1200", r"\boxed{\$1,200}"),
        ("B", r"\boxed{\text{B}}"),
        (r"\boxed{10!}", r"\boxed{3628800}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}"),
    ],
)
def test_formulas_that_mean_the_same_are_the_same_answer(gold, said):
    assert maths(prompt_of(gold), said) == {"reward": 1.0, "correct": 1.0}


@pytest.mark.parametrize(
    ("gold", "said"),
    [(r"\frac{1}{2}", r"\boxed{2}"), ("x+1", r"\boxed{x-1}"), ("(1,2)", r"\boxed{(2,1)}"), ("B", r"\boxed{A}"), ("3", ""), ("3", r"\boxed{}"), ("x", "y")],
)
def test_formulas_that_mean_something_else_are_wrong(gold, said):
    assert maths(prompt_of(gold), said)["reward"] == 0


HOSTILE = [
    r"\boxed{\binom{99999999}{5000000}}",
    r"\boxed{\gcd(10^{10^{10}},3)}",
    r"\boxed{99999999!}",
    r"\boxed{\sum_{i=1}^{1000000000} i!}",
    "\\boxed{" + "{" * 300 + "}" * 300 + "}",
    "(" * 300,
    "\\boxed{" + "9" * 5000 + "}",
    r"\boxed{__import__('os').abort()}",
]


@pytest.mark.parametrize("said", HOSTILE, ids=[text[:24] for text in HOSTILE])
def test_what_would_keep_the_checker_busy_is_refused_at_once(said):
    """Each of these takes seconds to for ever when it is worked out."""
    assert maths(prompt_of("1"), said)["reward"] == 0


def test_a_tower_of_powers_is_given_up_and_wrong(monkeypatch):
    monkeypatch.setattr(sys.modules["megatron_ext.rl.rewards.maths"], "MOST_CPU_S", 0.3)
    assert maths(prompt_of("1"), r"\boxed{9^{9^{9^{9}}}}")["reward"] == 0
    assert maths(prompt_of("9"), r"\boxed{3^2}")["reward"] == 1  # and the next is judged as ever


def test_formulas_are_compared_in_threads_too():
    """Where no signal can end it; the caller's own limit does."""
    found = []
    thread = threading.Thread(target=lambda: found.append(maths(prompt_of(r"\frac{1}{2}"), r"\boxed{\frac{2}{4}}")["reward"]))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_no_answer_is_evaluated_as_python(tmp_path):
    """The checker's reader for plain expressions is Python's own `eval`; only its grammar of LaTeX is used."""
    mark = tmp_path / "was_run"
    for said in (f"open('{mark}','w')", f"\\boxed{{open('{mark}','w')}}", f"$open('{mark}','w')$", f"eval(\"open('{mark}','w')\")"):
        assert maths(prompt_of("1"), said)["reward"] == 0
    assert not mark.exists()


def test_the_checker_is_loaded_when_it_is_first_asked():
    code = "import sys, megatron_ext.rl.rewards; sys.exit('sympy' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("  <think>a</think>\n\n<answer>\nb </answer>\n<|im_end|>", 1),
        (r"<think>a</think> so it is \boxed{b}.", 1),
        ("<think>a</think> b", 0),
        ("<think> </think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        (r"<think>a</think> \boxed{}", 0),
        ("<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> or c", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("hm <think>a</think><answer>b</answer>", 0),
    ],
)
def test_the_form_is_a_thought_and_then_an_answer(text, reward):
    assert format_reward(prompt_of("b"), text) == reward


def test_length_falls_from_the_limit_to_its_double():
    assert [length_within(4)(prompt_of(""), " ".join("a" * words)) for words in (0, 4, 5, 6, 8, 9)] == [1, 1, 0.75, 0.5, 0, 0]
    assert length(prompt_of(""), "word " * 256) == 1 and length(prompt_of(""), "word " * 512) == 0


def test_rewards_add_up_under_their_names():
    both = combine({"correct": (numeric, 0.9), "format": (format_reward, 0.1)})
    assert both(prompt_of("7"), "7") == {"reward": 0.9, "correct": 1.0, "format": 0.0}
    assert both(prompt_of("7"), "<think>3 + 4</think><answer>7</answer>")["reward"] == pytest.approx(1.0)
    check_reward(both, [prompt_of("7")])
