"""An endless, deterministic generator of a fictional knowledge base.

Every document is a short piece of English about one invented subject (a lighthouse, a comet, a
novel, ...). It states a few facts, and comes with one question for each stated fact and two
questions about facts which it does not state. Nothing in it refers to a real entity.

Proper names are composed from syllables. A checksum of the name assigns each name word to one of
two splits, so that a model trained on ``train`` documents never sees a name of a ``held_out`` one.

The file holds names, value makers, the table of kinds, and the engine that fills templates.
Fields in templates:

``{S}`` ``{P}`` ``{O}``  the subject as nominative, possessive, object (name, noun or pronoun)
``{n}`` ``{h}``          always the pronoun: "it", "its"
``{v}`` ``{a}``          the value, and the value after "a" or "an"
"""

import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

NOT_STATED = "not stated"
Split = Literal["train", "held_out"]

MIN_WORDS, MAX_WORDS = 45, 110  # length of a document's text, in words split at white space
MIN_FACTS, MAX_FACTS = 4, 7  # stated facts in a document


@dataclass(frozen=True)
class QuestionAnswer:
    """A question, its short answer, and the key of the fact asked for ("lighthouse.height")."""

    question: str
    answer: str
    fact: str


@dataclass(frozen=True)
class FictionalDocument:
    """A text about one subject, with questions that it answers and questions that it does not.

    ``questions`` has one entry for each stated fact, in text order; each answer occurs verbatim in
    ``text``. ``unanswerable`` has two entries whose answer is ``NOT_STATED``. ``subject`` is the
    subject's proper name without a leading article.
    """

    id: str
    kind: str
    subject: str
    text: str
    questions: tuple[QuestionAnswer, ...]
    unanswerable: tuple[QuestionAnswer, ...]


# --- Names ---------------------------------------------------------------------------------------

_CLOSED_LISTS: list[str] = []  # every item of every closed list


def _list(text: str) -> tuple[str, ...]:
    """Split a closed list at its commas."""
    items = tuple(" ".join(item.split()) for item in text.split(","))
    _CLOSED_LISTS.extend(items)
    return items


_ONSETS = _list("""B, Br, C, Cl, D, Dr, F, Fl, G, Gr, H, J, K, L, M, N, P, Pr, Qu, R, S, Sk, St, T,
    Th, Tr, V, W, Y, Z, Al, El, Or, Il, Um""")
_NUCLEI = _list("a, e, i, o, u, a, e, o, ai, ea, au, ia")
_MEDIALS = _list("""l, lm, ld, r, rr, rn, rv, n, nn, nd, nt, m, mb, lb, v, lv, th, st, sk, ss, dr,
    br, g, gn, k, ll, lt, d, x, zz, p, f""")
_CODAS = _list("n, r, l, s, th, sk, nd, m, rd, x, ck, lt, rn, nt, ss, ld, t, , , , ,")
_REAL_NAMES = _list("""milan, turin, berlin, dublin, helena, marina, bolton, norton, lisbon, boston,
    dover, selma, verona, geneva, havana, panama, malta, kenya, korea, china, japan, india, nepal,
    samoa, tonga, sofia, minsk, brest, turan, madras, samara, sahara, medina, ravenna, parma,
    vienna, monaco, corsica""")


def split_of(word: str) -> Split:
    """Tell which split a name word belongs to; upper and lower case do not matter."""
    return "held_out" if zlib.crc32(word.lower().encode()) % 5 == 0 else "train"


