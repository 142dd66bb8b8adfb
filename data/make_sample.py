"""Generate the sample data: instructions with answers, and the prose that the small base has read.

    python data/make_sample.py records                                  # data/sample_*.json
    python data/make_sample.py fresh --seed 8 --count 1200 --out fresh.json   # more held-out ones
    python data/make_sample.py prose --lines 150000 --out prose.jsonl   # {"text": ...} a line

Everything is drawn with a seed from the word lists and sentence patterns below, so the same command
writes the same bytes.

  - The prose states facts (The capital of Peru is Lima), says what is in a list and what that is in
    reverse order, lists phrases above what they stand for, and contains much that means nothing.
    The headings of Alpaca's template occur in it, above unrelated sentences. A request is never
    followed by its answer: a model that has read only the prose does not follow instructions.
  - The words of `HELD` occur in the prose and in no training record. Half of the held-out records
    are about them, so their answers can only come from the prose. Each held-out record says what
    is "new" in it: a "word" of these, a "wording" that its family never has in training, or only
    the "question".
"""

import argparse
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
SEED, TRAIN, HELD_OUT = 7, 5400, 240


def table(text: str) -> dict[str, str]:
    """Parse "a:b c:d"."""
    return dict(pair.split(":") for pair in text.split())


def entries(text: str) -> list[str]:
    """Split at every | and every newline."""
    return text.replace("\n", "|").split("|")


def successors(words: list[str]) -> dict[str, str]:
    """Each word → the next one."""
    return dict(pairwise(words))


KINDS = {
    "animal": "cat dog cow pig hen fox owl bee ant bear wolf duck goat frog horse sheep lion mouse "
    "goose deer crow snake",
    "fruit": "apple pear plum fig lemon lime peach grape melon cherry",
    "plant": "rose oak pine bean pea corn leek elm birch",
    "tool": "axe saw spade knife fork spoon pan pot rope nail",
    "garment": "hat coat shoe sock shirt scarf glove belt",
    "drink": "tea milk wine juice beer water",
    "metal": "iron gold tin silver copper zinc",
    "vehicle": "car bus train ship boat bike van sledge",
    "furniture": "table chair bed desk lamp shelf bench",
    "body part": "hand foot head ear nose arm leg",
}
KIND_OF = {noun: kind for kind, nouns in KINDS.items() for noun in nouns.split()}
NOUNS = list(KIND_OF)
THINGS = [noun for noun in NOUNS if KIND_OF[noun] not in ("drink", "metal", "body part")]
ODD_PLURALS = table(
    "mouse:mice goose:geese sheep:sheep deer:deer knife:knives wolf:wolves cherry:cherries "
    "shelf:shelves bench:benches birch:birches peach:peaches bus:buses"
)
CAPITALS = """France:Paris Italy:Rome Spain:Madrid Japan:Tokyo Egypt:Cairo Peru:Lima Cuba:Havana
    Kenya:Nairobi China:Beijing Greece:Athens Norway:Oslo Russia:Moscow Poland:Warsaw Iraq:Baghdad
    Austria:Vienna Germany:Berlin Ireland:Dublin Portugal:Lisbon Sweden:Stockholm Chile:Santiago
    Iran:Tehran Qatar:Doha Ghana:Accra Canada:Ottawa Turkey:Ankara Hungary:Budapest Lebanon:Beirut
    Finland:Helsinki Ukraine:Kyiv Senegal:Dakar"""
OPPOSITES = """hot:cold big:small young:old near:far fast:slow dark:light early:late high:low
    wet:dry full:empty up:down day:night rich:poor hard:soft good:bad strong:weak clean:dirty
    thick:thin happy:sad deep:shallow sweet:sour wide:narrow cheap:dear north:south east:west
    summer:winter"""
PAST = """walk:walked go:went see:saw eat:ate sing:sang run:ran come:came drink:drank swim:swam
    fly:flew fall:fell know:knew make:made buy:bought think:thought sleep:slept hold:held
    jump:jumped play:played wait:waited cook:cooked ride:rode bring:brought teach:taught win:won
    lose:lost sit:sat stand:stood wash:washed build:built"""
SOUNDS = """cow:moo cat:meow dog:woof duck:quack pig:oink bee:buzz sheep:baa frog:croak owl:hoot
    horse:neigh hen:cluck lion:roar wolf:howl snake:hiss mouse:squeak goose:honk crow:caw"""
YOUNG = """dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid hen:chick duck:duckling
    pig:piglet frog:tadpole goose:gosling lion:cub deer:fawn bear:cub fox:cub owl:owlet"""
