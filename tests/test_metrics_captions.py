"""Caption metrics against pycocoevalcap: the tokens of its Java tokenizer, the numbers of its Python scorers."""

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pycocoevalcap.tokenizer.ptbtokenizer as official_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from mm_gpt.errors import MMGPTError
from mm_gpt.eval.metrics.captions import bleu, cider_d, rouge_l
from mm_gpt.eval.metrics.statistics import bootstrap_statistic, wilson_interval
from mm_gpt.eval.metrics.tokenize import ptb_tokenize

# What stanford-corenlp-3.4.1.jar printed for each line, less the punctuation that pycocoevalcap removes.
JAVA_TOKENS = [
    ("A man's dog can't jump over the boys' fence.", "a man 's dog ca n't jump over the boys fence"),
    (
        "They're here, I'm not; she'd say it's what we'll've done.",
        "they 're here i 'm not she 'd say it 's what we 'll 've done",
    ),
    ("DON'T Can't won't ain't shan't isn't", "do n't ca n't wo n't ai n't sha n't is n't"),
    (
        "You cannot, we're gonna, I gotta, lemme, gimme, wanna",
        "you can not we 're gon na i got ta lem me gim me wan na",
    ),
    ("'Tis the season and 'twas cold", "'t is the season and 't was cold"),
    (
        "rock 'n' roll, rock'n'roll, rock n' roll, fish'n'chips",
        "rock 'n' roll rock 'n' roll rock n roll fish 'n' chips",
    ),
    (
        "y'all ma'am o'clock o'er d'you O'Brien's l'amour Hawai'i",
        "y' all ma'am o'clock o'er d'you o'brien 's l'amour hawai'i",
    ),
    ("Jones' car, Jones's car, the '90s, the 1990's, the 60s", "jones car jones 's car the '90s the 1990 's the 60s"),
    ("He said \"hello,\" and 'goodbye'.", "he said hello and goodbye"),
    ("“Curly quotes” and ‘single’ ones, it’s fine", "curly quotes and single ones it 's fine"),
    ("A dog (brown) with [text] and {braces}", "a dog -lrb- brown -rrb- with -lsb- text -rsb- and -lcb- braces -rcb-"),
    ("A smile :) and :-( and ;)", "a smile :-rrb- and :--lrb- and ;-rrb-"),
    ("A well-known t-shirt, a 10-year-old's x-ray", "a well-known t-shirt a 10-year-old 's x-ray"),
    ("a--b, a -- b, a - b, a — b, a–b, -----", "a b a b a b a b a b -----"),
    ("mid-'90s pre-1990 -leading trailing-", "mid '90s pre-1990 leading trailing"),
    ("Wait... what.. now. . . end.", "wait what now end"),
    ("A dog runs.A cat sits.", "a dog runs.a cat sits"),
    ("Mr. Smith, Mrs. Jones and Dr. Who on St. John's Ave.", "mr. smith mrs. jones and dr. who on st. john 's ave."),
    ("The U.S. flag and the U.S.A. in Washington D.C.", "the u.s. flag and the u.s.a. in washington d.c."),
    ("a U.S.-based J.K. Rowling fan with a Ph.D. degree", "a u.s.-based j.k. rowling fan with a ph.d. degree"),
    ("No. 5 and no. 7 but no. Not no.", "no. 5 and no. 7 but no not no"),
    ("see fig. 2 and pp. 3-4 but a fig. tree", "see fig. 2 and pp. 3-4 but a fig tree"),
    ("Inc. Corp. Ltd. Jr. etc. e.g. i.e. vs. a.m. p.m.", "inc. corp. ltd. jr. etc. e.g. i.e. vs. a.m. p.m."),
    ("approx. 5 lbs. of oz. and in. of ft. long", "approx 5 lbs of oz and in of ft. long"),
    ("Plan b. The dog; plan B. some dog; J. Doe", "plan b the dog plan b. some dog j. doe"),
    ("a dog., a cat.; a bird.: end", "a dog. a cat. a bird. end"),
    ("1,000 people, 3.5 miles, 10:30 am, .5 cups, 5. end", "1,000 people 3.5 miles 10:30 am .5 cups 5 end"),
    (
        "5-6 and 3-4-5 and 1/2 and 3 1/2 and 24/7 and 12/25/2010",
        "5-6 and 3-4-5 and 1/2 and 3\u00a01/2 and 24/7 and 12/25/2010",
    ),
    ("½ cup and 1½ cups", "1/2 cup and 1 1/2 cups"),
    ("$5, $ 5.50, £3, €4, 5¢, US$5, C$5, 50% off", "$ 5 $ 5.50 # 3 $ 4 5 cents us$ 5 c$ 5 50 % off"),
    ("#1 dog, #tag, @home, # 2", "# 1 dog #tag @home # 2"),
    ('6\'5" tall, 5\' 10", a 36" TV', "6 5 tall 5 10 a 36 tv"),
    (
        "call (555) 123-4567 or 555-1234 or 1-800-555-1234",
        "call -lrb-555-rrb-\u00a0123-4567 or 555-1234 or 1-800-555-1234",
    ),
    ("2+2=4, a+b, -5 degrees, +5, a = b", "2 +2 = 4 a + b -5 degrees +5 a = b"),
    ("4x4 mp3 3rd 21st-century 3.5-inch 1/2-inch 5pm", "4x4 mp3 3rd 21st-century 3.5-inch 1/2-inch 5pm"),
    ("and/or his/her w/ b/w n/a man/woman-like", "and/or his/her w / b/w n/a man/woman-like"),
    ("AT&T, R&B, Q & A, black&white, H&M", "at&t r&b q & a black & white h&m"),
    ("What?! No!! Yes? Stop! Huh??", "what ?! no !! yes stop huh ??"),
    ("semi; colon: a,b,c red,white 5,cat", "semi colon a b c red white 5 cat"),
    ("* star ** two ~ ^ | \\ / under_score _x_ @@ ##", "* star ** two ~ ^ | \\ / under_score _ x _ @@ ##"),
    ("<b>bold</b> and <br/> and 3 < 4 > 2 <3", "<b> bold </b> and <br/> and 3 < 4 > 2 < 3"),
    ("tom &amp; jerry &lt;3 &quot;hi&quot;&nbsp;x", "tom & jerry < 3 hi x"),
    (
        "visit http://x.com/a?b=c or www.foo.org, foo.com. me@x.com",
        "visit http://x.com/a?b=c or www.foo.org foo.com me@x.com",
    ),
    ("C++ and C# and J.Crew and Yahoo! and O.K.", "c++ and c# and j.crew and yahoo and o.k."),
    ("café naïve Ñandú résumé's 日本 привет-мир ñ.", "café naïve ñandú résumé 's 日本 привет-мир ñ"),
    ("100°F ™ ® © • ² × ÷", "100 ° f ™ ® © • ² × ÷"),
    ("a.b.c ab.cd. A. B. c.", "a.b.c ab.cd a. b. c."),
    ("hello!world why?not 5!6", "hello!world why?not 5 6"),
    ("dog's's 's 't n't 'em 'cause 'til", "dog 's 's 's t n't 'em 'cause 'til"),
    ("two  spaces\tand a tab", "two spaces and a tab"),
    (".", ""),
    ("!", ""),
    ("the dog's-eye view, mother-in-law's, drive-thru's", "the dog 's eye view mother-in-law 's drive-thru 's"),
    ('"Stop!" she said. "no?" (a.k.a. B.)', "stop she said no -lrb- a.k.a. b. -rrb-"),
    ("girl(s) in a red/white/blue dress", "girl -lrb- s -rrb- in a red/white/blue dress"),
    ("10km 100m 7-Eleven 360-degree 20's No.1", "10km 100m 7-eleven 360-degree 20 's no. 1"),
    (
        'Two men , one with a hat , are near a " No Parking " sign .',
        "two men one with a hat are near a no parking sign",
    ),
    ("a man in a #23 jersey ; another in # 4", "a man in a # 23 jersey another in # 4"),
    ('D.J. plays "la la" on TV.', "d.j. plays la la on tv"),
    ("p.s. I love you... NOT!!!", "p.s. i love you not !!!"),
    ("एक कुत्ता पानी में खेल रहा है।", "एक कुत्ता पानी में खेल रहा है ।"),
    ("ป่า ป้า பால் দিন כِתָב", "ป่า ป้า பால் দিন כِתָב"),
    ("a cafe\u0301 don't ভালো", "a cafe\u0301 do n't ভালো"),
]


