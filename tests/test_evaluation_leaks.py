"""The screens of a rationale: what gives a rating away, what is no whole paragraph."""

from __future__ import annotations

import pytest

from r4r_graph.evaluation.words.leaks import form_faults, is_well_formed, leaks, screens_digest
from r4r_graph.ratings import RatingScale

LEAKS = [
    "Rates it highly 5.",
    "The person gives it a 4.",
    "A solid 4 for this person.",
    "They would give it 4.5.",
    "I predict 3.5, given the pace.",
    "A score of 87 seems right.",
    "I expect a rating of four.",
    "The person gives it three.",
    "It would get one from them: they would give it one.",
    "Four out of five, since the jokes land.",
    "4 out of 5 for this person.",
    "One out of five.",
    "Ten out of ten.",
    "Expect 8/10.",
    "4.3/5 rating.",
    "A fit of ★★★★☆.",
    "⭐⭐⭐ at most.",
    "4* from this person.",
    "This earns five stars.",
    "A five-star record.",
    "One star at most.",
    "It earns four-and-a-half stars.",
    "Three and a half stars, then.",
    "3½ stars.",
    "½ star at best.",
    "４ stars.",
    "4stars.",
    "Two stars out of five.",
    "It is worth 4 points.",
    "There is a 90% chance that they like it.",
    "Ninety percent sure that it suits them.",
    "Full marks from this person.",
    "A perfect 10.",
    "Deserves a five.",
    "Rated 5.",
    "Rating: 5",
    "Score: 8",
    "Predicted rating is 4",
    "Somewhere between 3.5 and 4.",
    "Between a 3 and a 4.",
    "Likely a 4 or a 5.",
    "Expect 4,5.",
    "He would grade it a three, maybe less.",
    "He gives the album a two.",
    "He'd award it nine.",
    "It gets a 2.",
    "An A+ for the writing.",
    "A middling score.",
    "Earning it a low score.",
    "This would be a two for them.",
    "They would score this album around 4 because of the lyrics.",
    "On a scale of one to five, it is near the top.",
    # in words
    "It will get the highest rating.",
    "Their rating will be high.",
    "The user's rating may reflect a mismatch.",
    "The person would rate it highly.",
    "Rates this film poorly.",
    "The user has rated the item positively.",
    # a review of the candidate that nobody has seen
    "The user gave the item a perfect rating.",
    "The user's positive review of the item supports this.",
    "The user's review of the album mentions its pace.",
    "Their negative feedback on this film shows it.",
    "The person reviewed the film and loved it.",
]

HARMLESS = [
    "A classic from 1994 that still sounds fresh.",
    "In 1999 they went on.",
    "The set has 2 discs and a booklet.",
    "Fans of 50 Cent will feel at home.",
    "It recalls Blink-182, Sum 41, U2 and the Jackson 5.",
    "It is one of the best albums of the decade.",
    "Only three songs hold up.",
    "There are two or three weak spots.",
    "The five-piece band plays tightly.",
    "A 4-piece band from Leeds.",
    "A two-disc set with a one-two punch of singles.",
    "It is rated R for violence.",
    "An R rating would not put them off.",
    "The chemistry of the two stars carries the film.",
    "The film's two stars shine.",
    "An all-star cast in A Star Is Born.",
    "Four stars of the stage appear.",
    "A 5 minute song and a 12 inch mix.",
    "Track 4 drags on, and it gets better after track 5.",
    "Side one is strong and side two is weak.",
    "They waited for volume two.",
    "Season 4 lost them.",
    "A top ten single and a number two hit.",
    "It gives one the chills.",
    "It gives the listener two reasons to stay.",
    "They give every record one more chance.",
    "They want one that lasts.",
    "The score and one theme that lingers.",
    "The 9/11 documentary moved them.",
    "In 4/4 time and 3/4 time.",
    "Nine out of ten songs are filler.",
    "They disliked three out of five films by him.",
    "Seven Samurai and The Magnificent Seven are on their list.",
    "The score by two composers is lush.",
    "John Williams' perfect score lifts the film.",
    "It scores high on melody.",
    "A highly rated songwriter with a first-rate band.",
    "Led Zeppelin II set the tone, and Part 2 goes on.",
    "The 5.1 surround mix.",
    "MTV Unplugged 2.0",
    "They keep 24/7 radio on.",
    "The hits of the 80s and 90s.",
    "They like one-hit wonders.",
    "The first ten minutes drag.",
    "At one point the film stalls, but it makes a good point.",
    "It marks a return to form.",
    "It gave it all they had.",
    "Catch-22, Ocean's Eleven, Apollo 13 and Blade Runner 2049.",
    "The director's second film, made at 25, is raw.",
    "It was recorded in 2 days.",
    "A hundred years of solitude.",
    "She gave five shows in a week.",
    "Other users' reviews of the album praise the bass.",
    "Their review history shows a love of jazz.",
    "The person praised the pace of other thrillers and will enjoy this one.",
]