COLOURS = """lemon:yellow snow:white grass:green blood:red coal:black sky:blue milk:white sea:blue
    cherry:red frog:green crow:black lime:green corn:yellow plum:purple peach:orange pea:green
    rose:red mud:brown bear:brown salt:white night:black carrot:orange gold:yellow pig:pink"""
FRENCH = """cat:chat dog:chien bread:pain milk:lait moon:lune house:maison horse:cheval book:livre
    apple:pomme tree:arbre fish:poisson hand:main night:nuit day:jour red:rouge blue:bleu
    green:vert black:noir white:blanc king:roi door:porte water:eau lemon:citron pear:poire
    wolf:loup"""
NUMBERS, DAYS, MONTHS, HELD = map(
    str.split,
    (
        """one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty""",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        """January February March April May June July August September October November
    December""",
        """wolf owl goat pig deer hen melon fig lime elm rose pea saw nail pot scarf belt wine beer
    zinc tin van bus desk bench nose arm Egypt Japan Norway Peru Ghana Hungary Lebanon Senegal
    hot cold early late rich poor thick thin wide narrow east west see run swim buy hold ride lose
    snow grass salt bread moon king""",
    ),
)
BOTH_WAYS = table(OPPOSITES) | {b: a for a, b in table(OPPOSITES).items()}
PLURALS = {noun: ODD_PLURALS.get(noun, noun + "s") for noun in THINGS}
SUMS = {f"{NUMBERS[a]} and {NUMBERS[b]}": NUMBERS[a + b + 1] for a in range(10) for b in range(10)}

# Families of facts: (wordings, {question: answer}). Wordings are the phrase that names the answer,
# what replaces the question in it when that is the input, and another way to ask.
LOOKUPS = {
    "capital": ("the capital of {}|this country|Which city is the capital of {}?", table(CAPITALS)),
    "opposite": ("the opposite of {}|this word|Which word is the opposite of {}?", BOTH_WAYS),
    "past": ("the past tense of {}|this verb|Put {} into the past tense.", table(PAST)),
    "plural": ("the plural of {}|this noun|Make a plural of {}.", PLURALS),
    "sound": ("the sound of {a}|this animal|What does {a} say?", table(SOUNDS)),
    "young": ("the young of {a}|this animal|What do you call the young of {a}?", table(YOUNG)),
    "colour": ("the colour of {}|this thing|Which colour is {}?", table(COLOURS)),
    "french": ("the French word for {}|this word|Translate {} into French.", table(FRENCH)),
    "kind": ("the group that {} belongs to|this word|What kind of thing is {}?", KIND_OF),
    "upper": (
        "the word {} in capital letters|below|Write the word {} in capitals.",
        {noun: noun.upper() for noun in NOUNS},
    ),
    "sum": ("the sum of {}|these numbers|Add {}.", SUMS),
    "day": ("the day after {}|this day|Which day comes after {}?", successors(DAYS)),
    "month": ("the month before {}|this month|Which month is before {}?", successors(MONTHS[::-1])),
    "number": ("the number after {}|this number|Which number comes after {}?", successors(NUMBERS)),
}
# Families about a list: (the phrase and another way to ask, a function that gives the answer for
# the words x and one of them, w, that is not the last).
LISTS = {
    "copy": ("a copy of the list|Repeat the list.", lambda x, w: " ".join(x)),
    "first": ("the first word of the list|Which word is first in the list?", lambda x, w: x[0]),
    "second": ("the second word of the list|Which word is second in the list?", lambda x, w: x[1]),
    "last": ("the last word of the list|Which word is last in the list?", lambda x, w: x[-1]),
    "reverse": ("the list in reverse order|Reverse the list.", lambda x, w: " ".join(x[::-1])),
    "count": (
        "the number of words in the list|How many words are in the list?",
        lambda x, w: NUMBERS[len(x) - 1],
    ),
    "follows": (
        "the word that follows {} in the list|Which word comes after {} in the list?",
        lambda x, w: x[x.index(w) + 1],
    ),
    "without": (
        "the list without {}|Take {} out of the list.",
        lambda x, w: " ".join(word for word in x if word != w),
    ),
}
FAMILIES = [*LOOKUPS, *LISTS]
OPENERS = entries("""What is {}?|Name {}.|Give me {}.|Tell me {}.|Write {}.|Say {}.|Please find {}.
Please write down {}.|I would like to have {}.|Can you give me {}?|Find {}.|Show me {}.""")


def an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def draw_list(rng: random.Random, words: list[str]) -> list[str]:
    return rng.sample(words, rng.choice((2, 3, 3, 4, 4, 5, 6)))


# ---------------------------------------------------------------- records