@pytest.mark.parametrize(("line", "tokens"), JAVA_TOKENS)
def test_tokens_are_those_of_the_java_tokenizer(line: str, tokens: str) -> None:
    """A different tokenizer moves every caption score."""
    assert ptb_tokenize(line) == tokens


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_golden_table_is_what_the_jar_prints(tmp_path: Path) -> None:
    """A golden table edited by hand would make the port agree with nobody."""
    # A neutral line between two keeps the jar, which reads the file as one text, from looking at the next case.
    lines = [text for line, _ in JAVA_TOKENS for text in (line, "foo")]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    jar = Path(official_tokenizer.__file__).with_name(official_tokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", str(tmp_path / "lines.txt")]
    printed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\n")
    kept = [
        " ".join(token for token in line.rstrip().split(" ") if token not in official_tokenizer.PUNCTUATIONS)
        for line in printed[::2]
    ]
    assert kept == [tokens for _, tokens in JAVA_TOKENS]


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_tokenizes_without_punctuation_or_double_spaces(text: str) -> None:
    """Odd model output (control characters, emoji, lone marks) must neither raise nor loop."""
    tokens = ptb_tokenize(text)
    assert tokens == tokens.strip(" ")
    assert "  " not in tokens
    assert not set(tokens.split(" ")) & set(official_tokenizer.PUNCTUATIONS)


def test_plain_words_take_the_same_way_as_the_rules() -> None:
    """The shortcut for plain words once tokenized what the rules split ("cannot")."""
    assert ptb_tokenize("Cannot cannots, gonna Wanna x") == "can not cannots gon na wan na x"


def official_scores(candidates: list[str], references: list[list[str]]) -> dict[str, tuple[float, np.ndarray]]:
    results = {i: [ptb_tokenize(candidate)] for i, candidate in enumerate(candidates)}
    truths = {i: [ptb_tokenize(reference) for reference in group] for i, group in enumerate(references)}
    bleu_scores, bleu_items = Bleu(4).compute_score(truths, results, verbose=0)
    scores = {f"BLEU-{n + 1}": (bleu_scores[n], np.array(bleu_items[n])) for n in range(4)}
    return scores | {
        "ROUGE-L": Rouge().compute_score(truths, results),
        "CIDEr-D": Cider().compute_score(truths, results),
    }


def assert_equals_official(candidates: list[str], references: list[list[str]]) -> None:
    official = official_scores(candidates, references)
    for score in [*bleu(candidates, references), rouge_l(candidates, references), cider_d(candidates, references)]:
        expected, per_item = official[score.metric]
        # 1e-9: both are double precision, only the order of sums and powers differs.
        assert score.score == pytest.approx(expected, abs=1e-9, rel=1e-9), score.metric
        np.testing.assert_allclose(score.per_item, per_item, rtol=1e-9, atol=1e-9, err_msg=score.metric)


WORDS = st.sampled_from(["a", "dog", "cat", "the", "man's", "red", "runs", "(left)", "3 1/2", "."])
SENTENCE = st.lists(WORDS, max_size=9).map(" ".join)
ITEM = st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4))


