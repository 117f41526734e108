"""No test asserts speed, so no random example has a deadline."""

from hypothesis import settings

settings.register_profile("pastalm", deadline=None)
settings.load_profile("pastalm")
