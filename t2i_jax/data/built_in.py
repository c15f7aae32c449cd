"""What the built-in worlds have in common: their samples are computed, and never bad."""


class BuiltIn:
    """A source of square images of `image_size` pixels, without files."""

    image_size: int
    split: str

    def name(self, i: int) -> str:
        return f"{type(self).__name__.lower()}-{self.split}/{i}"

    def size(self, i: int) -> tuple[int, int]:
        return self.image_size, self.image_size

    @property
    def fingerprint(self) -> str:
        return f"{type(self).__name__.lower()}-{self.split}-{self.image_size}-{len(self)}"
