"""BLEU against the paper's examples and a loop, perplexity, attention inside boxes, and the evaluators of language."""

import json
import math

import pytest
import torch

from tests import naive
from vision3dgen.datasets import Vocabulary
from vision3dgen.language import END, PAD
from vision3dgen.metrics import Caption, CaptionEvaluator, Guesses, LanguageEvaluator, bleu, perplexity, pointing
from vision3dgen.metrics.language import attention_inside

# Papineni et al. 2002, section 2.1, examples 1 and 2.
REFERENCES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
CANDIDATE_1 = "It is a guide to action which ensures that the military always obeys the commands of the party"
CANDIDATE_2 = "It is to insure the troops forever hearing the activity guidebook that party direct"


def words(text):
    return text.lower().split()


def test_precisions_of_the_paper():
    references = [[words(text) for text in REFERENCES]]
    first = bleu([words(CANDIDATE_1)], references)
    assert first.precisions[:2] == pytest.approx((17 / 18, 10 / 17))
    second = bleu([words(CANDIDATE_2)], references)
    assert second.precisions[:2] == pytest.approx((8 / 14, 1 / 13))
    assert first.length == 18
    assert first.reference_length == 18
    assert first.brevity_penalty == 1
    assert first.scores[1] == pytest.approx(math.sqrt(17 / 18 * 10 / 17))


def test_counts_are_clipped():
    known = [[words("the cat is on the mat"), words("there is a cat on the mat")]]
    assert bleu([["the"] * 7], known).precisions[0] == pytest.approx(2 / 7)


def test_short_candidates_pay():
    score = bleu([words("a red chair")], [[words("a red chair left of a table")]])
    assert score.precisions[:3] == (1, 1, 1)
    assert score.brevity_penalty == pytest.approx(math.exp(1 - 7 / 3))
    assert score.scores[2] == pytest.approx(math.exp(1 - 7 / 3))
    assert score.scores[3] == 0  # there is no run of four words


def test_the_closest_reference_counts_and_the_shorter_of_two():
    score = bleu([words("a b c d e")], [[words("a b c"), words("a b c d e f g"), words("a b c d e f g h")]])
    assert score.reference_length == 3
    assert score.brevity_penalty == 1


