"A world for tests of the RL trainer: a tiny model, episodes that it (or another) sampled, groups of them, a trainer."
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.core.types import Group, Segment, Trajectory
from kat.learn.rl import RLTrainer, make_row

EPISODE = (("user", 0), ("assistant", 0), ("tool_result", 0), ("assistant", 1))   # kinds and turns of its segments


def tiny(seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                        max_position_embeddings=64, tie_word_embeddings=True))


def score(model, ids, tau=1.0):  # plain log-probs of ids[1:]
    ids = torch.from_numpy(np.int64(ids))
    logps = torch.log_softmax(model(ids[None]).logits[0, :-1].float() / tau, -1)
    return logps[torch.arange(len(ids) - 1), ids[1:]]


def episode(model, rng, reward, task="t", tau=1.0, **info):
    lengths = [3, int(rng.integers(2, 9)), 4, int(rng.integers(2, 9))]
    ids = rng.integers(1, 12, sum(lengths))
    with torch.no_grad():
        logps = np.concatenate([[0], score(model, ids, tau).numpy()])
    segments, start = [], 0
    for n, (kind, turn) in zip(lengths, EPISODE):
        own, part = kind == "assistant", slice(start, start + n)
        segments.append(Segment(ids[part], kind, turn, own, logprobs=logps[part] if own else None))
        start += n
    return Trajectory(task, segments, reward, {"temperature": tau}, info)


def groups(model, step, n=3, rewards=(1.0, 0.0, 0.0, 1.0)):
    rng = np.random.default_rng([7, step])
    return [Group(f"{step}.{i}", [episode(model, rng, reward, f"{step}.{i}") for reward in rewards]) for i in range(n)]


def trainer(model, folder, **settings):
    return RLTrainer(model, folder, **(dict(groups_per_step=3, dtype=None, lr=1e-3, save_every=2) | settings))


def rows_of(batch, advantages):  # one advantage for each trajectory of a group, the same in all groups
    return [make_row(t, advantage) for group in batch for t, advantage in zip(group.trajectories, advantages)]


def all_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])