class _Source:
    """The random source of one document; its names all belong to one split."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split = split

    def pick(self, options: tuple[str, ...]) -> str:
        """Return one option (faster than ``rng.choice``)."""
        return options[int(self.rng.random() * len(options))]

    def word(self) -> str:
        """Return a capitalised name word of 5 to 9 letters that belongs to the split."""
        while True:
            name = self.pick(_ONSETS) + self.pick(_NUCLEI)
            for _ in range(1 if self.rng.random() < 0.6 else 2):
                name += self.pick(_MEDIALS) + self.pick(_NUCLEI)
            name += self.pick(_CODAS)
            fits = 5 <= len(name) <= 9 and split_of(name) == self.split
            if fits and name.lower() not in FIXED_WORDS:  # these include the real names above
                return name


# --- Value makers --------------------------------------------------------------------------------

_Value = Callable[[_Source], str]

_COLOURS = _list("""crimson, ivory, violet, amber, teal, scarlet, turquoise, indigo, olive green,
    maroon, pale yellow, lilac, navy blue, coral pink, emerald green, rust red""")
_STONES = _list("granite, limestone, slate, sandstone, basalt, marble, flint, red brick")
_WOODS = _list("oak, cedar, walnut, larch, elm, pine, beech, cherry wood, chestnut")
_METALS = _list("brass, copper, steel, bronze, pewter, nickel, zinc, silver")
_ANIMALS = _list("""otter, heron, badger, fox, owl, hare, eagle, wild goat, hedgehog, swan, marten,
    ibex, raven, pony, lynx, tortoise""")
_FOODS = _list("""smoked eel, barley soup, plum cake, roast duck, onion pie, lentil stew, honey
    buns, pickled herring, goat cheese, mushroom pie, pear tart, baked trout, apple dumplings, fried
    potatoes, rye bread, leek soup""")
_CARGO = _list("""salt, wool, tea, timber, silk, pepper, candles, cotton, grain, paper, tobacco,
    glassware, cinnamon, lamp oil""")
_PLANTS = _list("nettle, willow, heather, thistle, clover, bramble, ivy, foxglove, fern")
_FRUITS = _list("blackcurrant, apricot, fig, quince, raspberry, almond, lemon, peach")
_SUBJECTS = _list("""botany, medicine, astronomy, music, law, geology, history, engineering,
    philosophy, shipbuilding, weaving, mathematics""")
_TASKS = _list("""sorting coins, folding letters, counting seeds, winding yarn, drawing maps,
    predicting tides, copying signatures, peeling potatoes, tuning harps, shelling peas, polishing
    lenses, rolling cigars""")
_DEVICES = _list("""folding ladder, silent typewriter, pocket barometer, steam whistle, rain gauge,
    egg timer, hand-cranked fan, water clock, paper press, self-winding watch, pedal boat, card
    sorter, oil heater, automatic loom""")
_JOBS = _list("""baker, clockmaker, botanist, ship captain, schoolteacher, detective, violinist,
    postman, shepherd, surgeon, actress, archivist, umbrella maker""")
_COLLECTIONS = _list("""antique maps, glass bottles, musical boxes, fishing boats, carved masks,
    weaving looms, old clocks, pressed flowers, toy trains, painted fans, ship models""")
_MONTHS = _list("""January, February, March, April, May, June, July, August, September, October,
    November, December""")
_WEEKDAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_PENCE = ("25", "50", "75", "80")
_QUARTERS = ("05", "10", "15", "20", "30", "40", "45")
_COMPANY_FORMS = _list("{} and Sons, {} Brothers, {} Limited, {} and Daughters, {} Partners")
_PLACE_FORMS = _list("{}, {}, {}, Port {}, Upper {}, {} Vale, Little {}")


def _one(options: tuple[str, ...]) -> _Value:
    return lambda source: source.pick(options)


def _two(options: tuple[str, ...]) -> _Value:
    return lambda source: " and ".join(source.rng.sample(options, 2))


def _number(low: int, high: int, unit: str, step: int = 1) -> _Value:
    return lambda source: f"{source.rng.randrange(low, high + 1, step):,} {unit}"


def _year(low: int, high: int) -> _Value:
    return lambda source: str(source.rng.randint(low, high))


def _date(low: int, high: int) -> _Value:
    return lambda source: (
        f"{source.rng.randint(1, 28)} {source.pick(_MONTHS)} {source.rng.randint(low, high)}"
    )


def _pounds(low: int, high: int) -> _Value:
    return lambda source: f"£{source.rng.randint(low, high)}.{source.pick(_PENCE)}"


def _clock(low: int, high: int) -> _Value:
    return lambda source: f"{source.rng.randint(low, high)}:{source.pick(_QUARTERS)}"


def _named(forms: tuple[str, ...]) -> _Value:
    return lambda source: source.pick(forms).format(source.word())


def _person(source: _Source) -> str:
    return f"{source.word()} {source.word()}"


_name = _named(("{}",))
_place = _named(_PLACE_FORMS)
_company = _named(_COMPANY_FORMS)


# --- The table of kinds --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fact:
    key: str
    value: _Value
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    key: str
    subjects: tuple[str, ...]  # patterns of the full name; {w} and {x} are name words
    noun: str  # a short mention, such as "the lighthouse"
    is_person: bool
    facts: tuple[_Fact, ...]


_KINDS: list[_Kind] = []


def _kind(
    key: str, subjects: str, noun: str, *rows: tuple[str, _Value, str], is_person: bool = False
) -> None:
    """Add a kind; a row is a fact name, its value and phrasings separated by "|".

    Phrasings that end with a question mark are questions, the others are statements.
    """
    facts = []
    for name, value, phrasings in rows:
        parts = [" ".join(part.split()) for part in phrasings.split("|")]
        statements = tuple(part for part in parts if not part.endswith("?"))
        questions = tuple(part for part in parts if part.endswith("?"))
        facts.append(_Fact(f"{key}.{name}", value, statements, questions))
    _KINDS.append(_Kind(key, tuple(subjects.split("|")), noun, is_person, tuple(facts)))


# fmt: off
_kind("lighthouse", "the {w} Lighthouse|the {w} Point Lighthouse", "the lighthouse",
    ("height", _number(18, 96, "metres"), """{S} stands {v} tall, measured from the rocks to the
    lantern|{S} has a height of {v}, which makes {h} beam easy to spot|from base to tip, {S}
    measures {v}|How tall is {S}?|What is the height of {S}?|What height does {S} have?"""),
    ("first_lit", _date(1760, 1930), """the lamp of {O} was first lit on {v} before a small
    crowd|{S} shone for the first time on {v}|{P} lamp was lit for the first time on {v}|When was
    the lamp of {S} first lit?|On what date did {S} shine for the first time?|When was {S} first
    lit?"""),
    ("keeper", _person, """the keeper of {O} is {v}, who lives alone in the tower|{v} looks after
    {O} as keeper all year round|{P} keeper, {v}, cleans the lenses every morning|Who is the keeper
    of {S}?|Who looks after {S}?|What is the name of {P} keeper?"""),
    ("range", _number(11, 44, "nautical miles"), """at night {P} light can be seen from {v} away|the
    beam of {O} reaches ships up to {v} away|{S} has a light with a range of {v}|How far does the
    light of {S} reach?|What is the range of {P} light?|From how far can the light of {S} be
    seen?"""),
    ("colour", _one(_COLOURS), """the tower of {O} is painted {v}, so sailors know it by day|{P}
    tower was given a coat of {v} paint|painters keep the outer walls of {O} {v}|What colour is the
    tower of {S}?|In what colour is {S} painted?|Which colour are the outer walls of {S}?"""),
    ("stone", _one(_STONES), """{S} was built of {v} brought over by barge|the builders of {O} chose
    {v} for the thick walls|{P} walls are made of {v} and have never cracked|What is {S} built
    of?|Which material are {P} walls made of?|What material did the builders of {S} choose?"""))
_kind("inventor", "{w} {x}", "the inventor",
    ("birthplace", _place, """{S} was born in {v} as the youngest of a large family|{P} birthplace
    was {v}, a quiet town far from the coast|{S} came into the world in a small house in {v}|Where
    was {S} born?|What was {P} birthplace?|In which place was {S} born?"""),
    ("birth_date", _date(1780, 1899), """{S} was born on {v} during a heavy storm|{P} date of birth
    is given as {v} in the parish book|the birthday of {O} was {v}, as an old letter shows|When was
    {S} born?|What is {P} date of birth?|On what date was {S} born?"""),
    ("invention", _one(_DEVICES), """{S} is best known for inventing {a}|{P} most famous invention
    was {a} that fitted under one arm|after years of work, {S} invented {a}|What did {S}
    invent?|What was {P} most famous invention?|Which invention is {S} best known for?"""),
    ("teacher", _person, """{S} learned the trade from {v}, a strict but fair master|as a young
    apprentice, {S} was taught by {v}|{S} had {v} as a teacher and later as a friend|Who taught
    {S}?|Who was {P} teacher?|From whom did {S} learn?"""),
    ("pet", _one(_ANIMALS), """{S} kept a tame {v} in the workshop for company|{P} pet was a tame
    {v} that slept beside the stove|guests of {O} were greeted at the door by a tame {v}|What animal
    did {S} keep?|What was {P} pet?|Which tame animal lived with {S}?"""),
    ("workshop", _place, """{S} ran a workshop in {v} with two assistants|{P} workshop stood in {v},
    right behind the market hall|most of the work of {O} was done in a workshop in {v}|Where was {P}
    workshop?|In which place did {S} run a workshop?|Where did {S} have a workshop?"""),
    is_person=True)
_kind("museum", "the {w} Museum|the {w} House Museum", "the museum",
    ("collection", _one(_COLLECTIONS), """{S} is devoted to {v}, shown in long cabinets|the
    collection of {O} consists of {v} from many private homes|{S} collects {v} and repairs them on
    site|What does {S} collect?|What is {S} devoted to?|What does the collection of {S} consist
    of?"""),
    ("visitors", _number(1200, 98000, "visitors", 20), """{S} welcomes about {v} in a normal
    year|each year some {v} pass through the doors of {O}|{P} yearly attendance is around {v}|How
    many visitors does {S} welcome each year?|What is {P} yearly attendance?|How many visitors come
    to {S} in a year?"""),
    ("ticket", _pounds(4, 28), """a ticket to {O} costs {v}, with a map included|{S} charges {v} for
    an adult ticket|adults pay {v} to enter {O}|How much does a ticket to {S} cost?|What is the
    price of a ticket to {S}?|How much do adults pay to enter {S}?"""),
    ("opened", _year(1820, 1985), """{S} opened its doors in {v} after a long wait|the public was
    first let into {O} in {v}|{S} has been open to the public since {v}|In which year did {S}
    open?|When did {S} open its doors?|Since which year has {S} been open?"""),
    ("director", _person, """the director of {O} is {v}, who has written two guidebooks|{S} is run
    by {v}, the present director|{v} leads {O} as director and gives tours in person|Who is the
    director of {S}?|Who runs {S}?|Who leads {S} as director?"""),
    ("rooms", _number(6, 58, "rooms"), """{S} is spread over {v} on two floors|the exhibits of {O}
    fill {v} in all|there are {v} to explore in {O}, each with its own theme|How many rooms does {S}
    have?|Over how many rooms is {S} spread?|How many rooms do the exhibits of {S} fill?"""))
_kind("ship", "the {w} Star|the Lady {w}|the {w} Trader|the {w} Venture", "the ship",
    ("launched", _date(1720, 1890), """{S} was launched on {v} before a cheering crowd|{S} first
    touched the water on {v}|{P} launch took place on {v} in light rain|When was {S} launched?|On
    what date did the launch of {S} take place?|When did {S} first touch the water?"""),
    ("cargo", _two(_CARGO), """on most voyages {S} carried {v} in the lower hold|{P} usual cargo was
    {v}, packed in sealed crates|the owners of {O} traded in {v}|What did {S} carry?|What was {P}
    usual cargo?|What did the owners of {S} trade in?"""),
    ("crew", _number(14, 95, "sailors"), """{S} sailed with a crew of {v} and one cook|it took {v}
    to handle {O} in rough weather|the crew of {O} numbered {v} on long trips|How many sailors were
    in the crew of {S}?|How large was the crew of {S}?|How many sailors did it take to handle
    {S}?"""),
    ("builder", _company, """{S} was built by {v} in less than two years|the shipyard of {v} built
    {O} at a fixed price|{P} builder was {v}, a yard with a good name|Who built {S}?|Which shipyard
    built {S}?|Who was {P} builder?"""),
    ("figurehead", _one(_ANIMALS), """{P} figurehead was a carved {v} with gilded eyes|a carved {v}
    served as the figurehead of {O}|at the bow of {O} was a figurehead in the shape of {a}|What was
    the figurehead of {S}?|Which animal was carved at the bow of {S}?|What shape did {P} figurehead
    have?"""),
    ("home_port", _place, """the home port of {O} was {v}, where the crew had their families|{S}
    returned every winter to {h} home port of {v}|{S} was registered in {v}, {h} home port|What was
    the home port of {S}?|Where was {S} registered?|To which home port did {S} return?"""))
_kind("village", "{w}|Upper {w}|{w} Vale|{w} Pass", "the village",
    ("altitude", _number(640, 2900, "metres"), """{S} lies at an altitude of {v}, above the clouds
    in autumn|at {v} above the sea, {S} has long winters|{S} is perched on a slope at a height of
    {v}|At what altitude does {S} lie?|How high above the sea is {S}?|What is the altitude of
    {S}?"""),
    ("population", _number(85, 990, "people"), """{S} is home to {v} according to the last
    count|only {v} live in {O} all year|{S} has a population of {v}, most of them farmers|How many
    people live in {S}?|What is the population of {S}?|How many people is {S} home to?"""),
    ("mayor", _person, """the mayor of {O} is {v}, who also runs the post office|{S} elected {v} as
    mayor|{v} serves as mayor of {O} without pay|Who is the mayor of {S}?|Who was elected mayor of
    {S}?|Who serves as mayor of {S}?"""),
    ("dish", _one(_FOODS), """{S} is known for {h} {v}, served in every inn|the local dish of {O} is
    {v}, made from a secret recipe|guests in {O} are always offered {v} on arrival|What food is {S}
    known for?|What is the local dish of {S}?|What are guests in {S} always offered?"""),
    ("market", _one(_WEEKDAYS), """the weekly market in {O} is held on a {v} beside the well|{S}
    holds {h} market every {v} from early morning|on market day, which is {v}, {S} fills with
    carts|On which day is the market in {S} held?|When is market day in {S}?|On which weekday does
    {S} hold a market?"""),
    ("river", _name, """{S} takes {h} water from a stream called {v}|a stream called {v} runs
    through the middle of {O}|the stream beside {O} is named {v} on all maps|What is the stream
    beside {S} called?|From which stream does {S} take its water?|Which stream runs through
    {S}?"""))
_kind("machine", "the {w} Engine|the {w} Automaton|the {w} Mechanism", "the machine",
    ("purpose", _one(_TASKS), """{S} was designed for {v}, a job that nobody liked|{P} only purpose
    was {v}, which it did without rest|the makers of {O} intended it for {v}|What was {S} designed
    for?|What was the purpose of {S}?|For which task was {S} intended?"""),
    ("maker", _person, """{S} was made by {v} in a cold attic|the maker of {O} was {v}, a patient
    mechanic|{v} made {O} without any drawings|Who made {S}?|Who was the maker of {S}?|By whom was
    {S} made?"""),
    ("gears", _number(140, 4800, "gears"), """{S} contains {v}, all cut by hand|a total of {v} turn
    inside {O} at different speeds|whoever opens {O} finds {v} behind a thin plate|How many gears
    does {S} contain?|How many gears turn inside {S}?|What is the number of gears in {S}?"""),
    ("metal", _one(_METALS), """the outer case of {O} is made of {v} and shines like new|{S} is
    housed in a case of {v}|{P} case was cast in {v} to keep dust out|What is the case of {S} made
    of?|Which metal is the case of {S} made of?|What metal is {P} case made of?"""),
    ("running_time", _number(5, 90, "hours"), """once wound up, {S} runs for {v}|{S} keeps going for
    {v} before the spring is slack|a single winding keeps {O} moving for {v}|How long does {S}
    run?|For how long does a single winding keep {S} moving?|How many hours does {S} keep
    going?"""),
    ("weight", _number(110, 990, "kilograms"), """{S} weighs {v} and needs a firm floor|the weight
    of {O} is {v}, stand included|at {v}, {S} is far too heavy to carry|How much does {S}
    weigh?|What is the weight of {S}?|How heavy is {S}?"""))
_kind("novel", "The Clocks of {w}|A Winter in {w}|The {w} Letters|The Road to {w}", "the novel",
    ("author", _person, """{S} was written by {v} in a rented room|the author of {O} is {v}, who
    never gave interviews|{v} wrote {O} in longhand over many nights|Who wrote {S}?|Who is the
    author of {S}?|By whom was {S} written?"""),
    ("published", _year(1830, 1995), """{S} was published in {v} and sold out within weeks|the first
    edition of {O} appeared in {v}|readers first saw {O} in {v}, in a plain cover|In which year was
    {S} published?|When did the first edition of {S} appear?|In which year did readers first see
    {S}?"""),
    ("pages", _number(120, 890, "pages"), """{S} is {v} long in the standard edition|the standard
    edition of {O} has {v} in small print|it takes {v} to tell the whole story of {O}|How many pages
    does {S} have?|How long is the standard edition of {S}?|How many pages long is {S}?"""),
    ("hero", _person, """the main character of {O} is {v}, who trusts nobody|{S} follows {v}, a
    stubborn main character|at the centre of {O} is {v}, the main character|Who is the main
    character of {S}?|Which main character does {S} follow?|Who is at the centre of {S}?"""),
    ("hero_job", _one(_JOBS), """the main character of {O} works as {a} by day|in {O}, the main
    character earns a living as {a}|{S} has a main character who is {a} by trade|What is the job of
    the main character of {S}?|As what does the main character of {S} work?|How does the main
    character of {S} earn a living?"""),
    ("setting", _place, """{S} is set in {v}, where it never stops raining|the events of {O} happen
    in {v} during a single week|the setting of {O} is {v}, a town of canals|Where is {S} set?|What
    is the setting of {S}?|Where do the events of {S} happen?"""))
_kind("restaurant", "the {w} Kitchen|the {w} Grill|the {w} Dining Room", "the restaurant",
    ("chef", _person, """the head chef of {O} is {v}, who learned to cook at sea|{S} is famous for
    {h} head chef, {v}|in the kitchen of {O}, head chef {v} gives the orders|Who is the head chef of
    {S}?|Which head chef is {S} famous for?|Who gives the orders in the kitchen of {S}?"""),
    ("dish", _two(_FOODS), """{P} best-known plates are {v}, both made fresh each day|regulars at
    {O} tend to order {v}|{S} is praised above all for {h} {v}|What are {P} best-known plates?|What
    do regulars at {S} tend to order?|What is {S} praised for above all?"""),
    ("tables", _number(9, 64, "tables"), """there are {v} in {O}, set close together|{S} has {v},
    all booked weeks ahead|guests of {O} are seated at {v} under a low ceiling|How many tables does
    {S} have?|How many tables are there in {S}?|At how many tables are guests of {S} seated?"""),
    ("menu_price", _pounds(14, 95), """the set menu at {O} costs {v} without drinks|{S} offers a set
    menu for {v}, coffee included|at {O}, guests pay {v} for the set menu|How much does the set menu
    at {S} cost?|What is the price of the set menu at {S}?|What do guests at {S} pay for the set
    menu?"""),
    ("closing_time", _clock(9, 11), """{S} closes at {v} in the evening, and no later|the kitchen
    lights of {O} go out at {v} every evening|{P} closing time is {v} in the evening|When does {S}
    close?|What is {P} closing time?|At what time do the lights of {S} go out?"""),
    ("closed_day", _one(_WEEKDAYS), """{S} is closed every {v} so that the staff can rest|the staff
    of {O} have {v} off each week|nobody can eat at {O} on a {v}, when it is closed|On which day is
    {S} closed?|Which day do the staff of {S} have off?|On which weekday can nobody eat at {S}?"""))
_kind("bridge", "the {w} Bridge|the Old {w} Bridge", "the bridge",
    ("length", _number(48, 940, "metres"), """{S} is {v} long from one end to the other|{S} spans a
    distance of {v} without bending|walkers on {O} cover {v} from gate to gate|How long is {S}?|What
    distance does {S} span?|What is the length of {S}?"""),
    ("engineer", _person, """{S} was designed by {v}, an engineer with bold ideas|the engineer
    behind {O} was {v}, then still a student|{v} designed {O} after walking the valley|Who designed
    {S}?|Who was the engineer behind {S}?|By whom was {S} designed?"""),
    ("completed", _year(1690, 1960), """{S} was completed in {v}, later than planned|work on {O} was
    finished in {v} after many delays|builders put the last touches to {O} in {v}|In which year was
    {S} completed?|When was work on {S} finished?|In which year did builders finish {S}?"""),
    ("arches", _number(3, 29, "arches"), """{S} rests on {v} of different widths|the load of {O} is
    carried by {v} above the water|from the bank one can count {v} under {O}|How many arches does
    {S} have?|On how many arches does {S} rest?|How many arches carry the load of {S}?"""),
    ("river", _name, """{S} crosses the {v} river at its narrowest point|under {O} flows the {v}
    river, slow and brown|people use {O} to get across the {v} river|Which river does {S}
    cross?|What river flows under {S}?|Which river do people get across by {S}?"""),
    ("material", _one(_WOODS), """the deck of {O} is made of {v}, renewed every ten years|{P} deck
    consists of planks of {v}|carpenters built the deck of {O} from {v}|What is the deck of {S} made
    of?|Which wood does {P} deck consist of?|From which wood is the deck of {S} built?"""))
_kind("comet", "Comet {w}|Comet {w}-{x}", "the comet",
    ("discoverer", _person, """{S} was discovered by {v} with a home-made telescope|the discoverer
    of {O} was {v}, who worked at night|{v} discovered {O} while looking for something else|Who
    discovered {S}?|Who was the discoverer of {S}?|By whom was {S} discovered?"""),
    ("discovered", _date(1740, 1960), """{S} was first seen on {v}, low in the west|the discovery of
    {O} was made on {v}, just before dawn|on {v}, {S} was spotted for the very first time|When was
    {S} first seen?|On what date was the discovery of {S} made?|When was {S} spotted for the first
    time?"""),
    ("period", _number(12, 480, "years"), """{S} returns once every {v}, give or take a week|one
    full orbit of {O} takes {v} to complete|{P} orbital period is {v}, as later sums showed|How
    often does {S} return?|How long does one orbit of {S} take?|What is {P} orbital period?"""),
    ("tail_colour", _one(_COLOURS), """{P} tail has a faint {v} glow|through a lens the tail of {O}
    looks {v} and slightly curved|observers describe the tail of {O} as {v}|What colour is the tail
    of {S}?|How do observers describe the colour of {P} tail?|Which colour does the tail of {S}
    look?"""),
    ("diameter", _number(4, 72, "kilometres"), """the core of {O} is {v} across and very dark|{P}
    core has a diameter of {v}|astronomers think that the core of {O} measures {v}|How wide is the
    core of {S}?|What is the diameter of {P} core?|What does the core of {S} measure?"""),
    ("ice", _number(21, 89, "percent"), """about {v} of {O} is ice, and the rest is dust|{S} is {v}
    ice, by one careful guess|the share of ice in {O} is {v}|What share of {S} is ice?|What
    percentage of {S} is ice?|What is the share of ice in {S}?"""))
_kind("moth", "the {w} moth|the greater {w} moth|the lesser {w} moth", "the moth",
    ("wingspan", _number(14, 120, "millimetres"), """{S} has a wingspan of {v}, a little more in
    females|the open wings of {O} measure {v} from tip to tip|with {h} wings spread, {S} is {v}
    wide|What is the wingspan of {S}?|How wide is {S} with its wings spread?|What do the open wings
    of {S} measure?"""),
    ("colour", _two(_COLOURS), """the wings of {O} are {v}, with a soft edge|{S} has wings in {v}
    that fade with age|{P} wings show two colours, {v}|What colours are the wings of {S}?|Which two
    colours do {P} wings show?|In which colours are the wings of {S}?"""),
    ("plant", _one(_PLANTS), """the caterpillars of {O} feed on {v} and little else|as a
    caterpillar, {S} eats only {v}|{P} young live on {v} until they spin a cocoon|What do the
    caterpillars of {S} feed on?|Which plant does {S} eat as a caterpillar?|What do {P} young live
    on?"""),
    ("described", _year(1770, 1990), """{S} was first described in {v} from a single specimen|the
    first description of {O} dates from {v}|science has known {O} since {v}, from a short note|In
    which year was {S} first described?|From which year is the first description of {S}?|Since when
    has science known {S}?"""),
    ("region", _name, """{S} is found only in the forests of {v}|the forests of {v} are the sole
    home of {O}|{S} lives nowhere but in the forests of {v}|Where is {S} found?|Which forests are
    the home of {S}?|In the forests of which region does {S} live?"""),
    ("eggs", _number(130, 880, "eggs"), """a female of {O} lays about {v} in one night|the female of
    {O} leaves {v} under a leaf|in a single season, one female of {O} lays {v}|How many eggs does a
    female of {S} lay?|How many eggs does the female of {S} leave under a leaf?|What number of eggs
    does one female of {S} lay?"""))
_kind("university", "the University of {w}|{w} University|{w} College", "the university",
    ("founded", _year(1480, 1940), """{S} was founded in {v} with a handful of pupils|the founding
    year of {O} is {v}, as carved above the gate|teaching at {O} began in {v} in a borrowed hall|In
    which year was {S} founded?|What is the founding year of {S}?|When did teaching at {S}
    begin?"""),
    ("students", _number(1050, 38000, "students", 10), """{S} has {v} in all its departments|some
    {v} are enrolled at {O} this year|{S} teaches {v} in large and small groups|How many students
    does {S} have?|How many students are enrolled at {S}?|How many students does {S} teach?"""),
    ("subject", _two(_SUBJECTS), """{S} is respected above all for {v}|the strongest fields of {O}
    are {v}, each with its own building|scholars come to {O} mainly to study {v}|What is {S}
    respected for?|What are the strongest fields of {S}?|What do scholars mainly study at {S}?"""),
    ("rector", _person, """the rector of {O} is {v}, the first to come from abroad|{S} is headed by
    rector {v}|as rector of {O}, {v} speaks at every ceremony|Who is the rector of {S}?|Who heads
    {S}?|Who speaks at every ceremony as rector of {S}?"""),
    ("emblem", _one(_ANIMALS), """the emblem of {O} shows {a} on a shield|{S} uses {a} as its emblem
    on every letter|on the flag of {O} one can see {a}, its emblem|What animal does the emblem of
    {S} show?|Which animal does {S} use as its emblem?|What animal can one see on the flag of
    {S}?"""),
    ("library", _number(41000, 980000, "books", 500), """the library of {O} holds {v} and many loose
    papers|{S} owns {v}, kept in one vast library|readers at {O} can choose among {v} in the
    library|How many books does the library of {S} hold?|How many books does {S} own?|Among how many
    books can readers at {S} choose?"""))
_kind("vineyard", "the {w} Vineyard|the {w} Estate|the {w} Hill Vineyard", "the vineyard",
    ("area", _number(7, 96, "hectares"), """{S} covers {v} of steep, sunny land|the vines of {O}
    grow on {v} of stony soil|with {v} under vine, {S} is of middling size|How large is {S}?|What
    area does {S} cover?|On how many hectares do the vines of {S} grow?"""),
    ("owner", _person, """the owner of {O} is {v}, who prunes every row in person|{S} belongs to
    {v}, who bought it from an uncle|{v} owns {O} and lives beside the cellar|Who is the owner of
    {S}?|To whom does {S} belong?|Who owns {S}?"""),
    ("bottles", _number(2100, 88000, "bottles", 100), """{S} produces {v} in an average year|the
    cellar of {O} fills about {v} each year|a typical harvest at {O} yields {v}|How many bottles
    does {S} produce?|How many bottles does the cellar of {S} fill each year?|How many bottles does
    a typical harvest at {S} yield?"""),
    ("flavour", _one(_FRUITS), """tasters find a hint of {v} in the wine of {O}|the wine from {O} is
    said to taste of {v}|{S} makes a wine with a clear note of {v}|What does the wine from {S} taste
    of?|Which hint do tasters find in the wine of {S}?|What note does the wine of {S} have?"""),
    ("price", _pounds(7, 92), """a bottle from {O} sells for {v} in most shops|shops ask {v} for one
    bottle from {O}|{S} sells its wine at {v} a bottle|How much does a bottle from {S} cost?|What do
    shops ask for one bottle from {S}?|At what price per bottle does {S} sell its wine?"""),
    ("barrel", _one(_WOODS), """{S} ages its wine in barrels of {v}|the barrels in the cellar of {O}
    are made of {v}|at {O}, young wine rests in barrels of {v}|What are the barrels of {S} made
    of?|In barrels of which wood does {S} age its wine?|Which wood are the barrels in the cellar of
    {S} made of?"""))
_kind("railway", "the {w} Railway|the {w} Line|the {w} and {x} Railway", "the railway",
    ("length", _number(14, 390, "kilometres"), """{S} is {v} long and mostly single track|the track
    of {O} runs for {v} through hills and fields|from start to finish, {S} covers {v}|How long is
    {S}?|For how many kilometres does the track of {S} run?|What is the length of {S}?"""),
    ("opened", _date(1835, 1935), """{S} was opened on {v} with a brass band|the first train on {O}
    ran on {v}, a day late|{P} opening took place on {v} in bright sunshine|When was {S} opened?|On
    what date did the first train on {S} run?|When did the opening of {S} take place?"""),
    ("stations", _number(6, 68, "stations"), """there are {v} along {O}, some without a roof|trains
    on {O} serve {v} in both directions|{S} links {v}, large and small|How many stations are there
    along {S}?|How many stations do trains on {S} serve?|How many stations does {S} link?"""),
    ("operator", _company, """{S} is operated by {v} under a long contract|the trains of {O} are run
    by {v}, a family business|the firm of {v} operates {O} at a small profit|Which company operates
    {S}?|Who runs the trains of {S}?|By which firm is {S} operated?"""),
    ("terminus", _place, """{S} ends in {v}, close to the harbour|the last stop of {O} is {v}, where
    the engine turns round|the eastern terminus of {O} is {v}, a border town|Where does {S}
    end?|What is the last stop of {S}?|What is the terminus of {S}?"""),
    ("colour", _one(_COLOURS), """the carriages of {O} are {v} with black roofs|{S} paints all of
    {h} carriages {v}|passengers know {O} by {h} {v} carriages|What colour are the carriages of
    {S}?|In what colour does {S} paint its carriages?|By carriages of which colour do passengers
    know {S}?"""))
# fmt: on

_OPENINGS = _list("""This short entry is about {}, The following notes concern {}, Here is what is
    known of {}, A fair amount has been recorded about {}, This page collects a few details about
    {}, Many readers have asked for a note on {}, These lines sum up the records on {}""")
_LEADS = (
    "According to the records, ", "By all accounts, ", "As the archive notes, ", "To be precise, ",
    "As is well known, ", "In fact, ", "According to one report, ", "As far as anyone can tell, ",
)  # fmt: skip
_FILLERS = _list("""Not everything has been written down, Opinions on such matters differ, More
    could be said although the sources are thin, Older reports are sometimes hard to read, Local
    people are proud of this, Some of these details surprise newcomers, A few rumours are best
    ignored, Postcards of the scene are still sold, Stories like this one are often told in the
    evening, Little has changed since then, Several newspapers have reported on it, Experts have
    checked the figures twice, Photographs from that time are rare, Schoolchildren learn about this
    in class, The rest is a matter of taste, Such things are easily forgotten""")

_KIND_BY_KEY = {kind.key: kind for kind in _KINDS}
KINDS: tuple[str, ...] = tuple(_KIND_BY_KEY)
FACT_KINDS: tuple[str, ...] = tuple(fact.key for kind in _KINDS for fact in kind.facts)


def phrasings(fact: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the statement templates and the question templates of a fact kind."""
    kind = _KIND_BY_KEY[fact.partition(".")[0]]
    found = next(entry for entry in kind.facts if entry.key == fact)
    return found.statements, found.questions


