"""The collect stage's answers."""

from rlhf.config import load_config
from rlhf.models import load_encoder, load_policy
from rlhf.prompts import Prompt
from stages import collect
from tests.helpers import cpu, greedy


def test_S1_answers_are_sampled_at_collect_temperature(tmp_path, tiny_folder):
    encoder = load_encoder(str(tiny_folder))
    policy = load_policy(str(tiny_folder), encoder, "eager").eval()
    asked = [[{"role": "user", "content": f"What is {n}?"}] for n in ("red", "seven plus five", "the opposite of hot")]
    prompts = [Prompt(m, encoder.prompt_ids(m), str(i), None) for i, m in enumerate(asked)]

    def answers(temperature: float) -> list[list[str]]:
        config = load_config("configs/tiny.yaml", [f"collect.temperature={temperature}", "collect.k=2", "data.max_completion_tokens=6"])
        return collect._answers(config, cpu(), policy, encoder, prompts, 0, 1, tmp_path / str(temperature))

    assert answers(0.001) == [[encoder.decode(greedy(policy, encoder, p.ids, 6))] * 2 for p in prompts]
    assert answers(1.0) != answers(2.0) != answers(0.001) != answers(1.0)
