"""Captioners: teacher forcing and step by step agree, search finds the optimum, attention sums to 1, whole runs."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vision3dgen import cli, engine
from vision3dgen.config import load
from vision3dgen.datasets import Vocabulary, prepare_scenes
from vision3dgen.experiment import Run, Weights
from vision3dgen.language import END, MASK, PAD, START
from vision3dgen.layers import LSTMState
from vision3dgen.models import DECODERS, MODELS, Captioner, MaskedLanguageModel, TransformerDecoder, beam_search
from vision3dgen.models.search import Step, select
from vision3dgen.viz import attention_gallery, attention_overlay

CONFIGS = Path(__file__).parents[1] / "configs"
WORDS = 11
CHANNELS = [3, 5]
KINDS = {
    "rnn": lambda: DECODERS["recurrent"](CHANNELS, WORDS, cell="rnn", hidden=8, embedding=7),
    "gru": lambda: DECODERS["recurrent"](CHANNELS, WORDS, cell="gru", hidden=8, embedding=7),
    "lstm": lambda: DECODERS["recurrent"](CHANNELS, WORDS, cell="lstm", hidden=8, embedding=7),
    "attention": lambda: DECODERS["attention"](CHANNELS, WORDS, hidden=7, embedding=6, width=8),
    "attention after": lambda: DECODERS["attention"](CHANNELS, WORDS, hidden=7, embedding=6, width=8, look="after"),
    "transformer": lambda: DECODERS["transformer"](CHANNELS, WORDS, width=8, heads=2, layers=2, max_length=13),
}


class Maps(nn.Module):
    """Two maps of an image, of strides 2 and 4."""

    def __init__(self):
        super().__init__()
        self.channels = CHANNELS
        self.fine, self.coarse = nn.Conv2d(3, 3, 2, 2), nn.Conv2d(3, 5, 2, 2)

    def forward(self, images):
        fine = self.fine(images)
        return [fine, self.coarse(fine.relu())]


def features(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 6, 10, generator=generator), torch.randn(batch, 5, 3, 5, generator=generator)]


def sentences(batch=3, length=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, WORDS, (batch, length), generator=generator)
    tokens[:, 0] = START
    return tokens


@pytest.fixture(params=KINDS)
def decoder(request):
    torch.manual_seed(3)
    made = KINDS[request.param]()
    for parameter in made.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


# ----------------------------------------------------------------------------------------------------------- decoders


def test_word_by_word_gives_the_logits_of_teacher_forcing(decoder):
    maps, tokens = features(), sentences()
    decoded = decoder(maps, tokens)
    state = decoder.start(maps)
    for t in range(7):
        step = decoder.step(tokens[:, t], state)
        torch.testing.assert_close(step.logits, decoded.logits[:, t])
        if decoded.attention is not None:
            torch.testing.assert_close(step.attention, decoded.attention[:, t])
        state = step.state
    assert decoded.logits.shape == (3, 7, WORDS)


def test_no_word_knows_the_words_behind_it(decoder):
    maps, tokens = features(), sentences()
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] - 4) % 6 + 5
    before, after = decoder(maps, tokens).logits, decoder(maps, changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_items_of_a_batch_do_not_see_one_another(decoder):
    maps, tokens = features(), sentences()
    alone = decoder([m[1:2] for m in maps], tokens[1:2]).logits
    torch.testing.assert_close(decoder(maps, tokens).logits[1:2], alone)


def test_the_image_is_seen_and_where_things_are(decoder):
    maps, tokens = features(), sentences()
    before = decoder(maps, tokens).logits
    assert not torch.allclose(before, decoder(features(seed=5), tokens).logits, atol=1e-4)
    mirrored = decoder([m.flip(3) for m in maps], tokens).logits
    assert not torch.allclose(before, mirrored, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "attention after", "transformer"])
def test_attention_sums_to_one_over_the_map(name):
    attention = KINDS[name]().eval()(features(), sentences()).attention
    assert attention.shape == (3, 7, 3, 5)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(3, 7))


@pytest.mark.parametrize("look", ["before", "after"])
def test_soft_attention_is_the_formula_in_loops(look):
    torch.manual_seed(0)
    decoder, maps, tokens = KINDS["attention"]().eval(), features(batch=1), sentences(batch=1)
    decoder.look = look
    places = decoder.annotate(maps[1])[0]
    mean = places.mean(0)
    hidden, cell, context = torch.tanh(decoder.start_hidden(mean)), torch.tanh(decoder.start_cell(mean)), mean
    decoded = decoder(maps, tokens)

    def see():
        scores = [decoder.score(torch.tanh(decoder.key(place) + decoder.query(hidden))).exp() for place in places]
        weights = [score / sum(scores) for score in scores]
        return weights, torch.sigmoid(decoder.gate(hidden)) * sum(w * place for w, place in zip(weights, places))

    for t, token in enumerate(tokens[0]):
        word = decoder.embedding.weight[token]
        if look == "before":
            weights, context = see()
        hidden, cell = (x[0] for x in decoder.cell(torch.cat([word, context])[None], (hidden[None], cell[None])))
        if look == "after":
            weights, context = see()
        logits = decoder.output(word + decoder.from_hidden(hidden) + decoder.from_context(context))
        torch.testing.assert_close(decoded.logits[0, t], logits)
        torch.testing.assert_close(decoded.attention[0, t].flatten(), torch.cat(weights))


@pytest.mark.parametrize("look, knows", [("before", False), ("after", True)])
def test_only_afterwards_does_the_look_know_the_word_before(look, knows):
    torch.manual_seed(0)
    decoder, maps, tokens = KINDS["attention"]().eval(), features(), sentences()
    decoder.look = look
    changed = tokens.clone()
    changed[:, 3] = (tokens[:, 3] - 4) % 6 + 5
    before, after = decoder(maps, tokens).attention, decoder(maps, changed).attention
    assert torch.equal(before[:, :3], after[:, :3])
    assert torch.equal(before[:, 3], after[:, 3]) != knows
    assert not torch.equal(before[:, 4], after[:, 4])


def test_every_parameter_gets_a_gradient(decoder):
    batch = {"image": torch.rand(3, 3, 12, 20), "tokens": torch.cat([sentences(), torch.full((3, 1), END)], 1)}
    model = Captioner(Maps(), decoder.train())
    model.loss(batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("level", [0, 1, -2])
def test_the_level_chooses_the_map(level):
    torch.manual_seed(0)
    decoder = TransformerDecoder(CHANNELS, WORDS, width=8, heads=2, layers=1, level=level).eval()
    assert decoder(features(), sentences()).attention.shape[2:] == ((3, 5) if level == 1 else (6, 10))


def test_faults_of_decoders_are_named():
    with pytest.raises(ValueError, match="level must be one of the backbone's 2 maps, got 2"):
        TransformerDecoder(CHANNELS, WORDS, level=2)
    with pytest.raises(ValueError, match="vocabulary_size must be over 5"):
        TransformerDecoder(CHANNELS, 5)
    with pytest.raises(ValueError, match="width must be a multiple of 4"):
        DECODERS["attention"](CHANNELS, WORDS, width=6)
    with pytest.raises(ValueError, match="13 learned positions, got 14 tokens"):
        KINDS["transformer"]()(features(), sentences(length=14))


# ------------------------------------------------------------------------------------------------------------- search


class Chain(nn.Module):
    """A toy language: the next word depends on the member of the batch and on the two words before."""

    def __init__(self, batch, words, seed, peaked=2.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = peaked * torch.randn(batch, words, words, words, generator=generator, dtype=torch.float64)

    def start(self):
        batch = len(self.table)
        return torch.arange(batch), torch.zeros(batch, dtype=torch.int64)

    def __call__(self, token, state):
        member, before = state
        return Step(self.table[member, before, token], None, (member, token))


def probability(chain, member, tokens):
    """log p of a sentence, never <pad>, <start> or <mask>, word by word."""
    before, last, total = 0, START, 0.0
    for token in tokens:
        row = chain.table[member, before, last].clone().float()
        row[[PAD, START, MASK]] = -math.inf
        total += float(row.log_softmax(0)[token])
        before, last = last, token
    return total


def everything(words, length):
    """Every sentence: ended within `length` words, or cut there."""
    inner = [w for w in range(words) if w not in (PAD, START, MASK, END)]
    for size in range(1, length + 1):
        for head in itertools.product(inner, repeat=size - 1):
            yield (*head, END)
            if size == length:
                for last in inner:
                    yield (*head, last)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_many_beams_find_the_optimum_of_all_sentences(penalty):
    chain = Chain(5, 7, seed=0)
    found = beam_search(chain, chain.start(), 5, beams=200, max_length=4, length_penalty=penalty)
    for member in range(5):
        best = max(everything(7, 4), key=lambda s, m=member: probability(chain, m, s) / len(s) ** penalty)
        assert found.tokens[member].tolist() == [*best, *[PAD] * (4 - len(best))]
        assert float(found.log_probability[member]) == pytest.approx(probability(chain, member, best), abs=1e-5)


def greedy(chain, member, length):
    tokens, before, last = [], 0, START
    for _ in range(length):
        row = chain.table[member, before, last].clone()
        row[[PAD, START, MASK]] = -math.inf
        before, last = last, int(row.argmax())
        tokens.append(last)
        if last == END:
            break
    return tokens


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_one_beam_is_greedy_search(penalty):
    chain = Chain(31, 9, seed=1)
    found = beam_search(chain, chain.start(), 31, max_length=8, length_penalty=penalty)
    lengths = set()
    for member in range(31):
        tokens = greedy(chain, member, 8)
        lengths.add(len(tokens))
        assert found.tokens[member].tolist() == [*tokens, *[PAD] * (8 - len(tokens))]
    assert len(lengths) > 3


def test_more_beams_are_never_worse_here_and_sometimes_better():
    chain = Chain(31, 9, seed=2, peaked=1.0)
    one, many = (beam_search(chain, chain.start(), 31, beams=b, max_length=6).log_probability for b in (1, 60))
    assert (many >= one - 1e-6).all()
    assert (many > one + 1e-3).any()


def test_a_batch_finds_what_each_member_finds_alone():
    chain = Chain(6, 9, seed=3)
    found = beam_search(chain, chain.start(), 6, beams=3, max_length=6, length_penalty=1.0)
    for member in range(6):
        alone = beam_search(
            chain, select(chain.start(), torch.tensor([member])), 1, beams=3, max_length=6, length_penalty=1.0
        )
        assert torch.equal(found.tokens[member], alone.tokens[0])


def test_a_length_penalty_wants_longer_sentences():
    chain = Chain(41, 9, seed=4)
    short, long = (
        (beam_search(chain, chain.start(), 41, beams=20, max_length=8, length_penalty=p).tokens != PAD).sum()
        for p in (0.0, 2.0)
    )
    assert long > short


def test_attention_of_a_sentence_is_that_of_teacher_forcing(decoder):
    maps = features()
    with torch.no_grad():
        found = beam_search(decoder.step, decoder.start(maps), 3, beams=3, max_length=6)
        tokens = torch.cat([torch.full((3, 1), START), found.tokens], 1)
        decoded = decoder(maps, tokens)
    log_p = decoded.logits.index_fill(2, torch.tensor([PAD, START, MASK]), -math.inf).log_softmax(2)
    for member in range(3):
        length = int((found.tokens[member] != PAD).sum())
        said = log_p[member, torch.arange(length), found.tokens[member, :length]]
        assert float(found.log_probability[member]) == pytest.approx(float(said.sum()), abs=1e-4)
        if decoded.attention is not None:
            torch.testing.assert_close(found.attention[member, :length], decoded.attention[member, :length])
            assert not found.attention[member, length:].any()


def test_faults_of_a_search_are_named():
    chain = Chain(1, 7, seed=0)
    with pytest.raises(ValueError, match="beams and max_length must be at least 1"):
        beam_search(chain, chain.start(), 1, beams=0, max_length=4)


def test_states_are_selected_in_nested_tuples():
    state = (LSTMState(torch.arange(3.0)[:, None], torch.zeros(3, 1)), torch.arange(3))
    chosen = select(state, torch.tensor([2, 0, 0]))
    assert isinstance(chosen[0], LSTMState)
    assert chosen[0].hidden[:, 0].tolist() == chosen[1].tolist() == [2, 0, 0]


# ---------------------------------------------------------------------------------------------------------- captioner


def batch_of(tokens, size=(12, 20)):
    return {"image": torch.rand(len(tokens), 3, *size, generator=torch.Generator().manual_seed(0)), "tokens": tokens}


def test_the_loss_is_the_mean_over_words_without_padding(decoder):
    tokens = torch.full((3, 9), PAD)
    for row, length in enumerate((3, 7, 5)):
        tokens[row, :length] = torch.cat([sentences(1, length - 1, row)[0], torch.tensor([END])])
    model, batch = Captioner(Maps(), decoder).eval(), batch_of(tokens)
    with torch.no_grad():
        logits = model.decoder(model.features(batch["image"]), tokens[:, :-1]).logits.log_softmax(2)
    nats = [-logits[b, t, tokens[b, t + 1]] for b in range(3) for t in range(8) if tokens[b, t + 1] != PAD]
    assert len(nats) == 2 + 6 + 4
    loss = model.loss(batch)["loss"].detach()
    assert float(loss) == pytest.approx(float(sum(nats)) / 12, rel=1e-5)
    measured = model.validation_metrics(batch)
    assert float(measured["loss"][0]) == pytest.approx(float(sum(nats[:2])) / 2, rel=1e-5)
    assert measured["accuracy"].shape == (3,)
    longer = {**batch, "tokens": torch.cat([tokens, torch.full((3, 5), PAD)], 1)}
    torch.testing.assert_close(model.loss(longer)["loss"].detach(), loss)


def test_coverage_is_the_doubly_stochastic_term():
    torch.manual_seed(0)
    tokens = torch.cat([sentences(2, 4), torch.full((2, 1), END), torch.full((2, 1), PAD)], 1)
    model = Captioner(Maps(), KINDS["attention"](), coverage=0.3).eval()
    batch = batch_of(tokens)
    losses = model.loss(batch)
    attention = model.decoder(model.features(batch["image"]), tokens[:, :4]).attention
    expected = ((1 - attention.sum(1)) ** 2).sum((1, 2)).mean()
    torch.testing.assert_close(losses["loss"] - losses["nats"], 0.3 * expected)


def test_a_captioner_learns_two_pictures_by_heart():
    torch.manual_seed(0)
    model = Captioner(Maps(), DECODERS["attention"](CHANNELS, WORDS, hidden=16, embedding=8, width=8), max_length=6)
    tokens = torch.tensor([[START, 5, 6, 7, END, PAD], [START, 8, 6, 9, 10, END]])
    batch = batch_of(tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    for model.beams in (1, 4):
        captions = model.eval().predict(batch)
        assert [c.tokens.tolist() for c in captions] == [[5, 6, 7], [8, 6, 9, 10]]
        assert [c.attention.shape for c in captions] == [(3, 3, 5), (4, 3, 5)]
        assert all(c.log_probability > math.log(0.5) for c in captions)


def test_a_vocabulary_of_another_size_is_an_error(decoder):
    batch = {**batch_of(sentences()), "vocabulary": [Vocabulary(["a", "b"])] * 3}
    model = Captioner(Maps(), decoder)
    for call in (model.loss, model.predict, model.validation_metrics):
        with pytest.raises(ValueError, match="decoder knows 11 words, the data's vocabulary has 7"):
            call(batch)


# ----------------------------------------------------------------------------------------------------- language model


def language(**changes):
    torch.manual_seed(0)
    return MaskedLanguageModel(**{"vocabulary_size": WORDS, "width": 8, "heads": 2, "max_length": 9, **changes})


def text_batch():
    tokens = torch.tensor([[START, 5, 6, 7, END], [START, 8, 9, END, PAD]])
    masked = torch.tensor([[START, MASK, 6, 7, END], [START, 8, MASK, END, PAD]])
    targets = torch.tensor([[PAD, 5, PAD, PAD, PAD], [PAD, PAD, 9, PAD, PAD]])
    return {"tokens": tokens, "masked": masked, "targets": targets, "id": ["a", "b"]}


def test_only_words_left_out_count_and_padding_is_not_looked_at():
    model, batch = language().eval(), text_batch()
    logits = model(batch["masked"]).log_softmax(2)
    expected = -(logits[0, 1, 5] + logits[1, 2, 9]).detach() / 2
    torch.testing.assert_close(model.loss(batch)["loss"].detach(), expected)
    guesses = model.predict(batch)
    assert guesses.words.tolist() == [1, 1]
    assert float(guesses.nats.sum()) == pytest.approx(2 * float(expected), rel=1e-5)
    longer = {k: torch.cat([v, torch.full((2, 3), PAD)], 1) for k, v in batch.items() if k != "id"}
    torch.testing.assert_close(model.loss(longer)["loss"].detach(), expected)


def test_both_sides_of_a_word_are_seen():
    model, batch = language().eval(), text_batch()
    before = model(batch["masked"])[0, 2]
    for place in (1, 3):
        changed = batch["masked"].clone()
        changed[0, place] = 10
        assert not torch.allclose(model(changed)[0, 2], before, atol=1e-4)


def test_a_language_model_learns_which_words_go_together():
    model, batch = language(), text_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = float(model.loss(batch)["loss"].detach())
    assert first == pytest.approx(math.log(WORDS), abs=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    assert float(model.loss(batch)["loss"].detach()) < 0.05
    assert model.validation_metrics(batch)["accuracy"].tolist() == [1, 1]


def test_faults_of_a_language_model_are_named():
    batch = text_batch()
    with pytest.raises(ValueError, match="the model knows 9 words, the data has a word number 9"):
        language(vocabulary_size=9).loss(batch)
    with pytest.raises(ValueError, match="4 learned positions, got 5 tokens"):
        language(max_length=4).loss(batch)


def saved(model, folder):
    engine.checkpoint.save(folder, 1, model, {}, metrics={}, best=True, keep=1)
    return folder


def test_a_caption_transformer_starts_from_a_language_model(tmp_path):
    source = language()
    folder = saved(source, tmp_path)
    torch.manual_seed(9)
    decoder = TransformerDecoder(CHANNELS, WORDS, width=8, heads=2, max_length=9)
    kept = decoder.blocks[0].norm2.weight.clone(), decoder.blocks[1].multihead_attn.in_proj_weight.clone()
    with torch.no_grad():
        source.blocks[0].norm2.weight.add_(1)
    folder = saved(source, tmp_path / "second")
    names = Weights(folder, renamed={"norm2": "norm3"}, fitting=True).load(decoder, "").loaded
    assert torch.equal(decoder.blocks[0].norm3.weight, source.blocks[0].norm2.weight)
    assert torch.equal(decoder.embedding.weight, source.embedding.weight)
    assert torch.equal(decoder.blocks[1].self_attn.in_proj_weight, source.blocks[1].self_attn.in_proj_weight)
    assert torch.equal(decoder.blocks[0].norm2.weight, kept[0])
    assert torch.equal(decoder.blocks[1].multihead_attn.in_proj_weight, kept[1])
    assert len(names) == len(source.state_dict())  # nothing of the language model is left over
    with torch.no_grad():  # with nothing to look at, the decoder is the causal language model
        for block in decoder.blocks:
            block.multihead_attn.out_proj.weight.zero_()
            block.multihead_attn.out_proj.bias.zero_()
    tokens = sentences(2, 6)
    x = source.positions(source.embedding(tokens))
    for block in source.blocks:
        x = block(x, causal=True)
    expected = source.norm(x) @ source.embedding.weight.T + source.bias
    torch.testing.assert_close(decoder.eval()(features(2), tokens).logits, expected)


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    folder = saved(language(vocabulary_size=13), tmp_path)
    decoder = TransformerDecoder(CHANNELS, WORDS, width=8, heads=2, max_length=9)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"bias is \(13,\), the model's \(11,\); build both"):
        Weights(folder, fitting=True).load(decoder, "")
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    with pytest.raises(ValueError, match="nothing of which it has"):
        Weights(folder, fitting=True).load(nn.BatchNorm2d(1, affine=False), "")


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny = load(CONFIGS / "captioning_lstm_scenes.yaml", preset="tiny")["prepare"]
    assert tiny.pop("name") == "scenes"
    prepare_scenes(**{**tiny, "root": root})
    return root


def run_tiny(name, data, out, *overrides):
    path = str(CONFIGS / f"{name}.yaml")
    arguments = ["train", path, "--preset", "tiny", "--out", str(out), f"prepare.root={data}", *overrides]
    captions = name.startswith("captioning") and not any(text.startswith("weights") for text in overrides)
    return cli.main([*arguments, "weights={}"] if captions else arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["captioning_lstm_scenes", "captioning_attention_scenes", "captioning_transformer_scenes"]
)
def test_captioning_configurations_train_and_are_scored(name, data, tmp_path, capsys):
    assert run_tiny(name, data, tmp_path / "run") == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "BLEU-4" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "evaluation" / "bleu_test.json").read_text())
    assert 0 <= summary["BLEU-4"] <= summary["BLEU-1"] <= 1
    rows = (tmp_path / "run" / "evaluation" / "bleu_test.jsonl").read_text().splitlines()
    assert len(rows) == summary["n"] == len(Run.open(tmp_path / "run").experiment.dataset("test"))


@pytest.mark.slow
def test_pretraining_then_captioning(data, tmp_path, capsys):
    assert run_tiny("language_masked_scenes", data, tmp_path / "language") == 0
    assert cli.main(["evaluate", str(tmp_path / "language"), "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out
    source = f"source: {tmp_path / 'language'}, fitting: true, renamed: {{norm2: norm3}}"
    given = f"weights={{decoder: {{part: '', {source}}}}}"
    frozen = "trainer.optimizer={name: sgd, lr: 1e-9}"
    assert run_tiny("captioning_pretrained_scenes", data, tmp_path / "captions", given, frozen) == 0
    language, captioner = (Run.open(tmp_path / name).model() for name in ("language", "captions"))
    torch.testing.assert_close(captioner.decoder.embedding.weight, language.embedding.weight)
    torch.testing.assert_close(captioner.decoder.blocks[0].norm3.weight, language.blocks[0].norm2.weight)
    for override, message in (
        (f"weights={{decodr: {{{source}}}}}", "no part 'decodr'; it has ['backbone', 'decoder']"),
        (f"weights.decoder.source={tmp_path}", "has no checkpoint: train it first"),
        (
            "model.decoder.vocabulary_size=60",
            "bias is (55,), the model's (60,); build both with the same sizes (of a vocabulary",
        ),
    ):
        out = tmp_path / override.partition("=")[0]
        assert run_tiny("captioning_pretrained_scenes", data, out, given, override) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_backbone_may_start_from_one_that_recognizes_objects(data, tmp_path, capsys):
    assert run_tiny("recognition_objects_scenes", data, tmp_path / "objects") == 0
    assert cli.main(["evaluate", str(tmp_path / "objects"), "--device", "cpu"]) == 0
    summary = json.loads((tmp_path / "objects" / "evaluation" / "classes_test.json").read_text())
    assert np.sum(summary["confusion"]) > 0
    given = (f"weights.backbone={tmp_path / 'objects'}", "trainer.optimizer={name: sgd, lr: 1e-9}")
    assert run_tiny("captioning_attention_scenes", data, tmp_path / "captions", *given) == 0
    source, captioner = (Run.open(tmp_path / name).model() for name in ("objects", "captions"))
    torch.testing.assert_close(captioner.backbone.conv1.weight, source.backbone.conv1.weight)
    given = f"weights.backbone={tmp_path / 'nothing'}"
    assert run_tiny("captioning_attention_scenes", data, tmp_path / "other", given) == 2
    assert "nothing" in capsys.readouterr().err


def test_configurations_name_what_a_decoder_does_not_take(tmp_path, capsys):
    assert run_tiny("captioning_lstm_scenes", tmp_path, tmp_path / "run", "model.decoder.cell=lstn") == 2
    assert "(did you mean 'lstm'?)" in capsys.readouterr().err


def test_the_tables_name_every_model():
    assert {"captioning", "masked_language"} <= set(MODELS)
    assert set(DECODERS) == {"recurrent", "attention", "transformer"}


# ----------------------------------------------------------------------------------------------------------- pictures


def test_attention_lights_up_what_it_looks_at(tmp_path):
    image = torch.zeros(3, 16, 24)
    image[0] = 0.8
    look = torch.zeros(2, 3)
    look[0, 2] = 1
    shown = attention_overlay(image, look, 60)
    assert shown.shape == (3, 60, 60)
    torch.testing.assert_close(shown[:, 5, -5], torch.tensor([0.8, 0, 0]))
    torch.testing.assert_close(shown[:, -5, 5], torch.full((3,), 0.35 * 0.8 / 3))
    torch.testing.assert_close(attention_overlay(image, torch.full((2, 3), 1 / 6), 60)[:, 9, 9], image[:, 0, 0])
    sheet = attention_gallery([image], [(["a", "car"], torch.stack([look, look]))], tmp_path / "a.png", size=60)
    assert sheet.shape[1] > 3 * 60
    assert (tmp_path / "a.png").stat().st_size > 100
    assert np.unique(sheet.reshape(-1, 3), axis=0).shape[0] > 10


def test_attention_needs_a_map_for_each_word():
    with pytest.raises(ValueError, match="caption 0 has 2 words, but 1 attention maps"):
        attention_gallery([torch.zeros(3, 4, 4)], [(["a", "car"], torch.ones(1, 2, 2))])
    with pytest.raises(ValueError, match="captions must be 1"):
        attention_gallery([torch.zeros(3, 4, 4)], [])
