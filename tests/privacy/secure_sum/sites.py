"""Sites of a secure sum, for tests: their keys, hellos and transcript."""

from __future__ import annotations

from collections.abc import Sequence

from histoflare.privacy.secure_sum.hello import Hello, RoundKeys, Transcript
from histoflare.privacy.secure_sum.identity import Identity

RUN, ROUND, ATTEMPT = "run", 3, 1


def say_hello(keys: RoundKeys, identity: Identity | None = None) -> Hello:
    """Return the hello of a site with keys of its own."""
    identity = identity or Identity()
    return keys.hello(identity.certificate, identity.sign)


def keys_of(sites: Sequence[str], attempt: int = ATTEMPT) -> list[RoundKeys]:
    """Return the secrets of each site, which all have said hello."""
    made = [RoundKeys.new(site, RUN, ROUND, attempt) for site in sites]
    for keys in made:
        say_hello(keys)
    return made


def hellos_of(keys: Sequence[RoundKeys]) -> tuple[Hello, ...]:
    """Return what these sites said."""
    return tuple(say_hello(each) for each in keys)


def transcript_of(
    keys: Sequence[RoundKeys], *, job: str = "job", received: str = "model", hellos: Sequence[Hello] = ()
) -> Transcript:
    """Return the transcript of a round of these sites."""
    listed = tuple(hellos) or hellos_of(keys)
    return Transcript(job, RUN, ROUND, keys[0].attempt, received, listed)