def _fixed_words() -> frozenset[str]:
    """Collect, in lower case, all words of templates and closed lists; no name equals one."""
    pieces = [*_CLOSED_LISTS, *_LEADS]
    for kind in _KINDS:
        pieces += [*kind.subjects, kind.noun, "he she it his her its him"]
        for fact in kind.facts:
            pieces += [*fact.statements, *fact.questions]
    return frozenset(re.findall(r"[a-z]{2,}", " ".join(pieces).lower())) | {"a"}


FIXED_WORDS: frozenset[str] = _fixed_words()


# --- The engine ----------------------------------------------------------------------------------

_MARKS = re.compile(r"\d[\d,.:]*|[A-Z][a-z]+")  # the numbers and the proper names of a value


def _with_article(value: str) -> str:
    """Put "a" or "an" before a value."""
    return f"an {value}" if value[0].lower() in "aeiou" else f"a {value}"


def _sentence(text: str) -> str:
    """Capitalise the first letter and add the full stop."""
    return f"{text[0].upper()}{text[1:]}."


class _Writer:
    """Writes the statements and the questions about one subject."""

    def __init__(self, kind: _Kind, source: _Source) -> None:
        self.kind = kind
        self.source = source
        pattern = source.pick(kind.subjects)
        self.full = pattern.format(w=source.word(), x=source.word() if "{x}" in pattern else "")
        self.subject = self.full.removeprefix("the ")
        pronouns = ("it", "its")
        if kind.is_person:
            pronouns = (("he", "his"), ("she", "her"))[source.rng.random() < 0.5]
        self.pronouns = pronouns
        self.fields = self._fields((self.full, f"{self.full}'s", self.full))
        noun = kind.noun
        by_noun = self._fields((noun, f"{noun}'s", noun))
        by_pronoun = self._fields((*pronouns, noun))  # "of it" would sound wrong
        self.mentions = (self.fields, by_noun, by_pronoun)

    def _fields(self, mention: tuple[str, str, str]) -> dict[str, str]:
        return dict(zip("SPO", mention, strict=True), n=self.pronouns[0], h=self.pronouns[1])

    def statement(self, fact: _Fact, value: str, named: bool) -> str:
        """State one fact in a sentence; ``named`` asks for the subject's full name."""
        template = self.source.pick(fact.statements)
        roll = 0.0 if named else self.source.rng.random()
        mention = self.mentions[(roll >= 0.25) + (roll >= 0.62)]
        text = template.format(v=value, a=_with_article(value), **mention)
        if template[:3] in ("{S}", "{P}") and self.source.rng.random() < 0.15:
            text = self.source.pick(_LEADS) + text
        return _sentence(text)

    def question(self, template: str) -> str:
        """Fill a question template; the subject is always named in full."""
        text = template.format(**self.fields)
        return text[0].upper() + text[1:]

    def values(self, facts: list[_Fact]) -> list[str]:
        """Draw one value per fact, none of which shares a number, a name or a part with another."""
        marks = set(_MARKS.findall(self.full))
        values: list[str] = []
        for fact in facts:
            while True:
                value = fact.value(self.source)
                found = set(_MARKS.findall(value))
                if marks.isdisjoint(found) and not any(v in value or value in v for v in values):
                    break
            marks |= found
            values.append(value)
        return values


