"""Find the nouns and adjectives of English captions by word lists and a few rules.

Made for descriptions of images like those of COCO and Flickr: short, in the present tense, about
people, animals and things. It needs no model and is deterministic. A trained tagger makes fewer
mistakes; most of those made here confuse verbs and nouns of the same form.
"""

from collections.abc import Sequence

NOUN, ADJECTIVE, OTHER = "noun", "adjective", "other"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that can precede a noun but not a verb.
_DETERMINERS = _words(
    """
    a an the this that these those his her its their our your my some any no each every another
    all both several many few various one two three four five six seven eight nine ten eleven
    twelve dozens hundreds first second third
    """
)
_PREPOSITIONS = _words(
    """
    of in on at by for with from into onto over under above below behind beside besides between
    among amongst across through throughout around about along alongside against near next
    toward towards past inside outside within without upon beneath underneath atop after before
    during until off down up out via per like as than amid opposite aboard
    """
)
_OTHER = _words(
    """
    and or but nor so yet while whilst when where which who whom whose what how why because if
    though although whether not to there here then now also too very quite just only almost
    still even away back together apart ahead forward backward backwards forwards upside
    sideways downhill uphill outdoors indoors midair mid-air i you he she it we they him them me
    us himself herself itself themselves someone somebody something anyone anything nobody
    nothing everyone other others own more most much less least such same else is are was were
    be been being am has have had having do does did done can could will would shall should may
    might must s t nearby overhead again once twice already soon well
    """
)

_ADJECTIVES = _words(
    """
    red blue green yellow purple orange pink cyan black white gray grey brown tan beige maroon
    teal violet turquoise crimson golden silver gold blond blonde brunette colorful colourful
    multicolored multi-colored dark light bright pale dim emerald cobalt navy big bigger biggest
    large larger largest small smaller smallest little tiny huge giant enormous massive tall
    taller tallest short shorter long longer longest high higher low lower wide narrow thick
    thin deep shallow fat skinny slim flat round square rectangular circular steep sharp
    straight curved curly curvy full empty half whole heavy mini double single triple old older
    oldest young younger youngest elderly middle-aged new modern ancient vintage fresh clean
    dirty wet dry hot cold warm cool frozen icy open closed broken bare naked shirtless barefoot
    asleep awake alone alive dead sick pregnant blind bald busy quiet loud calm still fast slow
    quick hard soft rough smooth strong weak safe dangerous ready free fancy plain simple
    beautiful pretty cute ugly nice good better best bad great lovely happy sad angry funny
    silly serious excited proud tired bored scared surprised playful friendly shy brave wild
    crazy strange odd weird unusual special different similar local public private outdoor
    indoor electric electronic digital natural artificial plastic wooden metallic cardboard
    leather rubber asian african american british chinese japanese indian european mexican
    italian french german male female adult professional formal casual traditional urban rural
    tropical olympic military eastern western northern southern medical international main
    central final upper inner outer top bottom left right front rear distant close opposite
    available visible attached parked crowded decorated lit unlit snowy grassy rocky sandy muddy
    dusty furry hairy fluffy fuzzy shaggy cloudy sunny rainy windy foggy misty hazy stormy smoky
    leafy woody bushy hilly mountainous shiny rusty messy tidy cloudless overcast shady sleepy
    hungry thirsty wavy foamy frothy soapy spotty stripy scruffy grainy stony pebbly watery
    splashy juicy tasty cheesy crispy creamy healthy wealthy striped spotted dotted checkered
    checked solid patterned tattooed bearded clear blurry transparent reflective metal stone
    brick concrete stainless red-haired
    """
)

