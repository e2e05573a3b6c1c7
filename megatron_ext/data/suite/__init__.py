"""The procedural skill suite: scenes with ground truth, balanced questions, exact checkers. Everything is drawn from a seed, nothing is downloaded.

levels   what scenes may hold            queries    what can be asked, and the answer        captions  what pretraining says about a scene
scene    scenes, splits, building        skills     balanced drawing of single questions     draw      conversations and prompts
sprites, render   pixels and boxes       composite  questions of two steps                   check     verdicts on answers
                                         wrong      a right and a wrong answer
"""

from megatron_ext.data.suite.check import Verdict, check
from megatron_ext.data.suite.draw import ALL_SKILLS, KINDS, Dialogue, chance, draw_conversation, draw_dialogue, draw_prompts
from megatron_ext.data.suite.skills import SKILLS

__all__ = ["ALL_SKILLS", "KINDS", "SKILLS", "Dialogue", "Verdict", "chance", "check", "draw_conversation", "draw_dialogue", "draw_prompts"]