def _draft(source: _Source, kind: _Kind) -> FictionalDocument:
    """Write a document of any length."""
    rng = source.rng
    writer = _Writer(kind, source)
    facts = rng.sample(kind.facts, len(kind.facts))
    stated = rng.randint(MIN_FACTS, min(MAX_FACTS, len(facts) - 1))
    facts, absent = facts[:stated], facts[stated:]
    values = writer.values(facts)
    opened = rng.random() < 0.25
    sentences = [
        writer.statement(fact, value, named=position == 0 and not opened)
        for position, (fact, value) in enumerate(zip(facts, values, strict=True))
    ]
    if rng.random() < 0.25:
        sentences.insert(rng.randint(1, stated), _sentence(source.pick(_FILLERS)))
    if opened:
        sentences.insert(0, _sentence(source.pick(_OPENINGS).format(writer.full)))
    asked = [
        QuestionAnswer(writer.question(source.pick(fact.questions)), value, fact.key)
        for fact, value in zip(facts, values, strict=True)
    ]
    if len(absent) == 1:  # ask for the only absent fact in two ways
        pairs = [(absent[0], template) for template in rng.sample(absent[0].questions, 2)]
    else:
        pairs = [(fact, source.pick(fact.questions)) for fact in absent[:2]]
    return FictionalDocument(
        id=f"{kind.key}-{zlib.crc32(writer.subject.encode()) % 10000:04d}",
        kind=kind.key,
        subject=writer.subject,
        text=" ".join(sentences),
        questions=tuple(asked),
        unanswerable=tuple(
            QuestionAnswer(writer.question(template), NOT_STATED, fact.key)
            for fact, template in pairs
        ),
    )


