"""The rewards, graders and prompts of the published code of DMPO and d1, including their oddities.

They behave as github.com/yuchen-zhu-zyc/DMPO (96af1a4) and github.com/dllm-reasoning/d1 (837888f), rewritten without
`eval`, so that runs can be compared with theirs. The default rewards and graders of the tasks are corrected ones.
"""

from dmpo_jax.tasks.published.graders import GRADERS
from dmpo_jax.tasks.published.rewards import RANGES, REWARDS, TRAINED_WITH, score

__all__ = ["GRADERS", "RANGES", "REWARDS", "TRAINED_WITH", "score"]