@given(st.lists(ITEM, min_size=1, max_size=6).filter(lambda items: any(ptb_tokenize(r) for _, g in items for r in g)))
@settings(max_examples=150, deadline=None)
def test_scores_equal_pycocoevalcap_on_generated_captions(items: list[tuple[str, list[str]]]) -> None:
    """Empty captions, repeated words, one image, equal lengths: the corners of clipping, smoothing and idf."""
    assert_equals_official([candidate for candidate, _ in items], [group for _, group in items])


def realistic_captions(num_images: int) -> tuple[list[str], list[list[str]]]:
    generator = random.Random(0)
    subjects = ["A brown dog", "Two men in hats", "The little girl's friend", "A snowboarder", "A black-and-white cat"]
    verbs = ["is running", "jumps", "are sitting", "can't stop playing", "looks up"]
    places = ["on the grass .", "near a river", 'in front of a "Stop" sign', "at the beach , smiling", "in the snow"]

    def caption() -> str:
        return " ".join(generator.choice(part) for part in (subjects, verbs, places))

    return [caption() for _ in range(num_images)], [[caption() for _ in range(5)] for _ in range(num_images)]


def test_scores_equal_pycocoevalcap_on_realistic_captions() -> None:
    assert_equals_official(*realistic_captions(120))


def test_cider_of_perfect_captions() -> None:
    """Golden numbers: the x10 scale, the mean over references, idf of one image, and captions without 4-grams."""
    long = ["a brown dog runs in the park", "two children play on red swings", "old boats lie on blue water"]
    assert cider_d(long, [[caption] for caption in long]).score == pytest.approx(10.0)
    others = [
        "unrelated words fill this one up",
        "nothing here is shared at all",
        "completely different text again now",
    ]
    half = cider_d(long, [[caption, other] for caption, other in zip(long, others, strict=True)])
    assert half.score == pytest.approx(5.0)
    assert cider_d(long[:1], [[long[0]]]).score == 0
    short = ["brown dog runs", "children play outside", "boats float away"]
    assert cider_d(short, [[caption] for caption in short]).score == pytest.approx(7.5)


