"""Laws of `TextPieces`: whatever the tokens and the stop texts, its pieces join to the answer, and none is taken back."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenflex.serve import TextPieces

TEXTS = st.text(alphabet="ab \n\u00e9\u2603", max_size=30)


def decode(ids):
    """Tokens that are bytes, so that a character may be several."""
    return bytes(ids).decode("utf-8", errors="replace")


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab\n\u2603", min_size=1, max_size=3), max_size=2))
def test_pieces_join_to_the_answer_before_the_first_stop(text, stop):
    pieces, sent = TextPieces(decode, stop), ""
    for token in text.encode():
        sent += pieces.push(token)
        assert not sent.endswith((" ", "\n", "\ufffd"))
        if pieces.is_stopped:
            break
    sent += pieces.finish()
    begun = text.lstrip()
    ends = [begun.find(end) + len(end) for end in stop if end in begun]
    seen = begun[: min(ends, default=None)]  # up to the stop that is whole first, no further text is asked for
    places = [seen.find(end) for end in stop if end in seen]
    assert pieces.is_stopped == bool(places)
    assert sent == pieces.text == seen[: min(places, default=None)].rstrip()


def test_what_cannot_become_a_stop_is_sent_at_once():
    pieces = TextPieces(decode, ["end"])
    assert [pieces.push(token) for token in b"been endless"] == ["b", "", "e", "", "en"] + [""] * 7
    assert pieces.finish() == "" and pieces.text == "been"


def test_a_token_costs_the_same_late_in_an_answer():
    decoded = []
    pieces = TextPieces(lambda ids: decoded.append(len(ids)) or decode(ids))
    for token in b"word " * 100:
        pieces.push(token)
    assert max(decoded) <= 4
