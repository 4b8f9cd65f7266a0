"""Settings that every test shares."""

from hypothesis import settings

# A slow moment of the machine is no defect; the time limit of each test is the bound.
settings.register_profile("sandbox", deadline=None, print_blob=True)
settings.load_profile("sandbox")
