"""MPT, multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861).

    P_k = P * (u_k v_k^T), elementwise

P is shared by all tasks of a mixture, u_k [P] and v_k [D] are task k's. After training each P_k is a prompt by itself.
The paper first trains a prompt for each task, and has the P_k learn from these teachers: that is left out here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.methods.task_prompts import check_tasks
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count, Texts, as_tuple, check, whole
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True, init=False)
class MPT(Method):
    """A shared prompt, and a mask of low rank for each task; P D + K r (P + D) parameters.

    The masks start at 1, so that every task starts from the shared prompt. PEFT draws u and v near 0, and its prompts
    start near 0, too.

    Attributes:
      tasks: the names of the mixture's tasks, K of them. `train` fills them in from its data if there are none.
      length: positions, P.
      rank: r, of the masks: u_k is [P, r] and v_k [r, D]. The paper has 1; PEFT calls it `num_ranks`.
      initializer: how the shared prompt starts; see `prompts.initializers`.
    """

    tasks: Texts
    length: Count
    rank: Count
    initializer: Initializer

    def __init__(
        self,
        tasks: Texts = (),
        length: Count = 100,
        rank: Count = 1,
        init: Initializer = SAMPLED_VOCABULARY,
    ):
        object.__setattr__(self, "tasks", as_tuple(tasks))
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        of_prompt, of_columns = jax.random.split(key)
        prompt = start_prompt(self.initializer, of_prompt, self.length, model)
        count, width = len(self.tasks), prompt.shape[1]
        # The first of the r columns and rows is 1, which makes every mask 1. The others have random columns and rows of
        # 0, so that they add nothing at first: this is how LoRA starts. If they all started alike, their gradients
        # would be alike, and a mask of rank r would stay one of rank 1.
        columns = 0.02 * jax.random.normal(of_columns, (count, self.length, self.rank))
        return {
            "prompt": prompt,
            "columns": columns.at[:, :, 0].set(1.0),
            "rows": jnp.zeros((count, self.rank, width)).at[:, 0, :].set(1.0),
        }

    def apply(self, trained: Params, frozen: Params) -> Injection:
        masks = jnp.einsum("kpr,krd->kpd", trained["columns"], trained["rows"])
        prompts = trained["prompt"] * masks
        return Injection(task_prompts=dict(zip(self.tasks, prompts, strict=True)))

    def check(self, config: T5Config, input_length: int) -> None:
        check_tasks(self.tasks)
        check_length(self.length, input_length)
        most = min(self.length, config.emb_dim)
        check("rank", self.rank, whole(1, most, "the smaller side of the prompt"))
        super().check(config, input_length)
