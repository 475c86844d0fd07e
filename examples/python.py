"""The same in Python: run it in this folder, python python.py."""

from mine import net, task

import tersor

model, data = net(), task()
steps = [tersor.Prune(keep=0.3, epochs=10, ramp=0.5), tersor.Cluster(entries=16, epochs=5), tersor.Entropy()]
small = tersor.run(model, steps, data)
print(tersor.save(small, "out/small.tersor"), "bytes")
print(float(data.scores(model).mean()), "->", float(data.scores(small.model()).mean()))
print("ledger", small.ledger.digest)
again = tersor.load("out/small.tersor").model(net())  # a plain nn.Module with the compressed weights
