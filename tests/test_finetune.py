"""`bench.finetune` on made-up sentences and a tiny model: nothing is downloaded."""

from __future__ import annotations

import functools
import io
import json
import math
import random
import statistics
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("scipy")

from bench.finetune import attacks, costs, data, plan, report, section, train
from bench.finetune.methods import BREGMAN, METHODS, PLAIN, RECOMMENDED
from bench.finetune.results import Results
from bench.report import environment as report_environment

GOOD, BAD, OTHER = ("fine", "great", "lovely"), ("awful", "dreary", "broken"), ("the", "plot", "camera", "of", "was")
WORDS = ("[pad]", *GOOD, *BAD, *OTHER)


class Tiny(nn.Module):
    """Attention-free: the mean of its words, through one layer; takes what a model of transformers takes."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(len(WORDS) + 1, 8), nn.Linear(8, 16)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(16, outputs)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None):
        embed = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        mask = attention_mask[..., None]
        mean = (embed * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.head(self.drop(self.layer(mean).tanh())))


def made_up(number: int = 1600) -> list[data.Sentence]:
    draw, found = random.Random(0), []
    for i in range(number):
        words = draw.choice((GOOD, BAD))
        text = " ".join([draw.choice(words), *draw.choices(OTHER, k=draw.randint(1, 9)), draw.choice(words)])
        rating = draw.uniform(1, 4) * (1 if words is GOOD else -1)
        found.append(data.Sentence(tuple(data.DOMAINS)[i % 4], str(i // 12), f"{text} {i}", rating))
    return found


@pytest.fixture(scope="module")
def materials() -> train.Materials:
    sentences = made_up()

    def encode(texts):
        return [[WORDS.index(word) if word in WORDS else len(WORDS) for word in text.split()] for text in texts]

    return train.Materials(
        lambda start, outputs: Tiny(outputs),
        encode,
        functools.cache(lambda neutral: data.split(sentences, neutral=neutral)),
    )


def run_of(method: str = PLAIN, settings: dict | None = None, **others) -> train.Run:
    given = {"stage": "test", "seed": 0, "size": 48, "tested": 20, "attacked": 12, "epochs": 1, **others}
    return train.Run(method=method, settings=METHODS[method].candidates[0] if settings is None else settings, **given)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_no_document_is_in_two_parts():
    sentences = [data.Sentence("product", str(i // 7), f"sentence {i}", 1.0) for i in range(2000)]
    parts = data.split(sentences, neutral=False)
    documents = {part: {each.document for each in parts["product", part]} for part in data.PARTS}
    assert sum(map(len, documents.values())) == len(set().union(*documents.values())) == 286
    shares = {part: len(found) / 286 for part, found in documents.items()}
    assert shares == pytest.approx({"train": 0.6, "validation": 0.15, "test": 0.25}, abs=0.08)


def test_parts_do_not_depend_on_what_else_there_is_nor_on_order():
    sentences = made_up(200)
    whole, half = (data.split(some, neutral=True) for some in (sentences, sentences[99::-1]))
    for key, found in half.items():
        assert found == [each for each in whole[key] if each in sentences[:100]]


def test_ratings_become_classes():
    labels = [data.Sentence("movie", "1", "text", rating).label for rating in (-4, -0.51, -0.5, 0, 0.5, 0.51)]
    assert labels == [0, 0, None, None, None, 1]
    sentences = [data.Sentence("movie", str(i), f"text {i}", i % 2) for i in range(100)]
    assert sum(map(len, data.split(sentences, neutral=False).values())) == 50
    assert sum(map(len, data.split(sentences, neutral=True).values())) == 100


def test_files_are_read_as_they_are(tmp_path, monkeypatch):
    """latin-1, CRLF, a byte that would end a line of ``splitlines``, blank ends; a text in two domains counts once."""
    inner, outer = io.BytesIO(), tmp_path / data.SENTENCES.file
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for file, by_document in data.DOMAINS.values():
            first, second = ("3_1", "3_2") if by_document else ("1", "2")
            text = f"{first}\t-1.5\tcaf\xe9 \x85 {file} \r\n{second}\t2\tThe  same in all\r\n".encode("latin-1")
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    with pytest.raises(RuntimeError, match=r"not the file that was pinned: sha256 .*, expected 5d97c37f"):
        data.sentences(tmp_path)
    monkeypatch.setattr(
        data, "SENTENCES", data.SENTENCES._replace(sha256=data.hashlib.sha256(outer.read_bytes()).hexdigest())
    )
    found = data.sentences(tmp_path)
    assert found[:2] == [
        data.Sentence("movie", "1", "caf\xe9 \x85 movieReviewSnippets", -1.5),
        data.Sentence("movie", "2", "The  same in all", 2.0),
    ]
    assert [(each.domain, each.document) for each in found[2:]] == [
        ("product", "3"),
        ("editorial", "3"),
        ("tweet", "1"),
    ]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="...\nERROR: No matching distribution found\n")
    monkeypatch.setattr(data.subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(RuntimeError, match=r"vaderSentiment==0.5 is missing: .*No matching distribution.*Put the file"):
        data.sentences(tmp_path)


def test_what_is_carried_is_what_is_read(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    from bench.finetune import workers

    folder = tmp_path / "cache" / "package" / "model"
    folder.mkdir(parents=True)
    for name in workers.KEPT:
        (folder / name).write_text(name)
    safetensors.save_file({"w": torch.randn(300), "n": torch.arange(3)}, folder / "model.safetensors")
    (tmp_path / "cache" / data.SENTENCES.file).write_bytes(b"sentences")
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(data, "encoder_folder", lambda: folder)
    monkeypatch.setattr(data, "fetch", lambda package: tmp_path / "cache" / package.file)
    packed = workers.pack()
    found = safetensors.load_file(packed / "package" / "model" / "model.safetensors")
    assert {name: each.dtype for name, each in found.items()} == {"w": torch.float16, "n": torch.int64}
    whole = {each.relative_to(tmp_path / "cache") for each in (tmp_path / "cache").rglob("*") if each.is_file()}
    assert whole == {each.relative_to(packed) for each in packed.rglob("*") if each.is_file()}


# ---- attacks ---------------------------------------------------------------------------------------------------------


def test_embedding_attacks_keep_their_budget_and_succeed():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    embed = torch.randn(3, 5, 8) * torch.rand(3, 5, 1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    sizes = embed.square().mean(-1, keepdim=True).sqrt()
    for radius in attacks.RADII:
        moved = attacks.ascend(lambda x: model(x).sum(), embed, mask, radius)
        share = (moved - embed).abs() / sizes
        assert share.max() <= radius * (1 + 1e-4)
        assert (moved == embed)[~mask].all()
        # The loss is linear: its worst is at the corner of the box.
        torch.testing.assert_close(moved[mask], (embed + radius * sizes * model.weight[0].sign())[mask])


def test_typos_and_lost_words_are_seeded_and_keep_their_rates():
    text = " ".join("word" + letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz") + " a of"
    many = [f"{text} {i}" for i in range(200)]
    assert [attacks.typos(each) for each in many] == [attacks.typos(each) for each in many]
    assert attacks.typos(text, 1) != attacks.typos(text, 2)
    words = [pair for each in many for pair in zip(each.split(), attacks.typos(each).split(), strict=True)]
    changed = [(before, after) for before, after in words if before != after]
    assert all(len(before) > 3 and abs(len(before) - len(after)) <= 1 for before, after in changed)
    assert len(changed) / (26 * 200) == pytest.approx(
        attacks.TYPOS, abs=0.05
    )  # some letters are replaced by themselves
    kept = [attacks.lost_words(each).split() for each in many]
    assert statistics.mean(len(each) / 29 for each in kept) == pytest.approx(1 - attacks.LOST, abs=0.02)
    assert all(attacks.lost_words(word) == word for word in map(str, range(50)))


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["classes", "rating"])
def test_every_method_makes_a_run(method, task, materials):
    if (method, task) == ("fisher", "rating"):
        pytest.skip("one output has no Fisher direction")
    made_of = METHODS[method].made_of
    settings = {k: v for each in made_of for k, v in METHODS[each].candidates[0].items()} if made_of else None
    line = train.perform(run_of(method, settings, task=task), materials)
    assert json.loads(json.dumps(line))["run"]["method"] == method
    scores = line["scores"]
    assert set(scores["clean"]) == set(scores["typos"]) == set(data.DOMAINS)
    assert all(math.isfinite(value) for value in (*scores["clean"].values(), scores["pgd_0.1"], scores["pgd_0.3"]))
    if task == "classes":
        assert scores["pgd_0.3"] <= scores["pgd_0.1"] <= 1
    else:
        assert scores["pgd_0.3"] >= scores["pgd_0.1"] > 0


def test_methods_differ_by_their_loss_alone(materials):
    """Same sentences, same first weights; a method changes what is learned, a seed everything, no seed nothing."""

    def weights(run):
        return train.trained(run, materials).head.weight

    plain = weights(run_of())
    assert torch.equal(plain, weights(run_of()))
    for method in (RECOMMENDED, "R-Drop", "FreeLB", "NEFTune"):
        other = weights(run_of(method))
        assert 0 < (other - plain).norm() < 0.2 * plain.norm(), method
    assert (weights(run_of(seed=1)) - plain).norm() > 0.5 * plain.norm()
    assert train.sample(run_of(), materials) == train.sample(run_of(RECOMMENDED), materials)


def test_it_learns_and_attacks_undo_it(materials, monkeypatch):
    monkeypatch.setattr(attacks, "RADII", (0.5, 4.0))
    line = train.perform(run_of(epochs=8, size=96, rate=3e-2), materials)
    assert line["scores"]["clean"]["movie"] > 0.9
    assert line["scores"]["pgd_4.0"] < 0.5


def test_validation_sees_two_domains_and_no_test_part(materials, monkeypatch):
    seen: set[str] = set()
    encode = materials.encode
    monkeypatch.setattr(materials, "encode", lambda texts: seen.update(texts) or encode(texts))
    scores = train.perform(run_of(stage="tune", tested=1000), materials)["scores"]
    assert set(scores["clean"]) == set(train.VALIDATED)
    tests = {each.text for (_, part), found in materials.parts(False).items() if part == "test" for each in found}
    assert tests
    assert not tests & seen


def test_batches_hold_all_rows_once_by_length():
    draw = random.Random(0)
    lengths = [draw.randint(3, 40) for _ in range(100)]
    batches = train.batches_of(lengths, torch.Generator().manual_seed(0), 4)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert batches != train.batches_of(lengths, torch.Generator().manual_seed(1), 4)


def test_predictions_come_back_in_order(materials):
    torch.manual_seed(0)
    model, ids = Tiny(2).eval(), [[1 + i % 5] * (1 + i % 7) for i in range(150)]
    logits = train.predicted(model, ids, torch.device("cpu"))
    for i in (0, 77, 149):
        alone = model(input_ids=torch.tensor([ids[i]]), attention_mask=torch.ones(1, len(ids[i]))).logits[0]
        torch.testing.assert_close(logits[i], alone.detach())


def test_calibration_error():
    sure = torch.tensor([[0.0, math.log(4.0)]] * 10)  # confidence 0.8
    assert train.calibration_error(sure, torch.tensor([1] * 8 + [0] * 2)) == pytest.approx(0, abs=1e-6)
    assert train.calibration_error(sure, torch.tensor([1] * 5 + [0] * 5)) == pytest.approx(0.3, abs=1e-6)


def test_costs_are_shares_of_plain(tmp_path, materials, monkeypatch):
    """By a clock that counts forward passes."""
    passes, forward = [0], Tiny.forward

    def counted(*args, **kwargs):
        passes[0] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(Tiny, "forward", counted)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: passes[0])
    found = costs.measure(Results(tmp_path / "none.jsonl"), materials, lambda doing: None, rounds=2)
    assert {name: each["time"] for name, each in found.items()} == {
        PLAIN: 1, "smart-pytorch": 3, RECOMMENDED: 3, "RECOMMENDED as shipped": 3, "fisher": 2, "SiFT": 3, "R3F": 2,
        "NEFTune": 1, "R-Drop": 2, "FreeLB": 3, BREGMAN: 2, f"{RECOMMENDED} + {BREGMAN}": 4,
    }  # fmt: skip
    assert found[PLAIN]["memory"] == 1.0
    assert found[RECOMMENDED]["memory"] > 1.0


# ---- lines, plan and report ------------------------------------------------------------------------------------------


def line_of(run: train.Run, clean: float, typos: float = 0.5) -> dict:
    scores = {
        "clean": dict.fromkeys(data.DOMAINS, clean), "ece": dict.fromkeys(data.DOMAINS, 0.1),
        "half": dict.fromkeys(data.DOMAINS, clean), "typos": dict.fromkeys(data.DOMAINS, typos),
        "lost_words": dict.fromkeys(data.DOMAINS, typos), "pgd_0.1": 0.2, "pgd_0.3": 0.1,
    }  # fmt: skip
    return {"run": run.key, "scores": scores, "seconds": [1.0, 1.0]}


def test_a_run_that_was_cut_goes_on(tmp_path):
    path = tmp_path / "lines.jsonl"
    first, second = run_of(seed=0), run_of(seed=1)
    Results(path).add(line_of(first, 0.5))
    whole = path.read_bytes()
    Results(path).add(line_of(second, 0.6))
    path.write_bytes(path.read_bytes()[:-20])  # killed while it wrote
    results = Results(path)
    assert results.of(first) is not None
    assert results.of(second) is None
    other = Results(path)  # of another process
    results.add(line_of(second, 0.7))
    assert path.read_bytes().startswith(whole)
    other.refresh()
    for each in (results, other, Results(path)):
        assert each.of(second)["scores"]["clean"]["movie"] == 0.7
        assert len(each.lines) == 2
    assert results.of(run_of(seed=0, size=49)) is None  # every part of the key counts


def test_two_processes_do_not_make_the_same_run(tmp_path):
    path, run = tmp_path / "lines.jsonl", run_of()
    results = Results(path)
    with results.claimed(run) as mine:
        assert mine
        with Results(path).claimed(run) as theirs, Results(path).claimed(run_of(seed=1)) as other:
            assert not theirs
            assert other
    Results(path).add(line_of(run, 0.5))
    with results.claimed(run) as mine:  # free again, and it is seen that it was made
        assert mine
        assert results.of(run) is not None


def test_the_command_makes_what_is_missing(tmp_path, materials, monkeypatch):
    """Tuning first, then tests with what it chose; cut short and started again, it makes each run once."""
    from rich.console import Console

    from bench.finetune import command

    made = []

    def perform(run, loaded, say):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(run)
        return line_of(run, 0.7 + 0.01 * (run.settings.get("radius") == 1.0))

    monkeypatch.setattr(command, "perform", perform)
    monkeypatch.setattr(command.materials, "load", lambda device, cache: materials)
    monkeypatch.setattr(command.costs, "measure", lambda *_: {PLAIN: {"time": 1.0, "memory": 1.0}})
    monkeypatch.setattr(plan, "WAVES", ((PLAIN, RECOMMENDED),))
    monkeypatch.setattr(plan, "OTHER_SIZES", ())
    monkeypatch.setattr(plan, "RATES", ())
    monkeypatch.setattr(plan, "RATED", (PLAIN,))
    monkeypatch.setattr(plan, "SEEDS", (0, 1))
    options = SimpleNamespace(json=tmp_path / "lines.jsonl", quick=False, cases="", limit=None)
    call = SimpleNamespace(
        options=options, device=torch.device("cpu"), console=Console(file=io.StringIO()), start=0.0, wrote=print,
        parser=None, folder=tmp_path,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        command.main(call)
    first = made[:]
    made.clear()
    made.extend([None] * 7)  # past the interruption
    assert command.main(call) == 0
    runs = first + made[7:]
    assert [run.stage for run in runs[:5]] == ["tune"] * 5
    assert {run.stage for run in runs[5:]} == {"test"}
    assert {run.settings["radius"] for run in runs[5:] if run.method == RECOMMENDED} == {1.0}
    keys = [json.dumps(run.key) for run in runs]
    assert len(set(keys)) == len(keys) == 1 + 4 + 4 + 4 + 2
    results = Results(options.json)
    assert len(results.lines) == len(keys) + 1
    assert results.costs is not None
    made.clear()
    assert command.main(call) == 0
    assert made == []


def test_settings_are_chosen_by_validation_alone(tmp_path):
    results = Results(tmp_path / "lines.jsonl")
    runs = plan.tuning(RECOMMENDED)
    assert len(runs) == 4 * len(plan.TUNING_SEEDS)
    assert not set(plan.TUNING_SEEDS) & set(plan.SEEDS)
    best = METHODS[RECOMMENDED].candidates[2]
    for run in runs[:-1]:
        results.add(line_of(run, 0.8 if run.settings == best else 0.7))
    assert plan.chosen(RECOMMENDED, results) is None  # one is missing
    results.add(line_of(runs[-1], 0.6))
    results.add(line_of(plan.trials(RECOMMENDED, METHODS[RECOMMENDED].candidates[0], 400, (0,))[0], 0.99))
    assert plan.chosen(RECOMMENDED, results) == best
    for run in plan.tuning(BREGMAN):
        results.add(line_of(run, 0.7))
    both = {**best, **METHODS[BREGMAN].candidates[0]}
    assert plan.chosen(f"{RECOMMENDED} + {BREGMAN}", results) == both


def test_every_method_has_as_many_candidates():
    tuned = {name: len(each.candidates) for name, each in METHODS.items() if len(each.candidates) > 1}
    assert set(tuned.values()) == {4}
    planned = {name for wave in plan.WAVES for name in wave}
    assert planned == set(METHODS)


def test_intervals_are_those_of_the_t_distribution():
    found = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.half) == pytest.approx((3.0, 2.776445 * math.sqrt(2.5 / 5)), rel=1e-6)
    assert found.above_zero
    assert not report.interval([1.0, -0.5, 2.0]).above_zero
    assert not report.interval([1.0]).above_zero
    assert report.interval([0.01, 0.03]).text() == "+2.0 ± 12.7"


def test_differences_are_paired_by_seed(tmp_path):
    """Seeds that differ by ten points hide no difference of one point; seeds of one method alone do not count."""
    results = Results(tmp_path / "lines.jsonl")
    for seed, level in enumerate((0.5, 0.6, 0.7, 0.8)):
        results.add(line_of(run_of(PLAIN, seed=seed), level, level - 0.2))
        if seed < 3:
            results.add(line_of(run_of("R3F", seed=seed), level + 0.01 + 0.001 * seed, level - 0.15))
    plain, other = report.rows(results, 48)
    assert plain.means["in domain"].mean == pytest.approx(0.65)
    found = other.differences["out of domain"]
    assert (found.mean, found.number) == (pytest.approx(0.011), 3)
    assert found.half == pytest.approx(4.302653 * 0.001 / math.sqrt(3), rel=1e-4)
    assert other.differences["lost to typos"].mean == pytest.approx(0.161 - 0.2)
    header, *lines = report.table([plain, other])
    assert all(len(line) == len(header) for line in lines)


def test_the_docs_say_what_was_found(tmp_path):
    """Goals, candidates with the one that was taken, and figures, of lines that were made up."""
    path = tmp_path / "finetune.jsonl"
    assert section.section(path) == section.NOTHING
    results, about = Results(path), {"environment": report_environment(torch.device("cpu"))}
    for i, run in enumerate(plan.tuning(RECOMMENDED)):
        results.add(line_of(run, 0.7 + 0.01 * i) | about)
    for seed in plan.SEEDS:
        if seed == plan.SEEDS[-1]:
            assert "| in domain not worse than plain | +2.2 ± 0.2 | too few seeds |" in section.section(path)
        for method, clean, typos in ((PLAIN, 0.75, 0.6), (RECOMMENDED, 0.77 + 0.001 * seed, 0.7), ("R3F", 0.79, 0.7)):
            results.add(line_of(run_of(method, seed=seed, size=plan.SIZE), clean, typos) | about)
    for seed in range(2):
        for method, error in ((PLAIN, 1.5), (RECOMMENDED, 1.25)):
            run = run_of(method, seed=seed, size=plan.SIZE, task="rating")
            scores = line_of(run, error)["scores"] | {"ece": {}}
            results.add({"run": run.key, "scores": scores} | about)
    results.add({"costs": {PLAIN: {"time": 1.0, "memory": 1.0}, RECOMMENDED: {"time": 2.5, "memory": 1.1}}} | about)
    text = section.section(path)
    assert "| RECOMMENDED | weight 0.3, radius 0.3: 70.0; " in text
    assert "; **weight 1, radius 1: 73.0** |" in text
    assert "| out of domain at least 1.5 points above plain | +2.2 ± 0.2 | yes |" in text
    assert "| out of domain above R3F | +2.2 ± 0.2 to +4.0 ± 0.0 | no |" in text
    assert "| 5 times plain's accuracy under PGD 0.1 | 20.0% to 20.0% | no |" in text
    assert "| RECOMMENDED | 2 | -0.250 ± 0.000 | -0.250 ± 0.000 |" in text
    assert "| at most 2.4 times plain's step time | 2.50 | no |" in text
    pytest.importorskip("matplotlib")
    from bench.finetune import figures

    written = figures.write(path, tmp_path, plan.SIZE)
    assert len(written) == 4
    assert all(figures.digest(path) in each.read_text() for each in written)


@pytest.mark.parametrize("method", ["plain", "RECOMMENDED", "NEFTune"])
def test_language_model(method):
    """Cross-entropy is that of transformers; padding counts nowhere; a few steps lower the perplexity."""
    transformers = pytest.importorskip("transformers")
    from bench.finetune import language

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.LlamaForCausalLM(config).eval()
    run = language.Run(method, 0, 30, 8)
    found = language.Language(model, run)
    ids = [[1, 7, 9, 4, 9], [2, 3, 8]]
    batch = train.batch_of(ids, [0.0, 0.0], torch.device("cpu"), True)
    labels = batch.ids.masked_fill(~batch.mask, -100)
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels).loss
    states = found.states(found.words(batch.ids), batch.mask)
    torch.testing.assert_close(found.next_token(states, batch.ids, batch.mask), theirs)
    assert found.perplexity(ids, torch.device("cpu")) == pytest.approx(theirs.exp().item(), rel=1e-4)
    regularized = found.loss(batch.ids, batch.mask).item()
    assert (
        (regularized > theirs.item() + 1e-4)
        if method == "RECOMMENDED"
        else (regularized == pytest.approx(theirs.item(), rel=0.2))
    )
    before = found.perplexity([[1, 2, 3, 4]] * 4, torch.device("cpu"))
    parts = {(domain, part): made_up(40) for domain in data.DOMAINS for part in data.PARTS}
    line = language.perform(run, model, lambda texts: [[1, 2, 3, 4]] * len(texts), parts, torch.device("cpu"))
    assert set(line["perplexity"]) == set(data.DOMAINS)
    assert line["perplexity"]["movie"] < before
