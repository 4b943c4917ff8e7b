"""The words of the micro world: parallel phrases in English, Spanish and German.

One row is one meaning. Nouns stand with the article of the case their slot asks for, so that a
phrase goes into a sentence as it is.
"""

from __future__ import annotations

LANGUAGES = ("en", "es", "de")
LANGUAGE_NAMES = {"en": "english", "es": "spanish", "de": "german"}

Phrase = dict[str, str]  # language -> words


def _rows(table: str) -> list[Phrase]:
    cells = [[cell.strip() for cell in row.split("|")] for row in table.strip().splitlines()]
    return [dict(zip(LANGUAGES, row, strict=True)) for row in cells]


def _groups(**tables: str) -> tuple[list[Phrase], list[str]]:
    """Rows of all tables in a line, and beside each the name of the table it came from."""
    rows = [(row, name) for name, table in tables.items() for row in _rows(table)]
    return [row for row, _ in rows], [name for _, name in rows]


SUBJECTS = _rows("""
    the girl      | la niña       | das mädchen
    the boy       | el chico      | der junge
    the teacher   | el maestro    | der lehrer
    the doctor    | la doctora    | die ärztin
    the farmer    | el granjero   | der bauer
    the baker     | el panadero   | der bäcker
    the singer    | la cantante   | die sängerin
    the neighbour | el vecino     | der nachbar
    the sailor    | el marinero   | der matrose
    the painter   | la pintora    | die malerin
    the student   | el estudiante | der student
    the queen     | la reina      | die königin
""")

# A verb carries the sentiment of its sentence.
VERBS, VERB_SENTIMENTS = _groups(
    good="""
        finds   | encuentra | findet
        loves   | ama       | liebt
        repairs | repara    | repariert
        praises | elogia    | lobt
        saves   | salva     | rettet
    """,
    bad="""
        loses   | pierde    | verliert
        breaks  | rompe     | zerbricht
        hates   | odia      | hasst
        forgets | olvida    | vergisst
        steals  | roba      | stiehlt
    """,
    neutral="""
        sees    | ve        | sieht
        carries | lleva     | trägt
        buys    | compra    | kauft
        sells   | vende     | verkauft
        draws   | dibuja    | zeichnet
        watches | mira      | beobachtet
    """,
)

# An object carries the topic.
OBJECTS, OBJECT_TOPICS = _groups(
    food="""
        the bread  | el pan      | das brot
        the cheese | el queso    | den käse
        the apple  | la manzana  | den apfel
        the soup   | la sopa     | die suppe
    """,
    music="""
        the guitar | la guitarra | die gitarre
        the drum   | el tambor   | die trommel
        the song   | la canción  | das lied
        the flute  | la flauta   | die flöte
    """,
    animals="""
        the horse  | el caballo  | das pferd
        the cat    | el gato     | die katze
        the dog    | el perro    | den hund
        the bird   | el pájaro   | den vogel
    """,
    tools="""
        the hammer | el martillo | den hammer
        the rope   | la cuerda   | das seil
        the lamp   | la lámpara  | die lampe
        the knife  | el cuchillo | das messer
    """,
)

PLACES = _rows("""
    in the garden    | en el jardín      | im garten
    at the market    | en el mercado     | auf dem markt
    in the kitchen   | en la cocina      | in der küche
    at school        | en la escuela     | in der schule
    on the bridge    | en el puente      | auf der brücke
    by the river     | junto al río      | am fluss
    in the forest    | en el bosque      | im wald
    at the station   | en la estación    | am bahnhof
    in the tower     | en la torre       | im turm
    on the beach     | en la playa       | am strand
    behind the house | detrás de la casa | hinter dem haus
    in the village   | en el pueblo      | im dorf
""")

TIMES = _rows("""
    today         | hoy                | heute
    now           | ahora              | jetzt
    on monday     | el lunes           | am montag
    on friday     | el viernes         | am freitag
    in summer     | en verano          | im sommer
    in winter     | en invierno        | im winter
    at noon       | al mediodía        | am mittag
    every night   | cada noche         | jede nacht
    this week     | esta semana        | diese woche
    before dinner | antes de la cena   | vor dem essen
""")

ADVERBS = _rows("""
    gladly    | con gusto    | gern
    quickly   | con prisa    | schnell
    slowly    | despacio     | langsam
    quietly   | en silencio  | leise
    secretly  | en secreto   | heimlich
    often     | a menudo     | oft
    carefully | con cuidado  | vorsichtig
    again     | otra vez     | wieder
    proudly   | con orgullo  | stolz
""")

# What one does with things of a topic: the verb of the second clause of a continuation.
TOPIC_VERBS: dict[str, Phrase] = dict(
    zip(
        ("food", "music", "animals", "tools"),
        _rows("""
            smells | huele  | riecht
            hears  | oye    | hört
            calls  | llama  | ruft
            cleans | limpia | putzt
        """),
        strict=True,
    )
)

UNKNOWN: Phrase = {"en": "unknown", "es": "desconocido", "de": "unbekannt"}
FILLERS: Phrase = {"en": "uh", "es": "eh", "de": "äh"}  # heard in careless speech, never meant