def test_bleu_uses_the_shorter_of_two_equally_close_references() -> None:
    """Four words against references of three and five: no brevity penalty, as 3 is taken."""
    [bleu_1] = bleu(["w x y z"], [["w x y", "w x y z v"]], max_n=1)
    assert bleu_1.score == pytest.approx(1.0)


def test_rouge_takes_precision_and_recall_from_different_references() -> None:
    """P = 2/3 from the long reference, R = 1 from the short one; with the long one alone R = 2/5. Beta is 1.2."""
    score = rouge_l(["dog runs away"], [["dog runs over there now"]]).score
    assert score == pytest.approx((1 + 1.44) * (2 / 3) * (2 / 5) / (2 / 5 + 1.44 * 2 / 3))
    both = rouge_l(["dog runs away"], [["dog runs over there now", "away"]]).score
    assert both == pytest.approx((1 + 1.44) * (2 / 3) / (1 + 1.44 * 2 / 3))


@pytest.mark.parametrize("metric", [cider_d, rouge_l, bleu])
def test_bad_input_is_named(metric) -> None:  # type: ignore[no-untyped-def]
    """A bare string as references would be scored letter by letter."""
    with pytest.raises(MMGPTError, match="1 candidate captions for 2 sets"):
        metric(["a"], [["a"], ["b"]])
    with pytest.raises(MMGPTError, match="no captions"):
        metric([], [])
    with pytest.raises(MMGPTError, match="caption 1 has no reference"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(MMGPTError, match="caption 0 must be a list"):
        metric(["a"], ["a dog"])


def test_intervals_hold_the_score_and_bleu_resamples_the_corpus_score() -> None:
    """BLEU's interval must be of the corpus score, not of the mean of smoothed sentence scores."""
    candidates, references = realistic_captions(60)
    bleu_4 = bleu(candidates, references)[3]
    assert bleu_4.per_item.mean() != pytest.approx(bleu_4.score, abs=0.01)
    for score in (bleu_4, cider_d(candidates, references), rouge_l(candidates, references)):
        low, high = score.interval(resamples=500)
        assert low < score.score < high
        assert score.interval(resamples=500) == (low, high)
    generator = np.random.default_rng(0)  # the same resamples, scored from scratch
    slow = []
    for _ in range(40):
        drawn = generator.integers(60, size=60)
        slow.append(bleu([candidates[i] for i in drawn], [references[i] for i in drawn])[3].score)
    low, high = bleu_4.interval(resamples=40)
    np.testing.assert_allclose([low, high], np.quantile(slow, [0.025, 0.975]), rtol=1e-9)


def test_bootstrap_of_a_normal_sample_matches_theory() -> None:
    values = np.random.default_rng(1).normal(size=2000)
    low, high = bootstrap_statistic(lambda indices: values[indices].mean(axis=1), len(values), resamples=4000)
    half_width = 1.96 * values.std() / 2000**0.5
    # The quantiles of 4000 resamples wander by about 3 % of the half-width.
    assert low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)
    assert bootstrap_statistic(lambda indices: np.full(len(indices), 0.25), 7) == (0.25, 0.25)


def test_bootstrap_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resamples lost or repeated at the border of two chunks would narrow the interval."""
    values = np.random.default_rng(2).random(50)

    def interval() -> tuple[float, float]:
        return bootstrap_statistic(lambda indices: values[indices].mean(axis=1), 50, resamples=101)

    whole = interval()
    monkeypatch.setattr("mm_gpt.eval.metrics.statistics._CHUNK", 350)
    assert interval() == whole
    calls: list[int] = []
    bootstrap_statistic(lambda indices: calls.append(len(indices)) or indices[:, 0], 50, resamples=10)  # type: ignore
    assert sum(calls) == 10


def test_wilson_interval() -> None:
    """Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for successes, n, expected in [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ]:
        assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)
    low, high = wilson_interval(29, 29)
    assert low > 0.85
    assert high == 1.0


def test_statistics_refuse_what_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_statistic(lambda indices: indices[:, 0], 0)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_statistic(lambda indices: indices[:, 0], 1, confidence=95)
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(3, 2)
