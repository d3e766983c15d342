"""Words for the mixed schemas: none of them names a table of a validation or held-out domain."""

from __future__ import annotations

NOUNS = """
violinist drummer welder clerk satellite lantern bicycle tractor novel painter camera guitar
sculptor pilot sailor nurse surgeon dentist butcher tailor plumber carpenter mechanic gardener
librarian archivist dancer singer actor composer poet critic reporter translator interpreter
judge mayor senator minister ambassador detective sheriff soldier officer captain admiral general
recruit tutor mentor coach referee umpire runner swimmer climber boxer wrestler archer skater
surfer hiker camper traveler tourist passenger commuter driver courier porter waiter baker brewer
farmer shepherd hunter miner smelter forge foundry mill quarry mine well dam canal bridge tunnel
road highway street avenue square park playground stadium arena gallery studio workshop
laboratory clinic ward pharmacist dispensary warehouse depot hangar runway terminal harbor pier
ferry yacht canoe kayak submarine rocket probe rover telescope microscope sensor drone robot
printer scanner server router laptop tablet phone watch ring necklace bracelet vase statue mural
sketch poster banner flag medal trophy ticket voucher coupon invoice receipt contract lease
mortgage bond fund  portfolio trader auditor lender tenant landlord villa cottage cabin
apartment office tower elevator escalator garden orchard meadow forest lake river island volcano
glacier canyon desert reef beach lagoon horse goat llama rabbit hamster ferret parrot pigeon
falconer beehive kennel stable barn silo greenhouse nursery seed flower shrub cactus mushroom
recipe meal snack drink cocktail tea coffee roaster cafe diner buffet caterer event wedding
parade contest tournament season league division squadron battalion brigade unit crew committee
council party  guild society association foundation ministry embassy consulate court prison
shelter rescue alarm patrol permit licence exam quiz lesson lecture seminar workbook syllabus
journal essay chapter poem song melody sonata opera ballet scene trailer cartoon puzzle toy doll
game console gadget battery charger engine turbine pump valve pipe cable switch socket fuse bulb
mirror carpet curtain pillow blanket mattress sofa cabinet drawer
""".split()  # noqa: SIM905 - a list of one word a line would be 300 lines

QUALIFIERS = """
net gross base peak daily weekly annual first last final main local global early late upper lower
inner outer public private basic extra planned actual legal official initial regular special
typical standard reduced expected measured recorded reported estimated printed sold rented stored
lifted shipped booked visited
""".split()  # noqa: SIM905

MEASURES = """
score size width speed power pressure energy voltage radius income turnover debt fine bonus tax
discount deposit rent fare toll wage pension rate share dose intake output input supply demand
load range  delay interval frequency accuracy quality purity noise brightness
""".split()  # noqa: SIM905

COUNTED = """
page word goal visitor member seat room bed door window floor step lap mile ticket vote view
click share reply comment error defect repair patent award prize trip stop port gear wheel engine
lamp screen key button tool part spare crate box bag bottle barrel
""".split()  # noqa: SIM905

DATED = """
opening closing founding building launch release renewal inspection delivery arrival departure
purchase sale repair election retirement graduation admission birth signing testing survey
""".split()  # noqa: SIM905

CATEGORIES = {
    "color": "Red|Black|White|Green|Blue",
    "material": "Oak|Steel|Glass|Clay|Linen",
    "status": "Open|Closed|Paused|Planned",
    "size class": "Small|Medium|Large|Huge",
    "shift": "Morning|Evening|Night",
    "language": "English|Polish|Arabic|Hindi|Dutch",
    "zone": "North|South|East|West|Center",
    "priority": "Low|Normal|High|Urgent",
    "quality": "Poor|Fair|Good|Superb",
    "season": "Spring|Summer|Autumn|Winter",
    "payment type": "Cash|Card|Check|Transfer",
    "license type": "Trial|Single|Family|Campus",
    "origin": "Peru|Kenya|Nepal|Chile|Spain",
    "brand": "Acme|Zenith|Orion|Vertex|Lumo",
    "format": "Print|Audio|Video|Online",
    "condition": "New|Used|Worn|Broken",
    "shape": "Round|Square|Oval|Flat",
    "family": "Pine|Fern|Moss|Reed",
    "religion": "Buddhist|Christian|Hindu|Muslim|Jewish",
    "sector": "Energy|Retail|Health|Media",
    "surface": "Grass|Sand|Asphalt|Clay",
    "taste": "Sweet|Sour|Bitter|Salty",
    "mood": "Calm|Happy|Tense|Sad",
    "county": "Kent|Essex|Dorset|Devon",
    "manager": "@person",
    "home town": "@city",
    "supplier": "@person",
    "birth country": "@country",
}

TITLES = ("name", "title", "label", "code", "model", "brand name", "full name", "heading", "tag")
