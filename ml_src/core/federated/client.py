"""A site's answer to a Flower message: the letter is checked, the site works, its answer or its refusal goes back."""

import logging
from dataclasses import replace

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Error, Message
from ml_src.core.errors import MLError
from ml_src.core.federated.secure import SecureError
from ml_src.core.federated.site import Site
from ml_src.core.federated.wire import PROGRAM, WireError, from_record, to_record
from ml_src.core.federated.wire import REFUSED as REFUSED

log = logging.getLogger("ml_src")


def answer(site: Site, message: Message, is_private: bool = False) -> Message:
    """Return what a site answers; what it refuses it says in one sentence.

    With `is_private`, only sentences about the message itself leave the site: others may name its files.
    """
    try:
        letter = from_record(message.content, site.expected())
        told = site.answer(letter)
        told = replace(told, values=told.values | {PROGRAM: site.program})
        return Message(to_record(told), reply_to=message)
    except MLError as error:
        log.warning("%s refused: %s", site.name, error)
        is_about_message = isinstance(error, WireError | SecureError)
        hidden = f"it cannot take part, and its log says why ({type(error).__name__})"
        sentence = hidden if is_private and not is_about_message else str(error)
        return Message(Error(REFUSED + site.program, sentence), reply_to=message)
