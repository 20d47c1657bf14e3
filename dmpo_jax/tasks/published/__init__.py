"""What the published code of DMPO and d1 does with text: its rewards, its graders and its prompts, oddities included.

Facts of github.com/yuchen-zhu-zyc/DMPO (96af1a4) and github.com/dllm-reasoning/d1 (837888f), written anew and without
`eval`, so that runs can be compared with theirs. The tasks' own rewards and graders, beside this folder, are the
corrected ones.
"""

from dmpo_jax.tasks.published.graders import GRADERS
from dmpo_jax.tasks.published.rewards import RANGES, REWARDS, TRAINED_WITH, score

__all__ = ["GRADERS", "RANGES", "REWARDS", "TRAINED_WITH", "score"]
