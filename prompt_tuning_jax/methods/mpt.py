"""MPT, multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861).

    P_k = P * (u_k v_k^T), elementwise

P is shared by all tasks of a mixture, u_k [P] and v_k [D] belong to task k. After training, each P_k is a prompt by
itself. The paper first trains a prompt for each task, and distils these teachers into the P_k: that is left out here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.methods.task_prompts import check_tasks
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count, Texts, as_tuple, check, integer
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True, init=False)
class MPT(Method):
    """Trains a shared prompt and a low-rank mask per task: P D + K r (P + D) parameters.

    The masks start at 1, so every task starts with the shared prompt. PEFT draws u and v near 0, so its prompts start
    near 0, too.

    Attributes:
      tasks: the names of the mixture's K tasks. `train` fills them in from its data if there are none.
      length: number of prompt positions, P.
      rank: rank of the masks, r: u_k is [P, r] and v_k [r, D]. The paper uses 1; PEFT calls it `num_ranks`.
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
        # The first of the r columns and rows is 1, so that every mask is 1. The others have random columns and zero
        # rows, as LoRA starts, so that they add nothing at first. If all of them started equal, they would have equal
        # gradients, and the mask would keep rank 1.
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
        check("rank", self.rank, integer(1, most, "the smaller side of the prompt"))
        super().check(config, input_length)
