"""`ctxcomp train`: one YAML file makes a compressor, in the same weights however often it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.chunking import Chunk
from ctxcomp_rag.cli import app
from ctxcomp_rag.compressors import load_compressor
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.training.config import load_config
from ctxcomp_rag.training.monitor import HeldOut, PlateauMonitor
from ctxcomp_rag.training.run import train
from tests.tiny_models import save_tiny

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXT = " ".join(f"The lamp number {i} of Varn is red and its keeper is called Osk." for i in range(12))
ASKED = [{"context": f"The lamp {i} is red. It stands in Varn.", "question": "Where?", "answers": ["in Varn"]}
         for i in range(6)]
STANDING = {"learning_rate": 1e-12}
"""Nothing changes, so the second evaluation is no better than the first."""


@pytest.fixture(autouse=True)
def _another_process() -> None:
    """A run has a process of its own; accelerate keeps the first one's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def settings(decoder: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, ASKED)))
    return {
        "out": str(tmp_path / "run"), "model": str(decoder), "save_every": 2, "seed": 3, "optimizer": "muon",
        "compressor": {"segment_tokens": 64, "factor": 4, "memory_tokens": 1, "lora_rank": 2},
        "data": {"texts": {"path": str(tmp_path / "texts"), "context_tokens": 40},
                 "asked": {"kind": "questions", "path": str(tmp_path / "asked.jsonl")}},
        "held_out": {"data": "texts", "examples": 1, "every": 2},
        "stages": [
            {"name": "copy", "steps": 3, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 0,
             "sources": [{"objective": "autoencoding", "data": "texts", "factors": [1, 2]}]},
            {"name": "all", "steps": 4, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0, "sources": [
                {"objective": "continuation", "data": "texts", "factors": [4]},
                {"objective": "question", "data": "asked", "factors": [2, 4], "max_spans": 2},
                {"objective": "distillation", "data": "asked", "weight": 2, "max_spans": 2}]}]}


