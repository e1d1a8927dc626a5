"""A site's answer to a Flower message: the letter is checked, the site works, its answer or its refusal goes back."""

import logging

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Error, Message
from ml_src.core.errors import MLError
from ml_src.core.federated.site import Site
from ml_src.core.federated.wire import from_record, to_record

REFUSED = 1000  # of Flower's error codes, beyond its own
log = logging.getLogger("ml_src")


def answer(site: Site, message: Message) -> Message:
    """Return what a site answers; what it refuses it says in one sentence."""
    try:
        letter = from_record(message.content, site.expected())
        return Message(to_record(site.answer(letter)), reply_to=message)
    except MLError as error:
        log.warning("%s refused: %s", site.name, error)
        return Message(Error(REFUSED, str(error)), reply_to=message)
