"""What an answer is worth: the rewards that come with the program, by their dotted paths `megatron_ext.rl.rewards:NAME`.

    skill_reward    the suite's, and that of your own conversations: the answer of the file, up to white space
    outcome_reward  the suite's, of a composite's final answer alone: its steps may be wrong
    boxed_reward    InternVL's: the last \\boxed{} is the answer, and a tenth for the form
    exact_match     the final answer is the prompt's, word for word
    numeric         its last number is the prompt's, whatever commas, percent signs and units stand around it; `relaxed`: within 5 %
    maths           it means the same formula, by Math-Verify
    format_reward   it is thought first and then answered
    length          it is no essay

Your own is a function of the same form (`data/rewards.py`); `combine` adds several up, and `numeric_within` and `length_within` make those with other limits:

    # my_rewards.py; rl.reward=my_rewards:reward
    reward = combine({"correct": (numeric_within(0.01), 0.9), "format": (format_reward, 0.1)})
"""

from megatron_ext.rl.rewards.answers import boxed_reward as boxed_reward
from megatron_ext.rl.rewards.answers import exact_match as exact_match
from megatron_ext.rl.rewards.final import boxed as boxed
from megatron_ext.rl.rewards.final import final_answer as final_answer
from megatron_ext.rl.rewards.form import combine as combine
from megatron_ext.rl.rewards.form import format_reward as format_reward
from megatron_ext.rl.rewards.form import length as length
from megatron_ext.rl.rewards.form import length_within as length_within
from megatron_ext.rl.rewards.maths import maths as maths
from megatron_ext.rl.rewards.numbers import numeric as numeric
from megatron_ext.rl.rewards.numbers import numeric_within as numeric_within
from megatron_ext.rl.rewards.numbers import relaxed as relaxed
from megatron_ext.rl.rewards.suite import FORMAT_WEIGHT as FORMAT_WEIGHT
from megatron_ext.rl.rewards.suite import PARTIAL_WEIGHT as PARTIAL_WEIGHT
from megatron_ext.rl.rewards.suite import outcome_reward as outcome_reward
from megatron_ext.rl.rewards.suite import skill_reward as skill_reward