def written(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def log(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


class Killed(Exception):
    pass


def test_a_killed_command_ends_where_an_uninterrupted_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    path = written(settings, tmp_path)
    done = CliRunner().invoke(app, ["train", str(path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["compressor"] == str(tmp_path / "run" / "compressor")
    other = tmp_path / "killed"
    steps = 0

    def kill(record: dict[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Killed

    with pytest.raises(Killed):
        train(load_config(path, [f"out={other}"]), kill)
    again = CliRunner().invoke(app, ["train", str(path), "--set", f"out={other}"])
    assert again.exit_code == 0, again.output
    one, two = (load_file(f / "compressor" / "adapter_model.safetensors") for f in (tmp_path / "run", other))
    assert one.keys() == two.keys()
    assert all(one[k].equal(two[k]) for k in one)
    assert log(tmp_path / "run") == log(other)
    head, *records = log(tmp_path / "run")
    assert (head["seed"], head["optimizer"], head["compressor"]["factor"]) == (3, "muon", 4.0)
    assert len(head["stages"][0]["sources"][0]["data"]) == 64
    assert [r["step"] for r in records if "held_out" in r] == [1, 1, 3]
    assert set(records[-1]["losses"]) <= {"0.GoingOn", "1.Answering", "2.Distilling"}
    with pytest.raises(InputError, match="begun with another compressor"):
        train(load_config(path, [f"out={other}", "compressor.factor=2"]))


def test_what_was_trained_is_loaded_by_the_product(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["stages"] = settings["stages"][:1]
    folder = train(load_config(written(settings, tmp_path)))
    compressor = load_compressor(folder, load_frozen(settings["model"]))
    assert (compressor.compression_factor, compressor.max_chunk_tokens) == (4.0, 64)


def test_a_nested_compressor_goes_on_from_one_that_is_not(settings: dict[str, Any], tmp_path: Path) -> None:
    """Samples are drawn at every factor, and the result reads its spans at each of them."""
    settings["stages"] = [{**settings["stages"][0], "steps": 1}]
    first = train(load_config(written(settings, tmp_path)))
    begun = {"start": str(first), "nested": [4, 8]}
    settings |= {"out": str(tmp_path / "nested"), "compressor": begun, "held_out": None}
    settings["stages"][0] = {**settings["stages"][0], "steps": 2,
                             "sources": [{"objective": "question", "data": "asked"}]}
    compressor = load_compressor(train(load_config(written(settings, tmp_path))), load_frozen(settings["model"]))
    assert compressor.spec.nested == (4.0, 8.0)
    assert log(tmp_path / "nested")[0]["stages"][0]["sources"][0]["factors"] == [4.0, 8.0]
    span = compressor.compress([Chunk("d", TEXT[:60], 0, 60, 1)])[0]
    assert span.first(compressor.spec.slot_counts(span)[8.0]).num_slots < span.num_slots
    with pytest.raises(InputError, match=r"nested factors that ascend from the compression factor 8, got \(8.0, 4.0\)"):
        train(load_config(written(settings, tmp_path), [f"out={tmp_path / 'other'}", "compressor.nested=[8, 4]"]))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_loss_falls_with_checkpointed_gradients_and_in_bf16(precision: str, settings: dict[str, Any],
                                                                tmp_path: Path) -> None:
    settings |= {"gradient_checkpointing": True, "mixed_precision": precision, "held_out": None, "optimizer": "adamw"}
    settings["stages"] = [{**settings["stages"][0], "steps": 25, "batch_size": 3, "learning_rate": 0.02,
                           "sources": [{"objective": "question", "data": "asked"}]}]
    train(load_config(written(settings, tmp_path)))
    losses = [r["loss"] for r in log(tmp_path / "run")[1:]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_checkpointing_changes_no_weight(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["stages"] = [{**settings["stages"][0], "steps": 2}]
    path = written(settings, tmp_path)
    made = [load_file(train(load_config(path, [f"out={tmp_path / str(on)}", f"gradient_checkpointing={on}"]))
                      / "adapter_model.safetensors") for on in (False, True)]
    assert all(made[0][k].allclose(made[1][k], atol=1e-6) for k in made[0])


def test_pcc_and_tensorboard(settings: dict[str, Any], decoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    encoder = save_tiny("gpt2", tmp_path / "encoder")
    settings |= {"compressor": {"method": "pcc", "encoder": str(encoder), "segment_tokens": 32, "factor": 4},
                 "tensorboard": True, "held_out": None}
    settings["stages"] = [{**settings["stages"][1], "steps": 2,
                           "sources": [{"objective": "distillation", "data": "asked"}]}]
    folder = train(load_config(written(settings, tmp_path)))
    assert load_compressor(folder, load_frozen(decoder)).compression_factor == 4.0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    settings["stages"][0]["sources"][0]["factors"] = [8]
    with pytest.raises(InputError, match="8x"):
        train(load_config(written({**settings, "out": str(tmp_path / "other")}, tmp_path)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_valid_configuration(path: Path) -> None:
    config = load_config(path)
    assert config.stages
    shipped = {"nested", "icae-paper", "pcc-paper-lite", "pcc-paper-large", "your-decoder-24gb"}
    assert shipped <= {p.stem for p in RECIPES}


@pytest.mark.parametrize(("overrides", "message"), [
    (["optimiser=muon"], "there is no setting optimiser; did you mean optimizer?"),
    (["stages.0.learning_rte=1"], "no setting stages.0.learning_rte; did you mean stages.0.learning_rate?"),
    (["compressor.method=ikae"], "compressor.method"),
    (["stages.0.sources.0.data=text"], "no data set 'text' under `data`; did you mean 'texts'?"),
    (["stages.0.name=all"], "stages need names of their own, got all, all"),
    (["stages.0.steps=many"], 'wrong value type for field "stages.steps"'),
    (["stages.9.steps=1"], "names nothing in the configuration .* lists are numbered from 0"),
    (["seed"], "expected NAME=VALUE"),
    (["data.texts.id=a/b"], "either a path or an id"),
    (["compressor.method=pcc"], "a pcc compressor needs an encoder"),
    (["compressor.method=pcc", "compressor.encoder=x", "compressor.nested=[4]"], "nested spans are made by icae"),
    (["stages.0.sources.0.objective=autoencodin"], "expected 'autoencoding' or 'continuation' or .* in "
     "stages.0.sources.0.objective, got 'autoencodin'; did you mean 'autoencoding'?"),
    (["optimizer=moun"], "expected 'adamw' or 'muon' in optimizer, got 'moun'; did you mean 'muon'?"),
    (["mixed_precision=no"], "expected 'no' or 'bf16' in mixed_precision, got False"),
    (["stages.0.steps=0"], "the stage 'copy': expected steps to be a number of at least 1, got 0"),
    (["stages.0.batch_size=0"], "the stage 'copy': expected batch_size to be .* at least 1, got 0"),
    (["stages.0.warmup_steps=-1"], "the stage 'copy': expected warmup_steps to be .* at least 0, got -1"),
    (["stages.0.learning_rate=0.0"], "the stage 'copy': expected learning_rate to be a number above 0, got 0"),
    (["stages.0.learning_rate=.nan"], "expected learning_rate to be a number above 0, got nan"),
    (["stages.1.sources.1.max_spans=0"], "the source 'question' of 'asked': expected max_spans .* at least 1, got 0"),
    (["stages.1.sources.1.factors=[0.5]"], "'question' of 'asked': expected factors .* at least 1, got 0.5"),
    (["stages.1.sources.1.weight=-1.0"], "'question' of 'asked': expected weight .* at least 0, got -1"),
    (["stages.1.sources.1.weight=.inf"], "expected weight to be a number of at least 0, got inf"),
    (["stages.0.sources.0.weight=0.0"], "the stage 'copy': every source has the weight 0"),
    (["save_every=0"], "expected save_every to be .* at least 1, got 0"),
    (["max_grad_norm=0.0"], "expected max_grad_norm to be a number above 0, got 0"),
    (["held_out.every=0"], "held_out: expected every .* at least 1, got 0"),
    (["held_out.examples=0"], "held_out: expected examples .* at least 1, got 0"),
    (["held_out.patience=-1"], "held_out: expected patience .* at least 0, got -1"),
    (["data.texts.limit=0"], "the data of .*texts': expected limit .* at least 1, got 0"),
    (["data.texts.context_tokens=-5"], "the data of .*texts': expected context_tokens .* at least 1, got -5"),
    (["compressor.factor=0.5"], "compressor: expected factor .* at least 1, got 0.5"),
    (["compressor.factor=65"], "a segment of 64 tokens has no slot at factor 65"),
    (["compressor.lora_rank=0"], "compressor: expected lora_rank .* at least 1, got 0"),
    (["compressor.memory_tokens=0"], "compressor: expected memory_tokens .* at least 1, got 0"),
    (["compressor.lora_targets=[]"], "lora_targets names no module"),
])
def test_settings_that_cannot_be_are_named(overrides: list[str], message: str, settings: dict[str, Any],
                                           tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_config(written(settings, tmp_path), overrides)


@pytest.mark.parametrize(("record", "message"), [
    ({"question": "Where?", "answer": "x"}, "line 1: expected a field 'context', found 'question', 'answer'"),
    ({"context": "x", "question": "Where?", "answer": " "}, "line 1: expected a non-empty answer in 'answer'"),
    ({"context": "x", "question": "Where?", "answers": []}, "line 1: expected a non-empty answer"),
    ({"context": "x", "question": "", "answer": "x"}, "line 1: expected text in 'question', got ''"),
    ({"context": "long " * 60, "question": "Where?", "answer": "x"}, "gives no example of at most 64 tokens"),
])
def test_records_that_cannot_be_trained_on_are_named(record: dict[str, Any], message: str, settings: dict[str, Any],
                                                     tmp_path: Path) -> None:
    path = written(settings, tmp_path)
    (tmp_path / "asked.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        train(load_config(path))


@pytest.mark.parametrize(("overrides", "message"), [
    (["compressor.segment_tokens=500"], "segments of 500 tokens with 125 slots do not fit the 512 positions"),
    (["stages.0.sources.0.objective=question"], "needs question and answer, which the data set 'texts' has not"),
    (["stages.0.sources.0.data=asked", "stages.0.sources.0.objective=continuation"], "use data of kind texts"),
    (["data.texts.path=nowhere"], "there is no file or folder 'nowhere'"),
    (["held_out.examples=1000"], "nothing of the data set 'texts' is left to train on"),
    (["compressor.lora_targets=[q_proj, c_attn]"], "no module 'c_attn' for lora_targets; it has .*k_proj, .*v_proj"),
    (["out=run.yaml/run"], "expected a folder in `out`, but 'run.yaml' is a file"),
    (["stages.0.frozen=[encodr]"], "the stage 'copy' freezes 'encodr', .* the nearest are encoder"),
])
def test_data_and_decoder_that_do_not_fit_are_named(overrides: list[str], message: str, settings: dict[str, Any],
                                                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(settings, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        train(load_config(path, overrides))


def test_the_squad_file_and_a_context_longer_than_a_segment(settings: dict[str, Any], tmp_path: Path) -> None:
    from ctxcomp_rag.training.data import load_examples

    config = load_config(written(settings, tmp_path))
    tokenizer = load_frozen(config.model).tokenizer
    qas = [{"question": " Who? ", "answers": [{"text": "Osk"}]}, {"question": "None?", "answers": []}]
    squad = {"data": [{"paragraphs": [{"context": "The tower is tall. " * 8 + "Osk lives there.", "qas": qas}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    data = load_config(written(settings, tmp_path), [
        f"data.squad={{kind: squad, path: {tmp_path / 'squad.json'}}}"]).data["squad"]
    [example], left_out = load_examples(data, tokenizer, 40)
    assert left_out == 0
    assert (example.question, example.answer) == ("Who?", " Osk")
    assert "Osk" in example.context
    assert len(tokenizer.encode(example.context)) <= 40


@pytest.mark.parametrize(("loss", "advice"), [(1.9, "reads nothing from the slots"), (0.4, "hold most of the text"),
                                              (0.05, None)])
def test_a_plateau_gets_the_advice_that_goes_with_its_height_once(loss: float, advice: str | None) -> None:
    monitor = PlateauMonitor(window=10)
    said = [monitor.advice({"stage": "one", "step": i, "losses": {"0.Repeating": loss}}) for i in range(30)]
    told = [s for s in said if s]
    assert len(told) == (advice is not None)
    if advice:
        assert advice in told[0]
        assert said[9] == told[0]
    falling = [monitor.advice({"stage": "two", "step": i, "losses": {"0.Repeating": 2.0 - 0.02 * i}})
               for i in range(30)]
    assert not any(falling)


@pytest.mark.parametrize("name", ["0.GoingOn", "1.Answering", "2.Distilling"])
def test_only_reconstruction_is_judged_by_the_height_of_its_plateau(name: str) -> None:
    monitor = PlateauMonitor(window=10)
    for loss in (3.1, 0.3):
        assert not any(monitor.advice({"stage": "one", "step": i, "losses": {name: loss}}) for i in range(30))


def test_a_stage_ends_when_the_held_out_loss_has_not_fallen_for_a_while() -> None:
    held_out = HeldOut(lambda _: pytest.fail("not asked"), [], every=1, patience=2)
    assert not held_out.stops([3.0, 2.0, 2.5])
    assert held_out.stops([3.0, 2.0, 2.5, 2.0])
    assert not HeldOut(lambda _: pytest.fail("not asked"), [], every=1, patience=0).stops([1.0, 2.0, 3.0])


def test_early_stopping_goes_on_with_the_next_stage(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["held_out"] |= {"every": 1, "patience": 1}
    settings["stages"][0] |= {"steps": 50, **STANDING}
    seen: list[dict[str, Any]] = []
    train(load_config(written(settings, tmp_path)), seen.append)
    assert [(r["stage"], r["ended"]) for r in seen][:3] == [("copy", False), ("copy", True), ("all", False)]


def test_a_stage_that_trains_no_reconstruction_is_not_ended_by_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """It is measured there all the same."""
    settings["held_out"] |= {"every": 1, "patience": 1}
    settings["stages"] = [{**settings["stages"][1], **STANDING}]
    seen: list[dict[str, Any]] = []
    train(load_config(written(settings, tmp_path)), seen.append)
    assert [(r["step"], r["ended"], "held_out" in r) for r in seen] == [(i, False, True) for i in (1, 2, 3, 4)]


def test_what_of_the_data_is_not_trained_on_is_said_and_logged(settings: dict[str, Any], tmp_path: Path) -> None:
    lost = {"context": "long " * 60, "question": "Where?", "answer": "x"}
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, [*ASKED, lost])))
    (tmp_path / "texts" / "a.txt").write_text("A short text.")
    (tmp_path / "texts" / "b.txt").write_text(" ".join(f"w{i:03}" for i in range(90)))
    settings["stages"] = [{**settings["stages"][1], "steps": 1}]
    done = CliRunner().invoke(app, ["train", str(written(settings, tmp_path))])
    assert done.exit_code == 0, done.output
    said, head = " ".join(done.output.split()), log(tmp_path / "run")[0]
    assert "data 'asked': questions left out as no piece of the context holds the answer: 1" in said
    # of the texts the held-out piece, and the one that it follows
    assert "data 'texts': examples left out as they share text with those held out: 2" in said
    assert head["data"] == {"asked": {"left_out": 1, "share_held_out": 0},
                            "texts": {"left_out": 0, "share_held_out": 2}}
    used = head["stages"][0]["sources"][0]["examples"]
    assert f"stage 'all': continuation has {used} of the {used + 1} examples of 'texts'" in said
