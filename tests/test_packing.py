"""Packing: every trained token once, in its own context, whatever the budget and the order."""

import random

import pytest
import torch
from helpers import made_up_samples, tiny_llama

from negotiator.attention import PackedLayout
from negotiator.config import LossConfig
from negotiator.learner import Policy
from negotiator.packing import pack, padding_batch, turn_samples
from negotiator.types import Dialogue, DialogueGroup, Dilemma, Generation, PackedBatch, Persona, Scenario, Utterance


def logprobs_by_sample(model, batches: list[PackedBatch]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        hidden = model.get_decoder()(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            layout=PackedLayout(batch.segments),
            use_cache=False,
        ).last_hidden_state[0]
        all_logprobs = model.get_output_embeddings()(hidden).log_softmax(-1)
        chosen = all_logprobs.gather(1, batch.targets[:, None])[:, 0]
        for sequence in batch.sequence_ids[batch.mask].unique().tolist():
            found[sequence] = chosen[batch.mask & (batch.sequence_ids == sequence)]
    return found


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 100, 10_000])
def test_packed_logprobs_are_those_of_each_sample_alone(max_tokens):
    model, samples = tiny_llama(), made_up_samples()
    batches = pack(samples, max_tokens)
    with torch.no_grad():
        found = logprobs_by_sample(model, batches)
        model.set_attn_implementation("sdpa")
        assert found.keys() == set(range(len(samples)))
        for number, sample in enumerate(samples):
            ids = torch.tensor(sample.prompt_ids + sample.response_ids)
            rows = model(ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
            alone = rows.gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
            torch.testing.assert_close(found[number], alone, atol=2e-5, rtol=0)


def test_order_of_samples_changes_no_logprob():
    model, samples = tiny_llama(), made_up_samples()
    order = random.Random(1).sample(range(len(samples)), len(samples))
    with torch.no_grad():
        straight = logprobs_by_sample(model, pack(samples, 90))
        shuffled = logprobs_by_sample(model, pack([samples[i] for i in order], 90))
    for place, number in enumerate(order):
        torch.testing.assert_close(shuffled[place], straight[number], atol=2e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [40, 64, 100, 10_000])
def test_budget_is_kept_and_prefixes_are_shared(max_tokens):
    samples = made_up_samples()
    batches = pack(samples, max_tokens)
    longest = max(len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples)
    assert all(len(batch.input_ids) <= max(max_tokens, longest) for batch in batches)
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(len(s.response_ids) for s in samples)
    logical = sum(len(s.prompt_ids) + len(s.response_ids) - 1 for s in samples)
    assert sum(batch.logical_tokens for batch in batches) == logical
    if max_tokens == 10_000:
        prefixes = {s.prefix_key: s.prefix_len for s in samples}
        repeated = sum(s.prefix_len for s in samples) - sum(prefixes.values())
        assert len(batches) == 1
        assert len(batches[0].input_ids) == logical - repeated


def test_every_field_follows_its_token():
    samples = made_up_samples()
    for batch in pack(samples, 64):
        for row in batch.mask.nonzero()[:, 0].tolist():
            sample = samples[int(batch.sequence_ids[row])]
            place = int(batch.position_ids[row]) + 1 - len(sample.prompt_ids)
            assert batch.targets[row] == sample.response_ids[place]
            assert batch.advantages[row] == pytest.approx(sample.advantage)
            assert batch.sampling_logprobs[row] == pytest.approx(sample.sampling_logprobs[place])


def test_no_samples_give_no_batches():
    assert pack([], 100) == []


def test_turn_samples_leave_out_failed_dialogues_and_untrained_roles():
    person = Persona("P", "You are P.")
    scenario = Scenario(0, Dilemma("d", "", "", "What now?"), person, person, "pair")
    said = [
        Utterance(agent, "x", (1, 2, 3), 2, Generation((4, 5), (-1.0, -2.0), "stop", 0, 0))
        for agent in ("agent1", "agent2")
    ]
    ended = Dialogue(scenario, 0, utterances=said, state="no_agreement", advantage=-0.5)
    failed = Dialogue(scenario, 1, utterances=said, state="failed", failure="judge")
    group = DialogueGroup(scenario, [ended, failed])
    both = turn_samples([group], "both")
    assert [sample.prefix_key for sample in both] == [(0, "agent1"), (0, "agent2")]
    assert all(sample.advantage == -0.5 and sample.response_ids == (4, 5) for sample in both)
    assert [sample.prefix_key for sample in turn_samples([group], "agent1")] == [(0, "agent1")]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("max_tokens", [100, 200])
def test_every_process_gets_as_many_micro_batches_of_about_the_same_size(processes, max_tokens):
    samples = made_up_samples(groups=6, per_group=12)
    batches = pack(samples, max_tokens, processes)
    assert len(batches) % processes == 0
    sizes = [len(batch.input_ids) for batch in batches]
    assert max(sizes) <= max_tokens
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    assert sum(sizes) / len(sizes) > max(sizes) - longest, "one is larger than the others by more than a sample"
    assert sum(int(batch.mask.sum()) for batch in batches) == sum(len(s.response_ids) for s in samples)


def test_groups_are_split_only_where_balance_asks_for_it():
    samples = made_up_samples(groups=4, per_group=8)
    units = len({sample.prefix_key for sample in samples})
    prefixes = sum(batch.position_ids.eq(0).sum() for batch in pack(samples, 10**6, processes=1))
    assert prefixes == units
    assert sum(batch.position_ids.eq(0).sum() for batch in pack(samples, 10**6, processes=8)) > units


def test_padding_trains_nothing_and_reaches_every_weight():
    model = tiny_llama()
    loss, *_ = Policy(model, LossConfig(), 1.0)(padding_batch(), 10.0)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