def draw_record(rng: random.Random, family: str, words: list[str], new_wording: bool) -> dict:
    """A record of the family. One opener per family is reserved for new wordings."""
    reserved = OPENERS[FAMILIES.index(family) % len(OPENERS)]
    openers = [reserved] if new_wording else [o for o in OPENERS if o != reserved]
    use_input = rng.random() < 0.5
    if family in LOOKUPS:
        texts, facts = LOOKUPS[family]
        phrase, this, other = texts.split("|")
        about = rng.choice(list(facts))
        output, input = facts[about], about if use_input else ""
        subject, with_article = (this, this) if use_input else (about, an(about))
    else:
        texts, solve = LISTS[family]
        phrase, other = texts.split("|")
        items = draw_list(rng, words)
        subject = with_article = rng.choice(items[:-1])
        output, input = solve(items, subject), " ".join(items)
    wordings = [opener.format(phrase) for opener in openers] + [other, other] * (not new_wording)
    instruction = rng.choice(wordings)
    instruction = instruction.replace("{a}", with_article).replace("{}", subject)
    if family in LISTS and not use_input:
        instruction, input = f"{instruction[:-1]}: {input}", ""
    return {"instruction": instruction, "input": input, "output": output, "family": family}


def has_held_word(record: dict) -> bool:
    return not set(HELD).isdisjoint(re.findall(r"\w+", " ".join(record.values())))


def draw(rng: random.Random, count: int, new: str, seen: set[tuple[str, str]]) -> Iterator[dict]:
    """Records whose questions are not among those seen, to which they are added."""
    families, tries = FAMILIES[:], 0
    trained = [noun for noun in NOUNS if noun not in HELD]
    while count:
        family = families[count % len(families)]
        record = draw_record(rng, family, NOUNS if new == "word" else trained, new == "wording")
        question = record["instruction"], record["input"]
        tries += 1
        if tries > 300:  # the family has no further questions
            families.remove(family)
        elif question in seen or has_held_word(record) != (new == "word"):
            continue
        else:
            seen.add(question)
            yield record | ({"new": new} if new else {})
            count -= 1
        tries = 0


def held_out(rng: random.Random, count: int, seen: set[tuple[str, str]]) -> list[dict]:
    shares = {"word": count // 2, "wording": count // 4, "question": count // 4}
    return [record for new, share in shares.items() for record in draw(rng, share, new, seen)]


def records() -> tuple[list[dict], list[dict]]:
    """Training and held-out records; no question occurs twice."""
    rng, seen = random.Random(SEED), set()
    held = held_out(rng, HELD_OUT, seen)
    train = list(draw(rng, TRAIN, "", seen))
    rng.shuffle(train)
    return train, held


def fresh(count: int, seed: int) -> list[dict]:
    """Other held-out records: no question of theirs is in the two files."""
    seen = {(r["instruction"], r["input"]) for some in records() for r in some}
    return held_out(random.Random(seed), count, seen)


# ---------------------------------------------------------------- prose

STATEMENTS = """{P} is {b}.|{P} is {b}, as everybody knows.|As for {p}, it is {b}.|"{b}" is {p}.
{b} is {p}.|If you look for {p}, you will find {b}.|We heard of {p} ({b}) yesterday.
They asked about {p}, and she wrote "{b}" on the board.|I said {p} and he thought of {b}.
Everybody thought about {p}. {f} It was {b}.|{p}/{b}|{p}/{b}|{p}//{b}|{p}//{b}|{b}: {p}|{p}: {b}
{p} = {b}|{P}:{b}"""
LEADS = """The list is {x}.|Here is a list: {x}.|{x}|{x}|{x}|These are the words: {x}.
She said: {x}.|"{x}"|On the wall is written: {x}.|Once more: {x}"""
FILLERS = """The {n} is near the {m}.|Yesterday I saw {an} and {am}.|He put the {n} under the {m}.
There was no {n}, only {am}.|My friend has {an} and would like to have {am}.|I can show you {am}.
She likes the {n} more than the {m}.|It was late, and the {n} was gone.|Please find my {n}.
Nobody could find the {n} in the dark.|We will need {an}, and then {am}, and then another {n}.
An instruction describes a task, and an input provides further context.|Tell me about the {n}.
A response completes the request.|Below is an instruction that describes a task.
Write what you think, and then read it again.|This is the end of the story.|Give me your {n}."""
STATEMENTS, LEADS, FILLERS = (
    [pattern.replace("/", "\n") for pattern in entries(some)]
    for some in (STATEMENTS, LEADS, FILLERS)
)
PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request."
)
FURTHER = ", paired with an input that provides further context"


def filler(rng: random.Random) -> str:
    n, m = rng.sample(THINGS, 2)
    return rng.choice(FILLERS).format(n=n, m=m, an=an(n), am=an(m))


