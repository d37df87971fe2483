"""The collect stage's answers."""

import pytest

from rlhf.config import load_config
from rlhf.errors import InputError
from rlhf.jsonl import write_jsonl
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


def test_each_round_asks_training_prompts_of_its_own_and_the_first_says_where_they_do_not_last(tmp_path, tiny_folder):
    encoder = load_encoder(str(tiny_folder))
    for split, count in (("train", 5), ("eval", 3)):
        write_jsonl(tmp_path / "data" / "prompts" / f"{split}.jsonl",
                    ({"prompt": [{"role": "user", "content": f"What is {n}?"}], "id": f"{split} {n}"} for n in range(count)))

    def asked(number: int, each: int, rounds: int) -> dict[str, list[str]]:
        config = load_config("configs/tiny.yaml", [f"run.dir={tmp_path}", f"collect.prompts={each}", "collect.eval_prompts=2",
                                                   f"pipeline.rounds={rounds}"])
        return {split: [p.id for p in prompts] for split, prompts in collect._prompts(config, encoder, number).items()}

    assert asked(1, 7, 1) == {"train": [f"train {n}" for n in range(5)], "eval": ["eval 0", "eval 1"]}
    assert [asked(number, 2, 3)["train"] for number in (1, 2, 3)] == [["train 0", "train 1"], ["train 2", "train 3"], ["train 4"]]
    assert asked(3, 2, 3)["eval"] == ["eval 0", "eval 1"]
    with pytest.raises(InputError, match=r"found 5 training prompts, which collect.prompts=5 uses up before the last of pipeline.rounds=2; lower"):
        asked(1, 5, 2)
