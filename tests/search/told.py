"""An observer that keeps what it is told."""

from tersor.record.observer import Observer


class Told(Observer):
    def __init__(self, stop: str = "") -> None:
        self.messages, self.steps, self.stop = list[str](), list[str](), stop

    def message(self, text: str) -> None:
        self.messages.append(text)
        if self.stop and text.startswith(self.stop):
            raise KeyboardInterrupt

    def step(self, number: int, total: int, name: str) -> None:
        self.steps.append(name)