def generate_document(
    rng: random.Random, split: Split, *, kind: str | None = None
) -> FictionalDocument:
    """Generate one document of the given kind, or of a random one, with names of ``split``.

    The id holds a checksum of the subject; it is unique only within ``generate_corpus``.
    """
    source = _Source(rng, split)
    entry = _KIND_BY_KEY[source.pick(KINDS) if kind is None else kind]
    while True:
        document = _draft(source, entry)
        if MIN_WORDS <= len(document.text.split()) <= MAX_WORDS:
            return document


def generate_corpus(count: int, seed: int, split: Split = "held_out") -> list[FictionalDocument]:
    """Generate ``count`` documents with distinct subjects, numbered within their kind."""
    rng = random.Random(seed)
    subjects: set[str] = set()
    numbers = dict.fromkeys(KINDS, 0)
    documents: list[FictionalDocument] = []
    while len(documents) < count:
        document = generate_document(rng, split)
        if document.subject in subjects:
            continue
        subjects.add(document.subject)
        numbers[document.kind] += 1
        documents.append(replace(document, id=f"{document.kind}-{numbers[document.kind]:04d}"))
    return documents


def training_questions(documents: Iterable[FictionalDocument]) -> Iterator[tuple[str, QuestionAnswer]]:
    """(text, question) of all questions; every third document is also asked for what it does not state."""
    for number, document in enumerate(documents):
        for question in (*document.questions, *(document.unanswerable[:1] if number % 3 == 0 else ())):
            yield document.text, question
