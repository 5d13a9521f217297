"""Files that were damaged, made up or made to hurt: each is loaded right, or refused with one line."""