@pytest.mark.parametrize("text", LEAKS)
def test_a_leak_is_found(text: str) -> None:
    assert leaks(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_words_pass(text: str) -> None:
    assert leaks(text) == []


@pytest.mark.parametrize("text", LEAKS)
def test_a_leak_is_found_inside_a_paragraph(text: str) -> None:
    before = "They like slow, sad songs and this record is full of them"
    assert leaks(f"{before}. {text} So it suits them well enough.")
    assert not leaks(f"{before}. So it suits them well enough.")


def test_a_finding_names_its_kind_and_the_words() -> None:
    assert leaks("This is five  stars.") == ["stars: 'five stars'"]


def test_marks_count_on_the_scale_that_is_rated_on() -> None:
    assert leaks("It deserves a 17.", RatingScale.parse("0-20"))
    assert leaks("It deserves a 17.") == []
    assert leaks("Sixteen out of 20.", RatingScale.parse("0-20"))


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("100% Ginuwine", 'They will enjoy "100% Ginuwine" for its hooks.'),
        ("Five Stars for Failure", "They will enjoy Five Stars for Failure."),
        ("4.5", 'The album "4.5" suits them.'),
        ("Rating", 'The story of "Rating," as told here, suits them.'),
    ],
)
def test_titles_are_not_looked_at(title: str, text: str) -> None:
    assert leaks(text)
    assert leaks(text, titles=[title, "Other"]) == []


def test_a_title_hides_no_leak() -> None:
    assert leaks("They give the album a 4.", titles=["4"])
    assert leaks("They would say 4.5.", titles=["4.5"])
    assert leaks("It is worth five stars.", titles=["Five Stars", "A", ""])


GOOD = (
    "They praise honest lyrics and slow tempos, and this record has both. The long instrumentals "
    "may bore them, as they did before, but the voice weighs more."
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("......", "empty"),
        ("They will like it a lot.", "too short"),
        (" ".join(f"word{'abcdefghij'[i % 10]}{i}" for i in range(200)) + ".", "too long"),
        (GOOD[:-1], "unfinished"),
        (GOOD + " They would also like the", "unfinished"),
        (GOOD + " " + GOOD, "repeats a sentence"),
        (
            "It meets their taste for slow sad songs about home. It meets their taste for slow "
            "sad films. It meets their taste for slow sad books.",
            "repeats a run of words",
        ),
        (GOOD + " " + GOOD.replace("but", "yet").replace("They", "We"), "repeats a run of words"),
        (GOOD + "\n\nThey may also like others of this kind.", "several paragraphs"),
        ("- honest lyrics\n- slow tempos that they have praised before.", "list"),
        ("1. They praise honest lyrics. 2. They praise slow tempos and long songs.", "list"),
        (GOOD + "</p>", "markup"),
        ("**Verdict** " + GOOD, "markup"),
        (GOOD + " | 7 | 8 |.", "markup"),
        (GOOD + ".......", "markup"),
        (GOOD + " 1, 2, 3, 4, 5, 6, 7.", "row of numbers"),
        ("Rationale: " + GOOD, "words of a prompt"),
        ("positive: honest lyrics; negative: none; they will like all of it.", "words of a prompt"),
        (GOOD + " Let me know if you need more.", "words of a prompt"),
        ("Sure, " + GOOD, "words of a prompt"),
        (
            "The person's notes on earlier things come first, and they praise honest lyrics.",
            "words of a prompt",
        ),
        ("?!?! ;;;; ((((( " * 12 + GOOD, "no prose"),
    ],
)
def test_faults_of_form(text: str, fault: str) -> None:
    assert fault in form_faults(text)
    assert not is_well_formed(text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f'They said: "{GOOD}"',
        GOOD + " It could be the year's best!",
        'The user will likely enjoy "Best of 1980, Vol. 1" for its melodies and its warm sound.',
        "They love slow tempos (as in earlier records), so this should suit them (mostly).",
    ],
)
def test_a_whole_paragraph_has_no_faults(text: str) -> None:
    assert form_faults(text) == []
    assert is_well_formed(text)


def test_a_long_title_may_be_repeated() -> None:
    title = "A Very Long Title That Goes On And On For Ever"
    text = f'"{title}" has wit. They praise wit, and "{title}" has heart. So "{title}" fits them.'
    assert "repeats a run of words" in form_faults(text)
    assert form_faults(text, titles=[title]) == []


def test_the_longest_length_is_a_setting() -> None:
    assert form_faults(GOOD, most_words=10) == ["too long"]


def test_the_digest_tells_screens_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    before = screens_digest()
    assert before == screens_digest()
    monkeypatch.setattr("r4r_graph.evaluation.words.leaks.FEWEST_WORDS", 9)
    assert screens_digest() != before
