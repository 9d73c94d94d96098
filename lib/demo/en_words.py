"""English words and templates of the demo's texts. Their grammar: lib/demo/en.py.

A person is `name/gender`, a verb `base/past`, a place a preposition and a noun joined by `_`.
"""

PEOPLE = (
    "Alice/f Mary/f Helen/f Rose/f Emma/f Martha/f Judith/f Clara/f Agnes/f Ruth/f "
    "George/m Henry/m Thomas/m William/m Edward/m Peter/m Walter/m Oliver/m Simon/m Hugh/m"
)
TOWNS = (
    "Dover/Kent|Truro/Cornwall|Exeter/Devon|Oakham/Rutland|Norwich/Norfolk|Ipswich/Suffolk|"
    "Durham/the north|Hereford/the west"
).split("|")
PLURALS = {"shelf": "shelves", "loaf": "loaves", "knife": "knives", "goose": "geese"}
TIMES = (
    "the next morning|late at night|on Sunday|on Monday|after lunch|an hour later|at noon|"
    "before sunset|the same evening|early on Friday|a week later|at last"
)
WEATHER = {
    "January": "snow lay on the roofs|the pond was frozen|a bitter wind blew|frost hid the panes",
    "April": "showers came and went|the hedges turned green|lambs ran about|a cuckoo called",
    "July": "the sun burned all day|bees hummed in the clover|thunder rolled far away|dust hung "
    "over the road",
    "October": "leaves whirled along the street|fog rose from the river|the nights grew long|rain "
    "drummed on the slates",
}
TOPICS = (
    {
        "jobs": "baker miller grocer confectioner",
        "places": "in_the_bakery at_the_mill in_the_shop behind_the_counter",
        "things": "loaf cake biscuit bun tin oven sieve apron basket jar",
        "adjectives": "fresh golden sweet burnt enormous plain",
        "verbs": "bake/baked taste/tasted wrap/wrapped",
    },
    {
        "jobs": "clerk secretary lawyer accountant",
        "places": "in_the_office at_the_bank in_the_archive on_the_stairs",
        "things": "letter ledger envelope stamp desk folder ink-pot typewriter report key",
        "adjectives": "urgent secret yellow official dusty blank",
        "verbs": "sign/signed copy/copied hide/hid",
    },
    {
        "jobs": "shepherd ploughman dairymaid groom",
        "places": "in_the_barn on_the_meadow in_the_stable by_the_gate",
        "things": "sheep-bell fence saddle cart goose bucket haystack ladder hen pitchfork",
        "adjectives": "muddy broken black heavy ancient wooden",
        "verbs": "mend/mended fetch/fetched lend/lent",
    },
    {
        "jobs": "knight squire cook minstrel",
        "places": "in_the_castle on_the_tower in_the_hall under_the_bridge",
        "things": "sword shield torch crown banner harp goblet helmet chest tapestry",
        "adjectives": "royal silver rusty noble famous ivory",
        "verbs": "polish/polished guard/guarded carry/carried",
    },
    {
        "jobs": "painter sculptor curator guide",
        "places": "in_the_museum at_the_gallery in_the_studio on_the_balcony",
        "things": "picture statue frame brush vase mask sketch easel mirror carpet",
        "adjectives": "modern delicate striped unknown valuable oval",
        "verbs": "draw/drew admire/admired clean/cleaned",
    },
    {
        "jobs": "engineer pilot mechanic inventor",
        "places": "in_the_hangar at_the_airfield in_the_workshop on_the_runway",
        "things": "engine propeller wrench wing battery wire radio switch gauge box",
        "adjectives": "electric noisy powerful faulty spare aluminium",
        "verbs": "test/tested repair/repaired order/ordered",
    },
    {
        "jobs": "gardener botanist florist forester",
        "places": "in_the_garden in_the_greenhouse under_the_oak at_the_nursery",
        "things": "rose tulip spade hedge berry bench fern watering-can shelf orchid",
        "adjectives": "pale thorny rare tall crimson exotic",
        "verbs": "plant/planted water/watered cut/cut",
    },
)
OPENINGS = (
    "In {month}, when {weather}, {hero} moved to {town}. {hero:he/she} was {hero_job:a} and owned "
    "nothing but {dear:a}.",
    "There once lived {hero_job:a} called {hero} in {town}, which is in {county}. {hero:his/her} "
    "pride was {dear:a}.",
    "{hero} and {friend} met in {town} one day in {month}. {hero} was {hero_job:a}; {friend} was "
    "{friend_job:a}. Between them stood {dear:a}.",
    "This is the tale of {dear:a} that {hero} the {hero_job} brought to {town} in {month}.",
)
ACTS = (
    "{time} {hero} {did} the {thing} {place}.",
    "{hero} went with {friend} to look for {thing:a} and {did} it.",
    "{friend} stared at the {thing} before {friend:he/she} {did} the {other}.",
    "{hero} gave {friend} {thing:a}, because {friend} had always wanted "
    "{bare:a} of {friend:his/her} own.",
    "{hero} could not {do} the {thing}, so {hero:he/she} asked {friend} to {do} it "
    "for {hero:him/her}.",
    "{time} {hero} came home with {thing:a} under {hero:his/her} arm.",
    "{hero:he/she} did not {do} the {thing}, but {hero:he/she} {did} the {other}.",
    "{friend} put the {thing} next to the {other}.",
    "{time} {friend} {did} {hero:s} {thing}, and {hero} thanked {friend:him/her} warmly.",
    "Never before had {hero} seen such {thing:a} {place}.",
    "Instead of {thing:a}, {friend} was given {other:a}.",
)
COUNTS = (
    "There were {had} {place}. {hero} took {taken}, so {left} {left:was/were} left.",
    "The {thing} cost {price} shillings.",
    "{hero} owned {had}. {friend} brought {taken} more, and that made {sum}.",
    "{friend} sold {hero} {taken} for {price} shillings.",
)
TALKS = (
    "“where is the {thing}, {hero}?” asked {friend}.\n“you will find it {place},” replied {hero}.",
    "“please {do} the {thing}, {friend},” begged {hero}.\n“of course I shall {do} it,” promised "
    "{friend}. “just wait a little.”",
    "“how many {bare:s} are there?” wondered {hero}.\n“I can see {had} {place},” counted {friend}.",
    "“why do you need {thing:a}?” said {hero}.\n“without {thing:a} nobody can {do} the {other},” "
    "explained {friend}.",
    "“I {did} the {thing} myself!” boasted {hero}.\n“then {do} the {other} too,” laughed {friend}.",
    "“are you from {town}, {hero}?” asked {friend}.\n“yes, {town} is in {county},” smiled {hero}.",
)
SCENES = (
    "It was {month}, and {weather}.",
    "{weather}; all was quiet {place}.",
    "{place} stood {thing:a} beside {other:a}.",
    "Among the {other:s} {hero} noticed {thing:a}.",
    "Everybody spoke of the {thing}: the {hero_job} as well as the {friend_job}.",
    "{weather} while {hero} waited for {friend} {place}.",
    "There was not a speck of dirt on the {thing}.",
    "{thing:s} and {other:s} lay about {place}.",
)
FACTS = (
    "{hero} was {hero_job:a}, whereas {friend} was {friend_job:a}.",
    "{town} is in {county}.",
    "A skilled {hero_job} never works without {thing:a}.",
    "{hero:s} house in {town} had {bare:a} on its sign.",
    "Most of all {hero} loved {hero:his/her} {dear}, and {friend} loved {friend:his/her} {other}.",
)
ENDINGS = (
    "From then on {hero} and {friend} shared the {dear}.",
    "{time} {hero} left {town} and took the {dear} along.",
    "To this day the {dear} stands in {town}.",
    "So the {hero_job} and the {friend_job} became friends.",
)
KINDS = (ACTS, ACTS, TALKS, TALKS, COUNTS, SCENES, FACTS)
