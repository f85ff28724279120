"""Names of the norms that come with the package, to be had without torch; a test compares them with `NORMS`."""

NORM_NAMES = ("l1", "l2", "linf")
