"""What a loop tells its pulse, in order."""

from moce_dist.train.pulse import Pulse


class RecordedPulse(Pulse):
    """Notes the numbers of the steps, `rest` and `resume`."""

    def __init__(self):
        super().__init__()
        self.told = []

    def __call__(self, loop, step):
        self.told.append(step)
        return super().__call__(loop, step)

    def rest(self):
        self.told.append("rest")
        super().rest()

    def resume(self):
        self.told.append("resume")
        super().resume()