# Verbs also with -s, -ing, -ed; taken for nouns only in positions where a verb cannot occur.
_VERBS = _words(
    """
    run jump walk play stand sit lie lay look watch hold ride climb swim surf ski skate
    skateboard snowboard dive fly slide swing kick throw catch hit bat pitch race chase fight
    wrestle box dance sing perform pose smile laugh cry talk speak shout yell scream eat drink
    cook bake cut chop feed drive park pull push carry lift pick drop put place set take give
    hand get grab reach touch point wave hug kiss pet sleep rest lean lounge relax wait stare
    gaze peer glance read write draw paint type work build fix repair clean wash brush comb
    sweep mow plow dig plant bite chew lick sniff bark leap hop skip splash spray blow float
    paddle row sail fish hunt camp hike jog sprint stretch balance bend crouch kneel squat crawl
    roll tumble flip spin turn twist shake bounce dribble shoot aim score tackle block dunk
    serve bowl golf cycle bike pedal travel move go come leave enter exit cross follow lead pass
    approach meet gather surround cover fill show display feature contain include appear seem
    prepare try attempt begin start stop finish use wear dress make do see have share shop buy
    sell pay open close hang attach tie decorate nap wade rock grind celebrate cheer compete
    practice exercise train tow land fall rise stick head hide tend groom graze perch enjoy
    avoid record operate clear chat listen learn teach study help keep let shine burn melt glide
    scale descend ascend emerge return rappel slice peel strum drum juggle toss fetch drag haul
    load unload check examine inspect explore observe view face line wrap step stroll wander
    march parade tour scatter stack pile arrange top frolic snuggle cuddle peek squint
    """
)
_VERB_FORMS = _words(
    """
    sat stood ran rode held threw caught hit ate drank drove took gave got wore worn seen saw
    shown taken given thrown made done gone came left led met sold bought hung stuck lain laid
    slept swam flew flown fell fallen rose blown torn built cut dug kept lost won sung spun
    swung written drawn driven eaten ridden set shot wound bent tied lies dying lying tying
    """
)
_NOUNS_IN_ING = _words(
    """
    building ceiling railing clothing painting wedding morning evening thing ring king string
    wing spring swing earring awning siding lightning icing frosting pudding stuffing dressing
    topping crossing landing opening drawing sibling duckling wrestling viking bedding parking
    meeting gathering seating lighting marking offspring sling sting
    """
)
_NOUNS_IN_ED = _words(
    """
    bed sled bobsled shed seed weed reed breed speed feed steed creed flatbed
    """
)
_NOUNS_IN_LY = _words(
    """
    family fly butterfly dragonfly belly jelly lily ally bully assembly
    """
)
_ADJECTIVE_ENDINGS = ("ous", "ful", "less", "ish", "able", "ible")
_NOUNS_WITH_ADJECTIVE_ENDINGS = _words(
    """
    table vegetable cable fish goldfish starfish dish radish bush rubbish handful mouthful bible
    armful stable polish
    """
)


def word_classes(words: Sequence[str]) -> list[str]:
    """Return NOUN, ADJECTIVE or OTHER for each word of a caption, lower-case, no punctuation."""
    classes: list[str] = []
    for k, word in enumerate(words):
        before, after = words[k - 1] if k else "", words[k + 1] if k + 1 < len(words) else ""
        noun_expected = (
            before in _DETERMINERS or before in _PREPOSITIONS or classes[-1:] == [ADJECTIVE]
        )
        classes.append(_word_class(word, before, after, noun_expected))
    return classes


def _word_class(word: str, before: str, after: str, noun_expected: bool) -> str:
    if word in _NOUNS_IN_ING or word in _NOUNS_IN_ED or word in _NOUNS_IN_LY:
        return NOUN
    if word in _ADJECTIVES:
        return NOUN if after == "of" else ADJECTIVE  # "in front of", "the top of"
    if word in _DETERMINERS or word in _PREPOSITIONS or word in _OTHER or word in _VERB_FORMS:
        return OTHER
    if any(character.isdigit() for character in word) or word.endswith(("ly", "n't", "'s")):
        return OTHER
    if word.endswith("ing") and len(word) > 4:
        return OTHER
    if word.endswith("ed"):
        function_word = after in _PREPOSITIONS or after in _DETERMINERS or after in _OTHER
        describes = (noun_expected and after and not function_word) or "-" in word
        return ADJECTIVE if describes else OTHER
    if any(stem in _VERBS for stem in _stems(word)):
        return NOUN if noun_expected and before not in ("to", "up", "down", "out", "off") else OTHER
    if word.endswith(_ADJECTIVE_ENDINGS) and word not in _NOUNS_WITH_ADJECTIVE_ENDINGS:
        return ADJECTIVE
    return NOUN


def _stems(word: str) -> tuple[str, ...]:
    """Return the word and the stems of which it may be the third person."""
    if word.endswith("ies"):
        return word, word[:-3] + "y"
    return word, word.removesuffix("s"), word.removesuffix("es")
