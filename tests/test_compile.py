"""model.compile: blocks that go through torch.compile compute what they computed, keep their names, and are sampled from as written."""

import pytest
import torch

import rlhf.models
from rlhf.encoding import Encoder
from rlhf.models import add_lora, compile_blocks, load_encoder, load_policy, save_model
from rlhf.passes import make_rows, policy_pass
from rlhf.sampling import draw_uniforms, sample
from rlhf.shared_prompts import can_share
from tests.helpers import llama, nano, some_prompts, tiny_encoder
from tests.test_shared_prompts import MODELS, reward_model

ENCODER: Encoder = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 8)


@pytest.fixture()
def graphs(monkeypatch):
    """What torch.compile was given to compile, which then runs as it is."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(rlhf.models, "COMPILE", {"dynamic": True, "backend": backend})
    monkeypatch.setattr(rlhf.models.shutil, "which", lambda name: f"/usr/bin/{name}")
    yield seen
    torch._dynamo.reset()


def passes(policy, sizes=(3, 5, 8)):
    """Log-probabilities of batches of different shapes."""
    return [policy_pass(policy, make_rows(PROMPTS[:n], [PROMPTS[-1][:n]] * n, ENCODER.pad_id, "cpu"), 1.0)[0] for n in sizes]


@pytest.mark.parametrize(("kind", "parts"), [(nano, 1), (llama, 1), (lambda encoder: add_lora(llama(encoder), 2, 4, "CAUSAL_LM"), 2)])
def test_one_graph_serves_all_blocks_and_shapes_and_changes_nothing(kind, parts, graphs):
    """Adapters break it in two."""
    policy = kind(ENCODER).eval()
    names, plain = set(policy.state_dict()), passes(policy)
    compile_blocks(policy, True)
    for found, wanted in zip(passes(policy), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert set(policy.state_dict()) == names
    assert len(graphs) == parts, "not one for each of the two blocks, nor for each of the three shapes"


def test_gradients_are_those_of_blocks_that_were_not_compiled(graphs):
    gradients = []
    for wanted in (False, True):
        policy = llama(ENCODER)
        compile_blocks(policy, wanted)
        sum(part.sum() for part in passes(policy)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert graphs and (gradients[1] - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max()


def test_sampling_compiles_nothing_and_a_saved_model_is_a_plain_one(graphs, tmp_path):
    policy, uniforms = llama(ENCODER).eval(), draw_uniforms(len(PROMPTS), 6, 1)
    wanted = sample(policy, PROMPTS, uniforms, ENCODER, 1.0, 8)
    compile_blocks(policy, True)
    assert sample(policy, PROMPTS, uniforms, ENCODER, 1.0, 8) == wanted and not graphs
    assert len(passes(policy)) == 3 and graphs, "afterwards they are compiled as before"
    save_model(policy, ENCODER, tmp_path)
    loaded = load_policy(str(tmp_path), load_encoder(str(tmp_path)), "eager")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters(), strict=True))


def test_whether_a_prompt_can_be_shared_is_tried_without_compiling(graphs):
    model = reward_model(MODELS["llama"])
    compile_blocks(model, True)
    assert can_share(model, 0) and not graphs


def test_without_a_compiler_training_goes_on_and_says_so(graphs, monkeypatch, capsys):
    monkeypatch.setattr(rlhf.models.shutil, "which", lambda name: None)
    policy = llama(ENCODER).eval()
    compile_blocks(policy, True)
    passes(policy)
    assert not graphs and "no C++ compiler" in capsys.readouterr().out


def test_nothing_is_compiled_unless_asked_for(graphs):
    policy = llama(ENCODER).eval()
    compile_blocks(policy, False)
    passes(policy)
    assert not graphs