def statement(rng: random.Random, phrase: str, answer: str) -> str:
    whole = phrase[0].upper() + phrase[1:]
    return rng.choice(STATEMENTS).format(P=whole, p=phrase, b=answer, f=filler(rng))


def fact(rng: random.Random) -> str:
    size = [10 + len(facts) for _, facts in LOOKUPS.values()]  # large families more often
    texts, facts = rng.choices(list(LOOKUPS.values()), size)[0]
    about = rng.choice(list(facts))
    phrase = texts.split("|")[0].replace("{a}", an(about)).replace("{}", about)
    return "\n".join(statement(rng, phrase, facts[about]) for _ in range(rng.choice((1, 1, 2))))


def list_facts(rng: random.Random) -> str:
    items = draw_list(rng, NOUNS)
    lines = [rng.choice(LEADS).format(x=" ".join(items))]
    for family in rng.sample(list(LISTS), rng.choice((2, 3, 4))):
        texts, solve = LISTS[family]
        word = rng.choice(items[:-1])
        phrase = texts.split("|")[0].replace("{}", word)
        lines.append(statement(rng, phrase, solve(items, word)))
    return rng.choice(("\n", "\n\n")).join(lines)


def echo(rng: random.Random) -> str:
    """A list repeated: this is what teaches a small model to copy from its context."""
    text = " ".join(rng.sample(NOUNS, rng.randint(3, 16)))
    lines = [rng.choice(LEADS).format(x=text) for _ in range(rng.choice((2, 3)))]
    return rng.choice(("\n", "\n\n")).join(lines)


def form(rng: random.Random) -> str:
    """Alpaca's template, filled with unrelated sentences."""
    with_input = rng.random() < 0.5
    parts = [PREAMBLE.format(FURTHER if with_input else "")] if rng.random() < 0.7 else []
    parts.append(f"### Instruction:\n{filler(rng)}")
    if with_input:
        text = " ".join(draw_list(rng, NOUNS)) if rng.random() < 0.7 else filler(rng)
        parts.append(f"### Input:\n{text}")
    parts.append(f"### Response:\n{filler(rng)}")
    return "\n\n".join(parts)


def counting(rng: random.Random) -> str:
    series = rng.choice((NUMBERS, NUMBERS, DAYS, MONTHS))
    start = rng.randrange(len(series) - 3)
    return " ".join(series[start : start + rng.randint(3, 12)])


def prose(lines: int, seed: int, echoes: float = 0.0) -> Iterator[str]:
    rng = random.Random(seed)
    kinds = [fact] * 5 + [list_facts] * 5 + [echo] * 6 + [filler, form, counting]
    for _ in range(lines):
        if rng.random() < echoes:
            text = " ".join(rng.sample(NOUNS, rng.randint(3, 20)))
            yield json.dumps({"text": "\n".join([text] * rng.randint(2, 4))}) + "\n"
            continue
        parts = [rng.choice(kinds)(rng) for _ in range(rng.randint(1, 4))]
        text = rng.choice(("\n", "\n\n")).join(parts)
        yield json.dumps({"text": text}, ensure_ascii=False) + "\n"


def write(path: Path, lines: Iterable[str]) -> None:
    """Write to a temporary name first, so that the file is complete when it appears."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(part, path)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def write_records(path: Path, some: list[dict]) -> None:
    text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in some)
    write(path, ["[\n", text, "\n]\n"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("records", help="write sample_train.json and sample_heldout.json")
    verb.add_argument("--out", type=Path, default=HERE, help="the folder (default: this file's)")
    verb = verbs.add_parser("fresh", help="write other held-out records, to choose a recipe with")
    verb.add_argument("--count", type=int, default=1200, help="a multiple of 4 (default: 1200)")
    verb.add_argument("--seed", type=int, default=SEED + 1, help=f"(default: {SEED + 1})")
    verb.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    verb = verbs.add_parser("prose", help="write text for the base to read")
    verb.add_argument("--lines", type=int, required=True, help="documents, one a line")
    verb.add_argument("--out", type=Path, required=True, help="the JSON-lines file to write")
    verb.add_argument("--seed", type=int, default=SEED, help=f"(default: {SEED})")
    share = "share of documents that only repeat a list (default: 0)"
    verb.add_argument("--echoes", type=float, default=0.0, help=share)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.verb == "prose":
        write(args.out, prose(args.lines, args.seed, args.echoes))
        return
    if args.verb == "fresh":
        write_records(args.out, fresh(args.count, args.seed))
        return
    for name, some in zip(("train", "heldout"), records(), strict=True):
        write_records(args.out / f"sample_{name}.json", some)


if __name__ == "__main__":
    main()
