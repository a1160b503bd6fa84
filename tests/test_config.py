"""The configuration: precedence, round trip, and one sentence with exit code 2 for every kind of mistake."""

from pathlib import Path

import pytest
import yaml

from negotiator.config import (
    Config,
    OneSentenceParser,
    add_config_arguments,
    config_overrides,
    dump_config,
    load_config,
)


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\noptimizer: {lr: 1e-4, warmup_steps: 3}\n")
    config = load_config(file, {"optimizer.lr": 0.5, "dialogue.window": "all"})
    assert (config.steps, config.optimizer.lr, config.optimizer.warmup_steps) == (7, 0.5, 3)
    assert config.dialogue.window == "all"
    assert config.rollout == Config().rollout


def test_a_dumped_config_loads_as_itself(tmp_path):
    config = load_config(None, {"data.dilemmas": "mine.jsonl", "optimizer.betas": [0.8, 0.9], "dialogue.window": 4})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml", {}) == config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"optimizer.lrr": 1}, "unknown key optimizer.lrr"),
        ({"optimiser.lr": 1}, "unknown key optimiser"),
        ({"optimizer.lr": -1}, "optimizer.lr: input should be greater than 0, not -1"),
        ({"steps": "many"}, "steps: input should be a valid integer"),
        ({"rollout.group_size": 1}, "rollout.group_size"),
        ({"dialogue.window": 0}, "window must be 'all' or at least 1"),
        ({"judge.reward": "openai"}, "an openai judge needs judge.url"),
        ({"judge.agreement": "locale"}, "agreement must be local, openai or module:function, not 'locale'"),
        ({"model.dtype": "fp8"}, "model.dtype"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(overrides, says):
    with pytest.raises(ValueError) as caught:
        load_config(None, overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"), [("[1, 2]", "keys and values"), ("a: [", "not valid YAML"), ("model: 3", "model")]
)
def test_a_bad_file_is_named(tmp_path, text, says):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        load_config(file, {"model.path": "x"})


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no config file at nowhere\.yaml"):
        load_config(Path("nowhere.yaml"), {})


def test_every_field_is_explained_and_can_be_given_on_the_command_line():
    parser = OneSentenceParser()
    add_config_arguments(parser)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    flat = {}
    for key, value in yaml.safe_load(dump_config(Config())).items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    assert actions.keys() == flat.keys()
    assert all(action.help and len(action.help) > 20 for action in actions.values())
    given = parser.parse_args(["--optimizer.lr", "1e-3", "--dialogue.window", "all", "--name", "a"])
    assert load_config(None, config_overrides(given)).optimizer.lr == 1e-3


def test_unknown_and_abbreviated_options_exit_with_2(capsys):
    parser = OneSentenceParser()
    add_config_arguments(parser)
    for argument in ("--optimizer.nope", "--optimizer.weight"):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([argument, "1"])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: unrecognized arguments: {argument}")


def test_presets_load():
    presets = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert presets
    for preset in presets:
        assert isinstance(load_config(preset, {}), Config)
