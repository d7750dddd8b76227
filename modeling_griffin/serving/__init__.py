"""Many requests at once, by engines that others make. Importing this imports none of them."""
