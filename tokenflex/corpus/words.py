"""The words that are rendered into images: common English nouns of four letters, held out by font, not by word."""

WORDS = """
    bear bird boat book cake coin door fish frog gate hand harp horn king lamp leaf moon nest road rose ship star tree wolf
""".split()