def random_corpus(seed, size=7):
    generator = torch.Generator().manual_seed(seed)

    def sentence():
        length = int(torch.randint(1, 12, (), generator=generator))
        return torch.randint(0, 4, (length,), generator=generator).tolist()

    candidates = [sentence() for _ in range(size)]
    return candidates, [[sentence() for _ in range(1 + i % 3)] for i in range(size)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("smoothing", ["none", "add_one"])
def test_bleu_is_the_loop(seed, smoothing):
    candidates, references = random_corpus(seed)
    result = bleu(candidates, references, smoothing=smoothing)
    for n in range(1, 5):
        expected = naive.bleu(candidates, references, n, add_one=smoothing == "add_one")
        assert result.scores[n - 1] == pytest.approx(expected, abs=1e-12)
    shuffled = [references[i][::-1] for i in range(len(references))]
    assert bleu(candidates, shuffled, smoothing=smoothing) == result


def test_a_corpus_is_not_the_mean_of_its_sentences():
    candidates, references = [words("a b c d e"), words("x y")], [[words("a b c d e")], [words("p q")]]
    assert bleu(candidates, references, order=1).scores == pytest.approx((5 / 7,))


def test_perfect_and_hopeless_candidates():
    candidates, _ = random_corpus(3)
    assert bleu(candidates, [[c] for c in candidates]).scores == pytest.approx((1, 1, 1, 1))
    assert bleu([["a"]], [[["b"]]]).scores == (0, 0, 0, 0)
    empty = bleu([[]], [[["b"]]])
    assert empty.scores == (0, 0, 0, 0)


def test_bad_input_to_bleu():
    with pytest.raises(ValueError, match="at least one"):
        bleu([], [])
    with pytest.raises(ValueError, match="1 candidates and 2 lists"):
        bleu([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="candidate 1 has no reference"):
        bleu([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(ValueError, match="unknown smoothing 'add-one'"):
        bleu([["a"]], [[["a"]]], smoothing="add-one")


def test_perplexity_of_a_uniform_model_is_the_number_of_words():
    count = torch.tensor([3, 5, 1])
    assert perplexity(count * math.log(50.0), count) == pytest.approx(50)
    # of a corpus: long sentences count more
    assert perplexity(torch.tensor([2.0, 3.0]), torch.tensor([1, 4])) == pytest.approx(math.e)
    with pytest.raises(ValueError, match="at least one word"):
        perplexity(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------- attention


def test_attention_inside_boxes_by_hand():
    attention = torch.zeros(2, 3)
    attention[0, 1], attention[1, 2] = 0.75, 0.25
    inside, covered = attention_inside(attention, torch.tensor([[4.0, 0.0, 8.0, 4.0]]), (8, 12))
    assert (inside, covered) == pytest.approx((0.75, 1 / 6))
    half = torch.tensor([[4.0, 0.0, 6.0, 4.0], [5.0, 0.0, 6.0, 4.0]])  # the second lies in the first
    assert attention_inside(attention, half, (8, 12)) == pytest.approx((0.375, 1 / 12))
    uniform = torch.full((2, 3), 1 / 6)
    inside, covered = attention_inside(uniform, torch.tensor([[1.0, 2.0, 9.0, 5.0]]), (8, 12))
    assert inside == pytest.approx(covered) == pytest.approx(8 * 3 / 96)


def test_pointing_counts_words_that_name_something():
    look = torch.zeros(3, 2, 2)
    look[0], look[1, 0, 0], look[2, 1, 1] = 0.25, 1, 1
    corner = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    found = pointing([(["a", "red", "car"], look)], [{"red": corner, "car": corner}], (4, 4))
    assert (found.ratio, found.inside, found.covered, found.count) == pytest.approx((2, 0.5, 0.25, 2))
    everywhere = pointing([(["red"], look[:1])], [{"red": corner}], (4, 4))
    assert everywhere.ratio == pytest.approx(1)
    assert pointing([(["a"], look[:1])], [{"red": corner}], (4, 4)) is None


# --------------------------------------------------------------------------------------------------------- evaluators

VOCABULARY = Vocabulary(["a", "red", "car", "sofa"])


def caption_batches():
    for first in (0, 2):
        ids = [str(i) for i in range(first, min(first + 2, 3))]
        yield {"id": ids, "vocabulary": [VOCABULARY] * len(ids), "captions": [["a red car", "A car"]] * len(ids)}


def test_captions_are_scored_against_all_references(tmp_path):
    said = {"0": [5, 6, 7], "1": [5, 7, END, PAD], "2": [5, 6, 8]}

    def predict(batch):
        return [Caption(torch.tensor(said[i]), torch.tensor(-1.5), None) for i in batch["id"]]

    evaluator = CaptionEvaluator(examples=2)
    scores = evaluator.evaluate("bleu", caption_batches(), predict, tmp_path, split="test", seed=0)
    candidates = [["a", "red", "car"], ["a", "car"], ["a", "red", "sofa"]]
    assert scores.bleu == bleu(candidates, [[["a", "red", "car"], ["a", "car"]]] * 3)
    assert scores.exact == pytest.approx(2 / 3)
    rows = [json.loads(row) for row in (tmp_path / "bleu_test.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == ["a red car", "a car", "a red sofa"]
    summary = json.loads((tmp_path / "bleu_test.json").read_text())
    assert summary["BLEU-1"] == pytest.approx(scores.bleu.scores[0])
    assert [e["id"] for e in summary["examples"]] == ["0", "1"]
    assert "BLEU-4" in scores.to_markdown()
    assert "a red car" in scores.to_markdown()
    with pytest.raises(ValueError, match="no image"):
        evaluator.evaluate("bleu", [], predict, tmp_path, split="val", seed=0)


def test_a_text_is_scored_word_by_word(tmp_path):
    guesses = [
        Guesses(torch.tensor([1.0, 3.0]), torch.tensor([1, 2]), torch.tensor([1, 0])),
        Guesses(torch.tensor([4.0]), torch.tensor([5]), torch.tensor([3])),
    ]
    batches = [{"id": ["x", "y"]}, {"id": ["z"]}]
    given = iter(guesses)
    scores = LanguageEvaluator().evaluate("perplexity", batches, lambda b: next(given), tmp_path, split="val", seed=0)
    assert scores.perplexity == pytest.approx(math.e)
    assert (scores.accuracy, scores.words) == (0.5, 8)
    assert len((tmp_path / "perplexity_val.jsonl").read_text().splitlines()) == 3
